"""Every option of a training run, in sections, and the presets.

Options come from a preset, then a YAML file, then the command line; what comes later wins. An
option has one name everywhere: in Python, ``config.loss.kappa``, it is a field of its section; in a
file it stands below its section or without one; on the command line it is ``--kappa``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from dhcl.errors import ConfigError, as_path
from dhcl.stored import Damaged, read_text
from dhcl.words import did_you_mean, show

__all__ = [
    "EPS_GAP",
    "OPTIONS",
    "PRESETS",
    "REMOVED",
    "RUN_FILE",
    "SECTIONS",
    "BatchOptions",
    "ConfigError",
    "DataOptions",
    "EvaluationOptions",
    "LabelOptions",
    "LossOptions",
    "MemoryOptions",
    "ModelOptions",
    "OptimiserOptions",
    "Preset",
    "TrainConfig",
    "can_be_sharded",
    "check_resumed",
    "flat_options",
    "has_no_instance_loss",
    "load_config",
    "preset",
    "read_options",
    "read_run",
    "run_text",
    "with_changes",
]

Preset = Literal["dhcl", "dhcl-hnm", "spcl", "cluster-contrast"]
# Those of Accelerate.
Logger = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


# ---- types --------------------------------------------------------------------------------------


def _no_truth_value(value: object) -> object:
    # YAML has true where someone meant a word, and pydantic takes it for 1.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


_Number = BeforeValidator(_no_truth_value)
PositiveInt = Annotated[int, _Number, Field(gt=0)]
NonNegativeInt = Annotated[int, _Number, Field(ge=0)]
PositiveFloat = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, _Number, Field(ge=0, le=1)]


def _listed(value: object) -> object:
    # YAML's `log_with: mlflow` has no brackets.
    return [value] if isinstance(value, str) else value


# ---- sections -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """The images to train and test on."""

    data: str = "folder"
    """Layout of the data set, such as market1501 or msmt17, or folder for any tree of images."""
    root: Path | None = None
    """Folder that holds the images."""
    pattern: str | None = None
    """Regular expression with groups named id, camera, track and frame, searched in each path."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do if image files can't be read: refuse to train, or skip them."""
    cache_gb: NonNegativeFloat = 0.0
    """Memory in GiB for decoded images, for each of training, query and gallery; 0 keeps none."""
    workers: NonNegativeInt = 4
    """Number of processes that load images; 0 is the main one. No result depends on it."""


@dataclass(frozen=True)
class ModelOptions:
    """The network, its weights, and the images and statistics that it works with."""

    backbone: str = "resnet50"
    """Network that computes features: small, resnet50, vit_small and others, or timm:NAME."""
    pretrained: bool = True
    """Whether to start from ImageNet weights, where the backbone has some."""
    weights: Path | None = None
    """File of weights to start from instead; a checkpoint of another run will do."""
    image_size: tuple[PositiveInt, PositiveInt] = (256, 128)
    """Height and width in pixels to which every image is resized."""
    samples_per_bn: NonNegativeInt = 0
    """Number of images per batch-norm statistic (16: four GPUs, batch 64); 0 is the batch."""
    camera_bn: bool = False
    """Whether batch norm has statistics per camera, in training, extraction and evaluation."""
    calibrate: Literal["never", "start", "epoch"] = "never"
    """When to take batch-norm statistics of plain images: at the start, or each epoch too."""


@dataclass(frozen=True)
class LabelOptions:
    """The pseudo-labels: Jaccard distances between features, and DBSCAN."""

    cluster_on: Literal["bank", "extracted"] = "bank"
    """Features to cluster: the memory bank's, or ones extracted each epoch, which refill it."""
    k1: PositiveInt = 30
    """Number of nearest neighbours that the Jaccard distance is computed from."""
    k1_own: NonNegativeInt = 0
    """Number of them that are of the image's own camera; with 0 cameras do not count."""
    k2: PositiveInt = 6
    """Number of neighbours over which the Jaccard distance averages (query expansion)."""
    eps: Annotated[float, _Number, Field(gt=0, lt=1)] = 0.6
    """Largest Jaccard distance at which DBSCAN takes two images for neighbours."""
    min_samples: PositiveInt = 4
    """Number of images within eps, itself included, that make one the core of a cluster."""
    self_paced: bool = False
    """Whether to keep independent and compact clusters only, by SpCL's criterion."""
    outliers: Literal["keep", "drop"] = "keep"
    """Whether images in no cluster are kept, as classes of their own, or dropped this epoch."""


@dataclass(frozen=True)
class MemoryOptions:
    """The memory that features are compared with."""

    memory: Literal["instances", "clusters"] = "instances"
    """What a row of the memory stands for: an image, or a cluster."""
    momentum: Share = 0.2
    """Share of a memory's row that an update keeps, from 0 to 1."""
    memory_layout: Literal["auto", "replicated", "sharded"] = "auto"
    """Whole on each process, or each holds its share of rows; auto: sharded from 500,000 images."""


@dataclass(frozen=True)
class LossOptions:
    """The contrastive loss."""

    temperature: PositiveFloat = 0.05
    """Number by which cosine similarities are divided before the softmax."""
    prototype_weight: NonNegativeFloat = 1.0
    """Weight of the loss over prototypes."""
    instance_weight: NonNegativeFloat = 1.0
    """Weight of the loss over single images, lambda; at 0 outliers are still told apart."""
    instance_positives: Literal["self", "hardest", "cross-camera", "class"] = "cross-camera"
    """Positive of the loss over single images: the image's own row, the hardest of its class, the
    hardest of its class in another camera (without two cameras there is no such loss), or all of
    its class."""
    debias: Literal["constant", "graph"] = "constant"
    """What is known of false negatives: a number, kappa, or the Jaccard graph at debias_eps."""
    debias_eps: Annotated[float, _Number, Field(gt=0, lt=1)] = 0.85
    """Largest Jaccard distance of the pairs that debias graph looks at; larger than eps."""
    kappa: NonNegativeFloat = 0.0
    """Number of false negatives to expect among the other prototypes; 0 does not debias."""
    beta: NonNegativeFloat = 0.0
    """Weight of hard negatives, on similarity divided by temperature; 0 weighs all alike."""
    hardness: NonNegativeFloat | None = None
    """Weight of hard negatives on the similarity itself, beta / temperature; replaces beta."""
    suspects: Literal["off", "exclude", "kappa"] = "off"
    """Classes that a looser clustering joins: exclude them as negatives, or count in kappa."""
    warmup_epochs: NonNegativeInt = 5
    """Number of first epochs with kappa and beta at 0 and without suspects."""


@dataclass(frozen=True)
class BatchOptions:
    """The batches of an epoch, and the augmentation of their images."""

    classes_per_batch: PositiveInt = 16
    """Number of classes in a batch, over all processes."""
    images_per_class: PositiveInt = 4
    """Number of images that a batch has of each of its classes."""
    accumulate: PositiveInt = 1
    """Number of batches whose gradients make one step of the optimiser."""
    iterations: PositiveInt = 400
    """Number of batches in an epoch."""
    pad: NonNegativeInt = 10
    """Width in pixels of the border that is added before a random crop."""
    erase: Share = 0.5
    """Probability that a rectangle of an image is erased."""
    color_jitter: Share = 0.0
    """Strength of random brightness, contrast, saturation and hue, from 0 to 1."""


@dataclass(frozen=True)
class OptimiserOptions:
    """The steps of Adam."""

    lr: PositiveFloat = 3.5e-4
    """Learning rate of Adam in the first epochs."""
    lr_step: PositiveInt = 20
    """Number of epochs between falls of the learning rate, each to a tenth."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured on the test images."""

    eval_every: NonNegativeInt = 10
    """Number of epochs between evaluations that are logged, not used; 0 is the end only."""
    eval_batch: PositiveInt = 128
    """Number of images in a batch without gradients, in extraction and evaluation."""
    rerank: bool = True
    """Whether to evaluate the last epoch with k-reciprocal re-ranking too."""
    report: bool = True
    """Whether to write report.html to the run's folder at the end."""


@dataclass(frozen=True)
class TrainConfig:
    """What belongs to the run as a whole.

    The sections are the fields from ``data`` on. Defaults are the preset ``dhcl``.
    """

    out: Path | None = None
    """Folder that the run is written to; without one, runs/DATA-PRESET-seedSEED."""
    preset: Preset = "dhcl"
    """Recipe that the defaults of all other options come from."""
    seed: NonNegativeInt = 0
    """Seed of everything that is random."""
    epochs: PositiveInt = 50
    """Number of rounds, each of which clusters the images and trains on the clusters."""
    device: Literal["auto", "cpu"] = "auto"
    """Processor that the network runs on: auto takes a GPU where there is one."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the network's arithmetic; features, memory and loss stay in fp32."""
    deterministic: bool = False
    """Whether to refuse algorithms that give other bits each time, as some on GPUs do."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints within an epoch; with 0 only its end has one."""
    timeout_minutes: PositiveFloat = 5.0
    """Minutes to wait for another process, or one that loads images, which does not answer."""
    log_with: Annotated[tuple[Logger, ...], BeforeValidator(_listed)] = ()
    """Loggers that get what the log says too, such as mlflow; TensorBoard has it in any case."""
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    labels: LabelOptions = LabelOptions()
    memory: MemoryOptions = MemoryOptions()
    loss: LossOptions = LossOptions()
    batches: BatchOptions = BatchOptions()
    optimiser: OptimiserOptions = OptimiserOptions()
    evaluation: EvaluationOptions = EvaluationOptions()

    @property
    def run(self) -> Path:
        """The folder of the run."""
        name = f"{self.data.data.replace('/', '_')}-{self.preset}-seed{self.seed}"
        return self.out or Path("runs") / name

    def resolved(self) -> TrainConfig:
        """With ``hardness`` turned into ``beta``, checked."""
        config = self
        if (hardness := self.loss.hardness) is not None:
            beta = hardness * self.loss.temperature
            loss = dataclasses.replace(self.loss, beta=beta, hardness=None)
            config = dataclasses.replace(self, loss=loss)
        config.validate()
        return config

    def validate(self) -> None:
        """Raise :class:`ConfigError` that names every wrong value, or every contradiction."""
        _validated(dataclasses.asdict(self))
        if wrong := _contradictions(self):
            raise ConfigError("\n".join(wrong))

    def to_yaml(self) -> str:
        """All options as YAML, by section, in the order of the fields."""
        plain = {
            name: {key: _plain(each) for key, each in value.items()}
            if isinstance(value, dict)
            else _plain(value)
            for name, value in dataclasses.asdict(self).items()
        }
        return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Pairs in one line, everything else in lines of its own."""


_Dumper.add_representer(
    list, lambda dumper, pair: dumper.represent_sequence("tag:yaml.org,2002:seq", pair, True)
)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


SECTIONS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(field.default)
}
"""Name and class of each section."""

OPTIONS: dict[str, str] = {
    **{field.name: "" for field in dataclasses.fields(TrainConfig) if field.name not in SECTIONS},
    **{
        field.name: section
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    },
}
"""Name of each option, and the section it is in; that of the run itself is empty."""


def flat_options(config: TrainConfig) -> dict[str, Any]:
    """The value of each option by its name, whatever its section."""
    return {
        name: getattr(getattr(config, section) if section else config, name)
        for name, section in OPTIONS.items()
    }


# ---- rules --------------------------------------------------------------------------------------

EPS_GAP = 0.02
"""How far the tighter and the looser eps of the self-paced criterion and of suspects lie off."""


def has_no_instance_loss(loss: LossOptions, cameras: int) -> bool:
    """Whether the loss over single images is left out for want of cameras.

    Its positive would be the image's own row, which costs more than it brings (results.md in docs).

    Args:
        loss: the options.
        cameras: number of cameras that are known of the training images.
    """
    across = loss.instance_positives == "cross-camera"
    return bool(loss.instance_weight) and across and cameras < 2


def can_be_sharded(c: TrainConfig) -> bool:
    """Whether the memory of a run with these options can be spread over its processes."""
    return c.memory.memory == "instances"


def _contradictions(c: TrainConfig) -> list[str]:
    labels, loss, batches, clusters = c.labels, c.loss, c.batches, c.memory.memory == "clusters"
    images = batches.classes_per_batch * batches.images_per_class
    gap = f"eps -/+ {EPS_GAP} must lie between 0 and 1 (got eps {labels.eps})"
    by_graph = loss.debias == "graph"
    widest = labels.eps + (EPS_GAP if labels.self_paced or loss.suspects != "off" else 0.0)
    leaves = not 0 < labels.eps - EPS_GAP <= labels.eps + EPS_GAP < 1
    rules = {
        "samples_per_bn and camera_bn: statistics are per chunk or per camera, choose one": (
            c.model.samples_per_bn and c.model.camera_bn
        ),
        "pattern and data: a pattern is for data: folder": (
            c.data.pattern and c.data.data != "folder"
        ),
        "memory and cluster_on: a memory of clusters needs cluster_on: extracted": (
            clusters and labels.cluster_on == "bank"
        ),
        "memory and instance_weight: a memory of clusters has no instances, so the instance "
        f"weight must be 0 (got {loss.instance_weight})": clusters and loss.instance_weight,
        "memory and suspects: suspects need a memory of instances": (
            clusters and loss.suspects != "off"
        ),
        "memory and debias: the graph is one of images, and needs a memory of instances": (
            clusters and by_graph
        ),
        f"debias and kappa: the graph stands in place of kappa (got kappa {loss.kappa} too)": (
            by_graph and loss.kappa
        ),
        "debias and suspects: the graph stands in place of suspects: kappa": (
            by_graph and loss.suspects == "kappa"
        ),
        f"debias_eps and eps: debias_eps must be at least {widest:g}, the largest eps that labels "
        f"are made with (got {loss.debias_eps})": by_graph and loss.debias_eps < widest,
        "outliers and memory: outliers can be dropped from a memory of clusters only": (
            labels.outliers == "drop" and not clusters
        ),
        f"k2 and k1: k2 must be at most k1 (got {labels.k2} and {labels.k1})": (
            labels.k2 > labels.k1
        ),
        f"k1_own and k1: k1_own must be at most k1 (got {labels.k1_own} and {labels.k1})": (
            labels.k1_own > labels.k1
        ),
        "prototype_weight and instance_weight: must not both be 0": (
            not loss.prototype_weight and not loss.instance_weight
        ),
        f"suspects and kappa: suspects: kappa sets kappa itself (got kappa {loss.kappa} too)": (
            loss.suspects == "kappa" and loss.kappa
        ),
        f"self_paced and eps: {gap}": labels.self_paced and leaves,
        f"suspects and eps: {gap}": loss.suspects != "off" and leaves,
        f"iterations and accumulate: {batches.iterations} batches must make whole steps of "
        f"{batches.accumulate}": batches.iterations % batches.accumulate,
        "classes_per_batch and images_per_class: a batch must have at least 2 images": images < 2,
        f"memory_layout: a sharded memory is one of instances (got memory {c.memory.memory})": (
            c.memory.memory_layout == "sharded" and not can_be_sharded(c)
        ),
        "precision and device: fp16 needs a GPU": c.precision == "fp16" and c.device == "cpu",
    }
    return [rule for rule, broken in rules.items() if broken]


# ---- presets ------------------------------------------------------------------------------------

PRESETS: dict[str, dict[str, Any]] = {
    "dhcl": {},
    # Every part of the loss (docs/method.md); docs/results.md says why they are not the default.
    "dhcl-hnm": {
        "debias": "graph",
        "beta": 0.1,
    },
    # Ge et al., NeurIPS 2020.
    "spcl": {
        "instance_weight": 0.0,
        "self_paced": True,
        "warmup_epochs": 0,
    },
    # Dai et al., ACCV 2022.
    "cluster-contrast": {
        "memory": "clusters",
        "instance_weight": 0.0,
        "cluster_on": "extracted",
        "outliers": "drop",
        "momentum": 0.1,
        "warmup_epochs": 0,
        "images_per_class": 16,
    },
}
"""What each preset changes of the defaults. Published recipes, each with its own batch."""


def preset(name: str) -> TrainConfig:
    """The options of a preset."""
    if name not in PRESETS:
        raise ConfigError(f"preset: {_unknown(name, PRESETS)}")
    return with_changes(TrainConfig(), {"preset": name, **PRESETS[name]})


# ---- changes ------------------------------------------------------------------------------------

REMOVED: dict[str, Any] = {
    "eps_gap": EPS_GAP,
    "patience": 5,
    "hardness_gradient": "stop",
    "update": "all",
    "pooling": None,
    "flip": 0.5,
    "weight_decay": 5e-4,
    "schedule": "step",
    "lr_gamma": 0.1,
    "lr_warmup": 0,
    "checkpoint_iterations": 0,
}
"""Options that earlier versions had, and the value that every run has now."""


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The options with some of them changed; of beta and hardness the one named here counts.

    Args:
        config: the options to start from.
        changes: value by name, ``{"kappa": 0.1}``, or by section, ``{"loss": {"kappa": 0.1}}``.
            Values may be as YAML has them: paths and numbers as text, pairs as lists.

    Raises:
        ConfigError: no such option, one that is gone, one named twice, or wrong values, each of
            which is named.
    """
    changes = _known(_by_name(changes))
    if "beta" in changes and changes.get("hardness") is not None:
        raise ConfigError(
            "beta and hardness: hardness is beta / temperature, give one of them "
            f"(got {changes['beta']} and {changes['hardness']})"
        )
    if "beta" in changes:
        changes["hardness"] = None
    values = dataclasses.asdict(config)
    for name, value in changes.items():
        section = OPTIONS[name]
        (values[section] if section else values)[name] = value
    return _validated(values)


def _by_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values without their sections."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        # data and memory are names of an option and of its section.
        inside = name in SECTIONS and isinstance(value, Mapping)
        if name in SECTIONS and name not in OPTIONS and not inside:
            raise ConfigError(f"{name}: must hold `option: value` lines (got {value})")
        for key, each in value.items() if inside else [(name, value)]:
            if inside and OPTIONS.get(key, name) != name:
                home = f"section {OPTIONS[key]}" if OPTIONS[key] else "no section"
                raise ConfigError(f"{key}: is an option of {home} (got it in {name})")
            if key in flat:
                raise ConfigError(f"{key}: is given twice (got {flat[key]} and {each})")
            flat[key] = each
    return flat


def _known(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes without options that are gone, if these have the value that is left."""
    for name, value in changes.items():
        if name in REMOVED and value != REMOVED[name]:
            raise ConfigError(
                f"{name}: this option is gone, and every run has the value "
                f"{REMOVED[name]} (got {value})"
            )
        if name not in OPTIONS and name not in REMOVED:
            raise ConfigError(f"option: {_unknown(name, OPTIONS)}")
    return {name: value for name, value in changes.items() if name in OPTIONS}


def _validated(values: dict[str, Any]) -> TrainConfig:
    """The options with these values by section, types and ranges checked by pydantic."""
    try:
        return _validator().validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_sentence, error.errors()))) from error


@functools.cache
def _validator() -> TypeAdapter[TrainConfig]:
    return TypeAdapter(TrainConfig)


def _sentence(error: Mapping[str, Any]) -> str:
    """What pydantic says of one value, in the words of this module."""
    first, *rest = error["loc"]
    name = rest[0] if first in SECTIONS else first
    said = re.sub(r"^\w+ should ", "must ", error["msg"])  # "Input should be", "Tuple should have"
    said = re.sub(r"^Input is not a valid path.*", "must be a path", said)
    return f"{name}: {said} (got {error['input']})"


# ---- files --------------------------------------------------------------------------------------

# Of a file of options: bytes, values, and bits of a number; Python prints no longer ones.
_MAX_YAML = 1 << 20
_MAX_VALUES = 10_000
_MAX_BITS = 4096
_TOO_MANY = f"it must hold at most {_MAX_VALUES:,} values, and aliases count"


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a YAML file says, by option, whether it has sections or not.

    Raises:
        ConfigError: no file that can be read, or not one of options.
    """
    path = as_path("config", path)
    try:
        content = yaml.load(read_text(path, _MAX_YAML), _Loader) or {}
        _check_size(content)
    except OSError as error:
        raise ConfigError(f"config: {show(path)} can't be read ({error.strerror})") from error
    except RecursionError as error:
        raise ConfigError(f"config: {show(path)} is nested too deep") from error
    except Damaged as error:
        raise ConfigError(f"config: {show(path)} can't be used ({error})") from error
    except Exception as error:  # tags, dates and numbers that are none have errors of any kind
        raise ConfigError(f"config: {show(path)} is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: {show(path)} must hold `option: value` lines")
    try:
        options = _by_name(content)
        for name, value in options.items():
            if isinstance(value, str) and "\0" in value:  # no path can
                raise ConfigError(f"{name}: must not hold a zero byte (got {show(value)})")
    except ConfigError as error:
        raise ConfigError(f"{show(path)}: {error}") from error
    return options


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Raises :class:`Damaged` as soon as there are more values than options have.

    What is merged by ``<<`` counts each time: ten lines of it could stand for billions of values.
    """

    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._count(1)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        self._count(len(node.value))

    def _count(self, more: int) -> None:
        self.count += more
        if self.count > 2 * _MAX_VALUES:  # as a node, and as an entry of a mapping
            raise Damaged(_TOO_MANY)


def _check_size(content: Any) -> None:
    """Raise :class:`Damaged` for more values than options have, or a number of endless digits.

    Aliases count as what they stand for: a few lines of them could stand for billions of values.
    """
    rest, count = [content], 0
    while rest and count <= _MAX_VALUES:
        value = rest.pop()
        count += 1
        if isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            rest += value
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise Damaged(f"a number must have at most {_MAX_BITS:,} bits")
    if rest:
        raise Damaged(_TOO_MANY)


def load_config(path: str | os.PathLike[str], base: TrainConfig | None = None) -> TrainConfig:
    """The options with those in a YAML file.

    A relative ``root`` or ``weights`` is looked for beside the file, then in the working directory.

    Args:
        path: the file.
        base: the options where the file says nothing; by default those of the preset ``dhcl``.

    Raises:
        ConfigError: no such file, or wrong options in it; it names the file and the option.
    """
    path = as_path("config", path)
    return _load(path, read_options(path), base or TrainConfig(), (path.parent, Path()))


def read_run(run: str | os.PathLike[str]) -> TrainConfig:
    """The options of a run, with ``out`` as the folder where it lies now.

    A relative ``root`` or ``weights`` is looked for from there, then from where the run lay when it
    was written, then from the working directory, as earlier versions meant it.

    Raises:
        ConfigError: no such folder, one without ``config.yaml``, or wrong options in it.
    """
    run = as_path("run", run)
    if not run.is_dir():
        what = "a file" if run.exists() else "nothing"
        raise ConfigError(f"run: must be the folder of a run (got {what} at {show(run)})")
    file = run / RUN_FILE
    if not file.is_file():
        raise ConfigError(f"run: {show(run)} is not the folder of a run, it has no {RUN_FILE}")
    content = read_options(file)
    was = Path(str(content.get("out") or run))
    config = _load(file, content, TrainConfig(), (run, was, Path()))
    return dataclasses.replace(config, out=run)


def run_text(config: TrainConfig) -> str:
    """The options as the file of their run holds them, for :func:`read_run`.

    ``out`` is an absolute path. So are ``root`` and ``weights``, unless they lie near the run,
    below the folder two levels above it: then they are relative to the run's folder, which can be
    moved together with them.
    """
    home = config.run.resolve()
    given = flat_options(config)
    kept = {name: _kept(given[name], home) for name in _INPUTS if given[name] is not None}
    return with_changes(config, {"out": home, **kept}).to_yaml()


RUN_FILE = "config.yaml"
"""Name of the file in a run's folder that holds its options."""
# Files and folders that a run reads.
_INPUTS = ("root", "weights")


def _load(
    path: Path, content: dict[str, Any], base: TrainConfig, folders: Iterable[Path]
) -> TrainConfig:
    """The options with those that a file holds; its relative paths are from these folders."""
    changes = dict(content)
    for name in _INPUTS:
        if isinstance(changes.get(name), str):
            changes[name] = _located(changes[name], folders)
    try:
        return with_changes(base, changes)
    except ConfigError as error:
        raise ConfigError(f"{show(path)}: {error}") from error


def _located(given: str, folders: Iterable[Path]) -> Path:
    """The path, absolute, in the first of the folders that has it, else in the first of all."""
    path = Path(given).expanduser()
    places = [Path(os.path.normpath(folder.resolve() / path)) for folder in folders]
    return next((place for place in places if place.exists()), places[0])


def _kept(path: Path, home: Path) -> Path:
    """The path as the file of a run in this folder holds it."""
    whole = Path(os.path.abspath(path.expanduser()))
    near = home.parent.parent
    if near != near.parent and whole.is_relative_to(near):
        return Path(os.path.relpath(whole, home))
    return whole


# What may differ when a run goes on: nothing that decides a bit of the result.
_FREE = (
    "root workers cache_gb epochs eval_every rerank report checkpoint_minutes timeout_minutes "
    "log_with memory_layout"
)


def check_resumed(began: TrainConfig, now: TrainConfig) -> None:
    """Refuse to go on with a run under options that would give another result.

    Args:
        began: the run's options.
        now: those to go on with.

    Raises:
        ConfigError: the name of an option that may not change, with both values.
    """
    old = flat_options(began)
    for name, value in flat_options(now).items():
        if value != old[name] and name not in _FREE.split():
            raise ConfigError(
                f"{name} and resume: a run goes on with the options it began with "
                f"(got {value}, was {old[name]}); what may change: {_FREE}"
            )


# ---- words --------------------------------------------------------------------------------------


def _unknown(name: str, names: Iterable[str]) -> str:
    return f"there is none called {str(name)!r}{did_you_mean(name, names)}"
