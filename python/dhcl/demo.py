"""``dhcl demo``: pedestrians are drawn, and a network learns to find them again without labels.

With ``compare``, every preset and an ablation train on them: with the same data, model, batches,
learning rate and number of epochs. Nothing is chosen by test scores: the last epoch counts.

What trains is imported when it is called, so that the help of the command comes at once.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dhcl.config import ConfigError, TrainConfig, flat_options, preset, read_run, with_changes
from dhcl.files import write_atomic
from dhcl.metrics import RANKS
from dhcl.stored import read_json
from dhcl.synth.progress import draw_once, refuse_others
from dhcl.words import duration, first_line, show

if TYPE_CHECKING:
    from dhcl.training.runs import Trained

__all__ = ["METHODS", "Demo", "called_as", "run_demo"]

_UNTRAINED = "untrained"

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "spcl": ("spcl", {}),
    "cluster-contrast": ("cluster-contrast", {}),
    "dhcl": ("dhcl", {}),
    "dhcl, prototypes alone": ("dhcl", {"instance_weight": 0.0}),
    "dhcl, hard negatives": ("dhcl", {"beta": 0.1}),
    "dhcl-hnm": ("dhcl-hnm", {}),
}
"""Rows of the table after the untrained network: preset and what is changed of it."""

# The same for every method: a small network from scratch, its batches and its augmentation.
_COMMON: dict[str, Any] = {
    "data": "market1501",
    "backbone": "small",
    "camera_bn": True,
    "calibrate": "epoch",
    "cluster_on": "extracted",
    "k1": 20,
    "eps": 0.45,
    "classes_per_batch": 16,
    "images_per_class": 4,
    "lr": 7e-4,
    "pad": 3,
    "erase": 0.2,
    "workers": 0,
    "cache_gb": 0.25,
    "rerank": False,
    "report": False,
    "checkpoint_minutes": 0.0,
    "device": "cpu",
}


# Epochs of the one training, which is to be done in minutes, and of each of a comparison.
_EPOCHS, _EPOCHS_COMPARED = 12, 18
# Seconds on two cores of an EPYC, for the expectations that are printed: of a batch of training,
# and of an image that is drawn, or looked at.
_BATCH_SECONDS, _IMAGE_SECONDS = 0.45, 0.006


@dataclass(frozen=True)
class Demo:
    """Draw pedestrians, train on them without labels, and show what was learned, in minutes."""

    out: Path = Path("dhcl-demo")
    """Folder for the data, the runs and what is made of them; a demo that was stopped goes on."""
    compare: bool = False
    """Whether to train every preset and an ablation on the same data, and compare them."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; several go with --compare, and the table has mean and spread."""
    ids: int = 64
    """Number of pedestrians; half of them are for testing."""
    cameras: int = 3
    """Number of cameras that see them."""
    images_per_camera: int = 12
    """Mean number of images of a pedestrian in a camera."""
    camera_gap: float = 0.1
    """How much cameras differ, from 0 to 1; the more, the longer it takes to learn across them."""
    image_size: tuple[int, int] = (64, 32)
    """Height and width of the images, in pixels."""
    epochs: int | None = None
    """Number of epochs of each training; 12 by default, and 18 with --compare."""
    iterations: int = 20
    """Number of batches in an epoch."""
    data_seed: int = 1
    """Seed of the pedestrians. The options of the trainings were tried out on those of seed 0."""

    @property
    def rounds(self) -> int:
        """Epochs of each training."""
        if self.epochs is not None:
            return self.epochs
        return _EPOCHS_COMPARED if self.compare else _EPOCHS

    @property
    def root(self) -> Path:
        """Folder of the pedestrians."""
        return self.out / "data"


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run it; the table is printed and written to ``results.md`` and ``results.json``.

    Returns:
        What is in ``results.json``: of each row a list of metrics, one per seed.

    Raises:
        ConfigError: no seeds, several without a comparison, or an earlier run of other options.
    """
    if not demo.seeds:
        raise ConfigError("seeds: at least one is needed (got none)")
    if len(demo.seeds) > 1 and not demo.compare:
        raise ConfigError(f"seeds: several are for --compare (got {_words(demo.seeds)})")
    return _compare(demo) if demo.compare else _show(demo)


# ---- one method ---------------------------------------------------------------------------------


def _show(demo: Demo) -> dict[str, Any]:
    """Untrained scores, a training, its scores, its report, and what to try next."""
    from dhcl_ops import status

    began = time.monotonic()
    config = _options(demo, "dhcl", demo.seeds[0])
    training = demo.rounds * demo.iterations * _BATCH_SECONDS
    looking = demo.ids * demo.cameras * demo.images_per_camera * _IMAGE_SECONDS
    tqdm.write(
        "People are drawn, and a network learns to find them again in other cameras, without any "
        f"labels: about {duration(15 + 3 * looking + training)} on two cores, and a minute more "
        "where the ops are not compiled yet."
    )
    _stage(1, "the ops, compiled for this machine once")
    chosen = status()
    if chosen.how != "reference":  # which says so by itself
        tqdm.write(chosen.line)
    _stage(2, f"{demo.ids} people in {demo.cameras} cameras, drawn in about {duration(looking)}")
    _draw_once(demo)
    _stage(3, f"how well the untrained network finds them, in about {duration(looking)}")
    rows = {_UNTRAINED: [_untrained(config)]}
    tqdm.write(_scores(rows[_UNTRAINED][0]))
    _stage(4, f"{demo.rounds} epochs of training, in about {duration(training)}")
    trained = _train(config)
    rows["dhcl"] = [_last(config)]
    tqdm.write(_scores(rows["dhcl"][0]))
    _stage(5, f"the report, in about {duration(looking)}")
    page = _report(config, trained, demo.out / "report.html")
    results = _write_results(demo, rows, began)
    look = f"Look at it in a browser: {show(page)}\n" if page else ""
    tqdm.write(f"\n{look}Try next:\n{_next_commands(demo, config.run)}")
    return results


def _stage(number: int, what: str) -> None:
    tqdm.write(f"\n[{number}/5] {what}")


def _scores(metrics: dict[str, Any]) -> str:
    return f"mAP {metrics['mAP']:.1%}, rank-1 {metrics['rank1']:.1%}"


def _report(config: TrainConfig, trained: Trained | None, out: Path) -> Path | None:
    """The report's file, or one line why there is none; of the training, or of its folder."""
    from dhcl.report import write_report
    from dhcl.training.record import read_record
    from dhcl.training.results import collect, results_of

    try:
        results = results_of(trained) if trained else collect(read_record(config.run))
        return write_report(results, out=out)
    except Exception as error:
        tqdm.write(f"warning: no report: {first_line(error)}")
        return None


def _next_commands(demo: Demo, run: Path) -> str:
    """Commands that go on with the run, as they are typed here."""
    gallery, queries = demo.root / "bounding_box_test", demo.root / "query"
    index, found = demo.out / "index", demo.out / "found.html"
    # Identity and camera are in the names: 0034_c1s1_000042_00.jpg.
    where = ["--pattern", r"(?P<id>-?\d+)_c(?P<camera>\d+)", "--trained-cameras"]
    commands = [
        ["report", run, "--queries", "20", "--out", demo.out / "longer.html"],
        ["index", gallery, "--run", run, "--out", index, *where],
        ["search", index, queries, "--topk", "10", "--other-cameras", "--html", found],
        ["demo", "--compare", "--out", demo.out],
    ]
    return "\n".join(f"  {called_as()} {_words(words)}" for words in commands)


def _words(words: Iterable[object]) -> str:
    """Words as a shell takes them."""
    return shlex.join(map(str, words))


def called_as() -> str:
    """What this program was called by, so that a printed command works where it was called."""
    called = Path(sys.argv[0])
    if called.name != "dhcl" or not called.is_file():
        return f"{shlex.quote(sys.executable)} -m dhcl"
    found = shutil.which("dhcl")
    return "dhcl" if found and called.samefile(found) else shlex.quote(sys.argv[0])


# ---- all methods --------------------------------------------------------------------------------


def _compare(demo: Demo) -> dict[str, Any]:
    """Every method with every seed, a table, a report of the default and one page of all runs."""
    began = time.monotonic()
    _draw_once(demo)
    rows: dict[str, list[dict[str, Any]]] = {}
    total, done = (len(METHODS) + 1) * len(demo.seeds), 0
    training = time.monotonic()
    for seed in demo.seeds:
        for name in (_UNTRAINED, *METHODS):
            done += 1
            left = ""
            if done > 2:
                # The untrained network takes no time to speak of.
                each = (time.monotonic() - training) / (done - 2)
                left = f", about {duration(each * (total - done + 1))} left"
            tqdm.write(f"\n[{done}/{total}] {name}, seed {seed}{left}")
            config = _options(demo, name, seed)
            if name == _UNTRAINED:
                metrics = _untrained(config)
            else:
                _train(config)
                metrics = _last(config)
            rows.setdefault(name, []).append(metrics)
            tqdm.write(_scores(metrics))
    results = _write_results(demo, rows, began)
    _write_pages(demo)
    return results


def _write_pages(demo: Demo) -> None:
    """A report of the default method and a comparison of all runs, or one line why not."""
    from dhcl.report import write_comparison
    from dhcl.training.record import read_record
    from dhcl.training.results import Results

    configs = {(n, s): _options(demo, n, s) for s in demo.seeds for n in METHODS}
    one = configs["dhcl", demo.seeds[0]]
    report = _report(one, None, demo.out / "report.html")
    if report is None:
        return
    tqdm.write(f"\nreport of {one.run.name}: {show(report)}")
    # Similarities of every run take as long as evaluating each again.
    runs = (Results(read_record(config.run)) for config in configs.values())
    try:
        page = write_comparison(runs, out=demo.out / "compare.html", retrieval=False)
    except Exception as error:
        tqdm.write(f"warning: no comparison: {first_line(error)}")
    else:
        tqdm.write(f"all runs compared: {show(page)}")


# ---- parts of both ------------------------------------------------------------------------------


def _draw_once(demo: Demo) -> None:
    """The pedestrians and their picture, unless they are there from a demo that was stopped."""
    wanted = {
        "ids": demo.ids,
        "cameras": demo.cameras,
        "images_per_camera": demo.images_per_camera,
        "image_size": list(demo.image_size),
        "camera_gap": demo.camera_gap,
        "seed": demo.data_seed,
    }
    sheet = demo.out / "people.png"
    draw_once(demo.root, sheet=sheet, workers=os.cpu_count() or 1, **wanted)


def _options(demo: Demo, name: str, seed: int) -> TrainConfig:
    base, changes = METHODS.get(name, ("dhcl", {}))
    folder = demo.out / f"seed{seed}"
    if demo.compare:
        folder = demo.out / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    common = {
        **_COMMON,
        "root": demo.root,
        "out": folder,
        # A look along the way, for a curve in the report.
        "eval_every": 0 if demo.compare else 3,
        "seed": seed,
        "image_size": demo.image_size,
        "epochs": demo.rounds,
        "iterations": demo.iterations,
        "lr_step": max(demo.rounds * 3 // 4, 1),
    }
    if preset(base).loss.warmup_epochs:
        common["warmup_epochs"] = demo.rounds // 4
    return with_changes(preset(base), {**common, **changes}).resolved()


def _train(config: TrainConfig) -> Trained | None:
    """Train, or go on; None if the run is finished already."""
    from dhcl.training.runs import train

    file = config.run / "config.yaml"
    if file.exists():
        # The folder may have been moved since.
        wanted = {k: v for k, v in flat_options(config).items() if k not in ("root", "out")}
        refuse_others(config.run, flat_options(read_run(config.run)), wanted)
    if (config.run / "metrics.json").exists():
        return None
    return train(config, resume=file.exists(), quiet=True)


def _last(config: TrainConfig) -> dict[str, Any]:
    """Metrics of the last epoch of a finished run."""
    file = config.run / "metrics.json"
    try:
        metrics: dict[str, Any] = dict(read_json(file)["last"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"demo: {show(file)} must hold the metrics of a finished run ({first_line(error)}); "
            "remove its folder to train anew"
        ) from error
    return metrics


def _untrained(config: TrainConfig) -> dict[str, Any]:
    """The network as every method finds it, with batch-norm statistics of the training images."""
    from dhcl.training.engine import Engine
    from dhcl.training.evaluation import Evaluator
    from dhcl.training.network import make_model
    from dhcl.training.runs import open_data
    from dhcl.training.trainer import Trainer

    engine = Engine(config)
    data = open_data(config.data, engine, quiet=True)
    model = make_model(config.model, data.train.num_cameras, config.seed)
    trainer = Trainer(config, engine, model, data.unlabeled, log=False)
    trainer.calibrate()
    return Evaluator(engine, data, model)(model)


def _write_results(
    demo: Demo, rows: dict[str, list[dict[str, Any]]], began: float
) -> dict[str, Any]:
    """Print and write the table; what is in ``results.json``."""
    spent = time.monotonic() - began
    results = {
        "rows": rows,
        "seeds": list(demo.seeds),
        "minutes": spent / 60,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}",
    }
    text = _table(demo, rows)
    write_atomic(demo.out / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(demo.out / "results.md", (text + "\n").encode())
    tqdm.write(f"\n{text}\n\nIn {duration(spent)}; also in {show(demo.out / 'results.md')}")
    return results


def _table(demo: Demo, rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean, and with several seeds the standard deviation, in percent."""
    columns = {"mAP": "mAP", **{f"rank{k}": f"rank-{k}" for k in RANKS}, "mINP": "mINP"}

    def cell(values: list[float]) -> str:
        mean = f"{100 * statistics.fmean(values):.1f}"
        return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean

    lines = [
        f"| method | {' | '.join(columns.values())} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, metrics in rows.items():
        cells = [cell([each[column] for each in metrics]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, demo.seeds))
    note = (
        f"Last epoch of {demo.rounds} x {demo.iterations} batches of 64, small network from "
        f"scratch at {demo.image_size[0]} x {demo.image_size[1]}, {demo.ids} drawn people (half "
        f"for testing), {demo.cameras} cameras; seeds {seeds}. What is clustered are "
        "features extracted anew, as a memory is stale after so few steps."
    )
    return "\n".join([*lines, "", note])
