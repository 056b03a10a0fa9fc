"""What the commands of ``dhcl`` take and do; needs the extra ``train``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from dhcl.cli.report import compare, report
from dhcl.cli.services import SERVICES
from dhcl.config import (
    ConfigError,
    TrainConfig,
    check_resumed,
    flat_options,
    load_config,
    preset,
    read_options,
    with_changes,
)
from dhcl.demo import Demo, run_demo
from dhcl.pretrain import Pretrain, pretrain
from dhcl.report import report_training
from dhcl.synth import contact_sheet, render_dataset
from dhcl.training.engine import Interrupted
from dhcl.training.runs import evaluate_run, train

__all__ = ["COMMANDS", "train_options"]

# ---- train --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _First:
    """What decides the defaults of all others."""

    config: Path | None = None
    resume: Path | None = None
    preset: str | None = None


@dataclass(frozen=True)
class _TrainArguments:
    """Train a model on images without labels."""

    config: Path | None = None
    """YAML file with options; the command line goes before it."""
    resume: Path | None = None
    """Folder of a run to go on with, bit for bit."""
    # Without a name, so that the help's headings are those of the sections.
    options: Annotated[tyro.conf.OmitArgPrefixes[TrainConfig], tyro.conf.arg(name="")] = (
        dataclasses.field(default_factory=TrainConfig)
    )


def _train(arguments: list[str]) -> None:
    config, resume = train_options(arguments)
    try:
        trained = train(config, resume=resume)
    except (Interrupted, KeyboardInterrupt, OSError, RuntimeError):
        if os.environ.get("RANK", "0") == "0" and (config.run / "config.yaml").exists():
            there = (config.run / "checkpoints" / "last.pt").exists()
            what = "go on from the last checkpoint" if there else "no checkpoint yet; start again"
            print(f"dhcl: {what} with: dhcl train --resume {config.run}", file=sys.stderr)
        raise
    report_training(trained)


def train_options(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """Options from preset, file and command line, and whether a run is to go on."""
    first, _ = tyro.cli(_First, args=arguments, return_unknown_args=True, add_help=False)
    if first.resume is not None:
        if first.config is not None:
            raise ConfigError("config and resume: a run goes on with the options it began with")
        began = dataclasses.replace(load_config(first.resume / "config.yaml"), out=first.resume)
        config = _parse(began, arguments)
        check_resumed(began, config)
        return config.resolved(), True
    chosen = first.preset
    if chosen is None and first.config is not None:
        chosen = read_options(first.config).get("preset")
    base = preset(chosen or "dhcl")
    if first.config is not None:
        base = load_config(first.config, base)
    return _parse(base, arguments).resolved(), False


def _parse(base: TrainConfig, arguments: list[str]) -> TrainConfig:
    """The options with those on a command line, which tyro reads and checks."""
    default = _TrainArguments(options=base)
    parsed = tyro.cli(_TrainArguments, prog="dhcl train", default=default, args=arguments)
    before = flat_options(base)
    given = flat_options(parsed.options)
    return with_changes(base, {k: v for k, v in given.items() if v != before[k]})


# ---- eval, synth, demo --------------------------------------------------------------------------


@dataclass(frozen=True)
class _EvalArguments:
    """Evaluate the model of a run: mAP, CMC, mINP."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: str | None = None
    """Another data set than the run's."""
    root: Path | None = None
    """Where it lies."""
    pattern: str | None = None
    """For a folder, as in training."""
    which: Literal["last", "best"] = "last"
    """The last epoch's model, or the one that looked best by test mAP."""
    rerank: bool = False
    """With k-reciprocal re-ranking too."""
    workers: int = 4
    """Processes that load images."""


def _eval(arguments: list[str]) -> None:
    given = tyro.cli(_EvalArguments, prog="dhcl eval", args=arguments)
    config = load_config(given.run / "config.yaml")
    own = given.data is None and given.root is None
    changes: dict[str, Any] = {"rerank": given.rerank, "workers": given.workers}
    if given.data is not None:
        changes.update(data=given.data, pattern=None)
    if given.root is not None:
        changes["root"] = given.root
    if given.pattern is not None:
        changes["pattern"] = given.pattern
    config = with_changes(config, changes)
    config.validate()
    evaluate_run(config, given.run, which=given.which, same_data=own)


@dataclass(frozen=True)
class _SynthArguments:
    """Draw pedestrians in several cameras: a data set in Market-1501's layout."""

    out: tyro.conf.Positional[Path]
    """Folder to make."""
    ids: int = 200
    """Pedestrians; half of them are for testing."""
    cameras: int = 4
    """Cameras, each with its colours, light, background, blur and viewpoint."""
    images_per_camera: int = 4
    """Mean number of images of a pedestrian in a camera."""
    image_size: tuple[int, int] = (128, 64)
    """Height and width in pixels."""
    camera_gap: float = 1.0
    """How much cameras differ in colour, contrast, sharpness and viewpoint, from 0 to 1."""
    seed: int = 0
    """The same seed gives the same pictures."""
    junk: int | None = None
    """Boxes that miss most of a person, in the gallery."""
    distractors: int | None = None
    """Other people and empty boxes, in the gallery."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    overwrite: bool = False
    """Replace an earlier output."""
    sheet: Path | None = None
    """Also write a contact sheet, a PNG."""


def _synth(arguments: list[str]) -> None:
    given = tyro.cli(_SynthArguments, prog="dhcl synth", args=arguments)
    options = dataclasses.asdict(given)
    out, sheet = options.pop("out"), options.pop("sheet")
    with tqdm(desc="drawing pedestrians", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            summary = render_dataset(out, progress=show, **options)
        except (TypeError, ValueError, FileExistsError) as error:
            raise ConfigError(str(error)) from error
    if sheet is not None:
        contact_sheet(out / "bounding_box_train", sheet)
    print(
        f"{out}: {summary.train_images} images of {summary.train_ids} people to train on, "
        f"{summary.query_images} queries, {summary.gallery_images} in the gallery\n"
        f"train on it: dhcl train --data market1501 --root {out} --backbone small "
        f"--image-size 64 32 --camera-bn"
    )


def _demo(arguments: list[str]) -> None:
    run_demo(tyro.cli(Demo, prog="dhcl demo", args=arguments))


def _pretrain(arguments: list[str]) -> None:
    pretrain(tyro.cli(Pretrain, prog="dhcl pretrain", args=arguments))


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "train": _train,
    "eval": _eval,
    "synth": _synth,
    "demo": _demo,
    "pretrain": _pretrain,
    **SERVICES,
    "report": report,
    "compare": compare,
}
