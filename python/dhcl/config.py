"""Every option of a training run, in one dataclass, and the presets.

Options come from a preset, then a YAML file, then the command line; what comes later wins. The
file's keys are the field names below, the command line's are the same with dashes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from dhcl.errors import ConfigError
from dhcl.words import did_you_mean, show

__all__ = [
    "PRESETS",
    "ConfigError",
    "Preset",
    "TrainConfig",
    "check_resumed",
    "load_config",
    "preset",
    "read_options",
    "read_run",
    "with_changes",
]

Preset = Literal["dhcl", "dhcl-hnm", "spcl", "cluster-contrast"]


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Defaults are the preset ``dhcl``."""

    # ---- data ----
    data: str = "folder"
    """Data set: market1501, dukemtmc, msmt17, cuhk03-np, personx, veri776, vehicleid, or folder."""
    root: Path | None = None
    """Where it lies."""
    pattern: str | None = None
    """For a folder: regular expression with groups named id and camera, searched in each path."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do if images can't be read."""
    cache_gb: float = 0.0
    """Memory for decoded, resized images, per data split; 0 decodes every time."""
    workers: int = 4
    """Processes that load images; 0 loads in the main one. Results do not depend on it."""

    # ---- run ----
    out: Path | None = None
    """Folder of the run; by default runs/DATA-PRESET-seedSEED."""
    preset: Preset = "dhcl"
    """Where the defaults of the method come from."""
    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the network; features, memory and loss stay in fp32."""
    deterministic: bool = False
    """Refuse algorithms that give other bits each time (slower on a GPU; the CPU has none)."""

    # ---- model ----
    backbone: str = "resnet50"
    """small, resnet50, resnet50_ibn_a, vit_small, ..., or timm:NAME."""
    pretrained: bool = True
    """Start from ImageNet weights where the backbone has some."""
    weights: Path | None = None
    """File of weights to start from instead; a checkpoint of another run will do."""
    pooling: Literal["gem", "gem-halves", "avg", "avg-halves", "token"] | None = None
    """By default what suits the backbone."""
    image_size: tuple[int, int] = (256, 128)
    """Height and width in pixels."""
    samples_per_bn: int = 0
    """Batch-norm statistics over so many images at a time (16 equals four GPUs at batch 64)."""
    camera_bn: bool = False
    """Batch-norm statistics per camera, in training, extraction and evaluation."""
    calibrate: Literal["never", "start", "epoch"] = "never"
    """Batch-norm statistics from clean training images: at the start, or after each epoch too."""

    # ---- pseudo-labels ----
    cluster_on: Literal["bank", "extracted"] = "bank"
    """Cluster the memory bank, or features extracted anew each epoch, which then refill it."""
    k1: int = 30
    """Neighbours of the Jaccard distance."""
    k1_own: int = 0
    """How many of them are of the image's own camera; 0 takes the nearest of all cameras."""
    k2: int = 6
    """Neighbours of its query expansion."""
    eps: float = 0.6
    """Largest Jaccard distance of neighbours in DBSCAN."""
    min_samples: int = 4
    """Neighbours that make an image the core of a cluster."""
    eps_gap: float = 0.02
    """How far the tighter and looser eps of the self-paced criterion and of suspects lie off."""
    self_paced: bool = False
    """Keep independent and compact clusters only (SpCL's criterion)."""
    outliers: Literal["keep", "drop"] = "keep"
    """Un-clustered images: classes of their own, or left out of the epoch."""
    patience: int = 5
    """With outliers dropped: stop after so many epochs on end without a cluster."""

    # ---- memory ----
    memory: Literal["instances", "clusters"] = "instances"
    """A row per image with prototypes as their means, or a row per cluster."""
    momentum: float = 0.2
    """Share of the old row in an update."""
    update: Literal["all", "hard"] = "all"
    """Which images of a batch move a cluster's row: all in order, or the least similar one."""

    # ---- loss ----
    temperature: float = 0.05
    """Divides similarities."""
    prototype_weight: float = 1.0
    """Weight of the loss over prototypes."""
    instance_weight: float = 0.0
    """Weight of the loss over instances, lambda; un-clustered ones are told apart at 0 too."""
    instance_positives: Literal["self", "class"] = "self"
    """Positives of the instance loss: an image's own row, or all rows of its class."""
    kappa: float = 0.0
    """Debiasing: expected number of false negatives among the other prototypes; 0 is off."""
    beta: float = 0.0
    """Weight of hard negatives, on similarity / temperature; 0 is off."""
    hardness: float | None = None
    """The same on the similarity itself, beta / temperature; in place of beta."""
    hardness_gradient: Literal["stop", "through"] = "stop"
    """Treat the weights of hard negatives as constants, or differentiate them."""
    suspects: Literal["off", "exclude", "kappa"] = "off"
    """Classes that a looser clustering joins: leave them out of the negatives, or count them."""
    warmup_epochs: int = 5
    """Epochs at the beginning with kappa = beta = 0 and no suspects."""

    # ---- batches ----
    classes_per_batch: int = 16
    """Classes in a batch, over all processes."""
    images_per_class: int = 4
    """Images of each."""
    accumulate: int = 1
    """Batches per optimiser step."""
    iterations: int = 400
    """Batches per epoch."""
    epochs: int = 50
    """Rounds of clustering and training."""
    flip: float = 0.5
    """Probability of mirroring an image."""
    pad: int = 10
    """Pixels of padding before a random crop."""
    erase: float = 0.5
    """Probability of erasing a rectangle."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast, saturation and hue."""

    # ---- optimiser ----
    lr: float = 3.5e-4
    """Learning rate of Adam."""
    weight_decay: float = 5e-4
    """Weight decay, added to the gradient."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Course of the learning rate over the epochs."""
    lr_step: int = 20
    """Epochs between falls by lr_gamma."""
    lr_gamma: float = 0.1
    """Factor of a fall."""
    lr_warmup: int = 0
    """Epochs over which the learning rate rises to lr."""

    # ---- evaluation and checkpoints ----
    eval_every: int = 10
    """Epochs between evaluations that are looked at, not used; 0 evaluates at the end only."""
    eval_batch: int = 128
    """Images per batch without gradients."""
    rerank: bool = True
    """Evaluate the last epoch with k-reciprocal re-ranking too."""
    report: bool = True
    """At the end, write report.html to the run's folder."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; 0 writes them at its end only."""
    checkpoint_iterations: int = 0
    """Iterations between checkpoints within an epoch; 0 goes by minutes only."""

    @property
    def run(self) -> Path:
        """The folder of the run."""
        name = f"{self.data.replace('/', '_')}-{self.preset}-seed{self.seed}"
        return self.out or Path("runs") / name

    def resolved(self) -> TrainConfig:
        """With ``hardness`` turned into ``beta``, checked."""
        config = self
        if self.hardness is not None:
            config = dataclasses.replace(self, beta=self.hardness * self.temperature, hardness=None)
        config.validate()
        return config

    def validate(self) -> None:
        """Raise :class:`ConfigError` that names every wrong value and contradiction."""
        wrong = [*_out_of_range(self), *_contradictions(self)]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def to_yaml(self) -> str:
        """All options as YAML, in the order of the fields."""
        plain = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        return str(yaml.safe_dump(plain, sort_keys=False, default_flow_style=None))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# ---- rules --------------------------------------------------------------------------------------

_POSITIVE = (
    "temperature lr k1 k2 min_samples classes_per_batch images_per_class accumulate iterations "
    "epochs eval_batch lr_step lr_gamma patience"
)
_NOT_NEGATIVE = (
    "cache_gb workers seed samples_per_bn k1_own eps_gap prototype_weight instance_weight kappa "
    "beta warmup_epochs pad weight_decay lr_warmup eval_every checkpoint_minutes "
    "checkpoint_iterations"
)
_SHARES = "momentum flip erase color_jitter"


def _out_of_range(c: TrainConfig) -> Iterable[str]:
    for name in _POSITIVE.split():
        if not getattr(c, name) > 0:
            yield f"{name}: must be greater than 0 (got {getattr(c, name)})"
    for name in _NOT_NEGATIVE.split():
        if not getattr(c, name) >= 0:
            yield f"{name}: must be at least 0 (got {getattr(c, name)})"
    for name in _SHARES.split():
        if not 0 <= getattr(c, name) <= 1:
            yield f"{name}: must be in [0, 1] (got {getattr(c, name)})"
    if not 0 < c.eps < 1:
        yield f"eps: must be between 0 and 1 (got {c.eps})"
    if c.images_per_class * c.classes_per_batch < 2:
        yield "classes_per_batch, images_per_class: a batch must have at least 2 images"


def _contradictions(c: TrainConfig) -> Iterable[str]:
    clusters = c.memory == "clusters"
    looks_around = c.self_paced or c.suspects != "off"
    rules = {
        "samples_per_bn and camera_bn: statistics are per chunk or per camera, choose one": (
            c.samples_per_bn and c.camera_bn
        ),
        "pattern and data: a pattern is for data: folder": c.pattern and c.data != "folder",
        "memory and cluster_on: a memory of clusters needs cluster_on: extracted": (
            clusters and c.cluster_on == "bank"
        ),
        "memory and instance_weight: a memory of clusters has no instances, so the instance "
        f"weight must be 0 (got {c.instance_weight})": clusters and c.instance_weight,
        "memory and suspects: suspects need a memory of instances": (
            clusters and c.suspects != "off"
        ),
        "update and memory: hard updates need a memory of clusters": (
            c.update == "hard" and not clusters
        ),
        "outliers and memory: outliers can be dropped from a memory of clusters only": (
            c.outliers == "drop" and not clusters
        ),
        f"k2 and k1: k2 must be at most k1 (got {c.k2} and {c.k1})": c.k2 > c.k1,
        f"k1_own and k1: k1_own must be at most k1 (got {c.k1_own} and {c.k1})": c.k1_own > c.k1,
        "prototype_weight and instance_weight: must not both be 0": (
            not c.prototype_weight and not c.instance_weight
        ),
        f"suspects and kappa: suspects: kappa sets kappa itself (got kappa {c.kappa} too)": (
            c.suspects == "kappa" and c.kappa
        ),
        f"eps and eps_gap: {c.eps} -/+ {c.eps_gap} must lie between 0 and 1": (
            looks_around and not 0 < c.eps - c.eps_gap <= c.eps + c.eps_gap < 1
        ),
        f"iterations and accumulate: {c.iterations} batches must make whole steps of "
        f"{c.accumulate}": c.accumulate > 0 and c.iterations % c.accumulate,
        "precision and device: fp16 needs a GPU": c.precision == "fp16" and c.device == "cpu",
    }
    return [rule for rule, broken in rules.items() if broken]


# ---- presets ------------------------------------------------------------------------------------

PRESETS: dict[str, dict[str, Any]] = {
    "dhcl": {},
    # Every part of the loss (docs/method.md); docs/results.md says why they are not the default.
    "dhcl-hnm": {
        "instance_weight": 0.25,
        "kappa": 0.25,
        "beta": 0.1,
    },
    # Ge et al., NeurIPS 2020.
    "spcl": {
        "self_paced": True,
        "warmup_epochs": 0,
    },
    # Dai et al., ACCV 2022.
    "cluster-contrast": {
        "memory": "clusters",
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


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The options with some of them changed; of beta and hardness the one named here counts.

    Values may be given as YAML has them: paths and numbers as text, pairs as lists.

    Raises:
        ConfigError: no such option, or values of a wrong type, each of which is named.
    """
    names = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in names:
            raise ConfigError(f"option: {_unknown(name, names)}")
    changes = dict(changes)
    if "beta" in changes and changes.get("hardness") is not None:
        raise ConfigError(
            "beta and hardness: hardness is beta / temperature, give one of them "
            f"(got {changes['beta']} and {changes['hardness']})"
        )
    if "beta" in changes:
        changes["hardness"] = None
    try:
        return _types().validate_python({**dataclasses.asdict(config), **changes})
    except ValidationError as error:
        raise ConfigError("\n".join(map(_sentence, error.errors()))) from error


@functools.cache
def _types() -> TypeAdapter[TrainConfig]:
    return TypeAdapter(TrainConfig)


def _sentence(error: Mapping[str, Any]) -> str:
    """What the validation says of one value, in the words of this module."""
    said = re.sub(r"^\w+ should ", "must ", error["msg"])  # "Input should be", "Tuple should have"
    return f"{error['loc'][0]}: {said} (got {error['input']})"


# ---- files --------------------------------------------------------------------------------------


def read_options(path: Path) -> dict[str, Any]:
    """What a YAML file says, by option.

    Raises:
        ConfigError: no file that can be read, or not one of options.
    """
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"config: {path} can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold `option: value` lines")
    return content


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """The options with those in a YAML file.

    Args:
        path: the file.
        base: the options where the file says nothing; by default those of the preset ``dhcl``.

    Raises:
        ConfigError: no such file, or wrong options in it; it names the file and the option.
    """
    content = read_options(path)
    try:
        return with_changes(base or TrainConfig(), content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_run(run: Path) -> TrainConfig:
    """The options of a run.

    Raises:
        ConfigError: no such folder, or one without ``config.yaml``.
    """
    if not run.is_dir():
        what = "a file" if run.exists() else "nothing"
        raise ConfigError(f"run: must be the folder of a run (got {what} at {show(run)})")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run: {show(run)} is not the folder of a run, it has no config.yaml")
    return load_config(run / "config.yaml")


# What may differ when a run goes on: nothing that decides a bit of the result.
_FREE = (
    "root workers cache_gb epochs eval_every rerank report checkpoint_minutes checkpoint_iterations"
)


def check_resumed(began: TrainConfig, now: TrainConfig) -> None:
    """Refuse to go on with a run under options that would give another result.

    Args:
        began: the run's options.
        now: those to go on with.

    Raises:
        ConfigError: the name of an option that may not change, with both values.
    """
    for field in dataclasses.fields(now):
        old, new = getattr(began, field.name), getattr(now, field.name)
        if old != new and field.name not in _FREE.split():
            raise ConfigError(
                f"{field.name} and resume: a run goes on with the options it began with "
                f"(got {new}, was {old}); what may change: {_FREE}"
            )
    if now.epochs != began.epochs and now.schedule == "cosine":
        raise ConfigError("epochs and resume: a cosine schedule depends on the epochs")


# ---- words --------------------------------------------------------------------------------------


def _unknown(name: str, names: Iterable[str]) -> str:
    return f"there is none called {str(name)!r}{did_you_mean(name, names)}"
