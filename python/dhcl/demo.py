"""``dhcl demo``: pedestrians are drawn, every preset and an ablation train on them, and compared.

All trainings have the same data, model, batches, learning rate and number of epochs. Nothing is
chosen by test scores: the last epoch counts. What trains is imported when it is called, so that the
help of the command comes at once.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dhcl.config import ConfigError, TrainConfig, preset, with_changes
from dhcl.files import write_atomic
from dhcl.metrics import RANKS
from dhcl.synth.progress import draw
from dhcl.words import duration, first_line

__all__ = ["METHODS", "Demo", "run_demo"]

_UNTRAINED = "untrained"

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "spcl": ("spcl", {}),
    "cluster-contrast": ("cluster-contrast", {}),
    "dhcl": ("dhcl", {}),
    "dhcl, debiased": ("dhcl", {"kappa": 0.25}),
    "dhcl, hard negatives": ("dhcl", {"beta": 0.1}),
    "dhcl, both": ("dhcl", {"kappa": 0.25, "beta": 0.1}),
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
    "eval_every": 0,
    "rerank": False,
    "report": False,
    "checkpoint_minutes": 0.0,
    "device": "cpu",
}


@dataclass(frozen=True)
class Demo:
    """Draw pedestrians, train on them without labels, and compare methods in a table."""

    out: Path = Path("dhcl-demo")
    """Folder for the data, the runs and the table; a demo that was stopped goes on there."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; with several, the table has mean and spread."""
    ids: int = 64
    """Pedestrians; half of them are for testing."""
    cameras: int = 3
    """Cameras."""
    images_per_camera: int = 12
    """Mean number of images of a pedestrian in a camera."""
    camera_gap: float = 0.1
    """How much cameras differ, from 0 to 1; the more, the longer it takes to learn across them."""
    image_size: tuple[int, int] = (64, 32)
    """Height and width of the images."""
    epochs: int = 18
    """Epochs of each training."""
    iterations: int = 20
    """Batches of an epoch."""
    data_seed: int = 1
    """Seed of the pedestrians. The options of the trainings were tried out on those of seed 0."""


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run it; the table is printed and written to ``results.md`` and ``results.json``.

    Returns:
        What is in ``results.json``: of each row a list of metrics, one per seed.
    """
    if not demo.seeds:
        raise ConfigError("seeds: at least one is needed (got none)")
    began = time.monotonic()
    root = demo.out / "data"
    if not root.exists():
        sheet = demo.out / "people.png"
        drawn = draw(
            root,
            sheet=sheet,
            ids=demo.ids,
            cameras=demo.cameras,
            images_per_camera=demo.images_per_camera,
            image_size=demo.image_size,
            camera_gap=demo.camera_gap,
            seed=demo.data_seed,
            workers=os.cpu_count() or 1,
        )
        tqdm.write(f"drawn: {drawn.train_images} images of {drawn.train_ids} people; see {sheet}")
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
            metrics = _one(demo, root, name, seed)
            rows.setdefault(name, []).append(metrics)
            tqdm.write(f"mAP {metrics['mAP']:.1%}, rank-1 {metrics['rank1']:.1%}")
    results = {
        "rows": rows,
        "seeds": list(demo.seeds),
        "minutes": (time.monotonic() - began) / 60,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}",
    }
    text = _table(demo, rows)
    spent = duration(time.monotonic() - began)
    write_atomic(demo.out / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(demo.out / "results.md", (text + "\n").encode())
    tqdm.write(f"\n{text}\n\nIn {spent}; also in {demo.out / 'results.md'}")
    _write_pages(demo, root)
    return results


def _write_pages(demo: Demo, root: Path) -> None:
    """A report of the default method and a comparison of all runs, or one line why not."""
    from dhcl.report import write_comparison, write_report
    from dhcl.training.record import read_record
    from dhcl.training.results import Results, collect

    runs = {(n, s): _options(demo, root, n, s).run for s in demo.seeds for n in METHODS}
    one = runs["dhcl", demo.seeds[0]]
    try:
        report = write_report(collect(read_record(one)), out=demo.out / "report.html")
        # Similarities of every run take as long as evaluating each again.
        all_of_them = (Results(read_record(run)) for run in runs.values())
        page = write_comparison(all_of_them, out=demo.out / "compare.html", retrieval=False)
    except Exception as error:
        tqdm.write(f"warning: no report: {first_line(error)}")
    else:
        tqdm.write(f"\nreport of {one.name}: {report}\nall runs compared: {page}")


def _options(demo: Demo, root: Path, name: str, seed: int) -> TrainConfig:
    base, changes = METHODS.get(name, ("dhcl", {}))
    folder = name.replace(", ", "-").replace(" ", "-")
    common = {
        **_COMMON,
        "root": root,
        "out": demo.out / "runs" / f"{folder}-seed{seed}",
        "seed": seed,
        "image_size": demo.image_size,
        "epochs": demo.epochs,
        "iterations": demo.iterations,
        "lr_step": max(demo.epochs * 3 // 4, 1),
    }
    if preset(base).loss.warmup_epochs:
        common["warmup_epochs"] = demo.epochs // 4
    return with_changes(preset(base), {**common, **changes}).resolved()


def _one(demo: Demo, root: Path, name: str, seed: int) -> dict[str, Any]:
    """Metrics of one row: of the last epoch, or of a run that is finished already."""
    from dhcl.training.runs import train

    config = _options(demo, root, name, seed)
    if name == _UNTRAINED:
        return _untrained(config)
    finished = config.run / "metrics.json"
    if finished.exists():
        metrics: dict[str, Any] = json.loads(finished.read_text())["last"]
        return metrics
    resume = (config.run / "config.yaml").exists()
    last: dict[str, Any] = train(config, resume=resume, quiet=True).metrics["last"]
    return last


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
        f"Last epoch of {demo.epochs} x {demo.iterations} batches of 64, small network from "
        f"scratch at {demo.image_size[0]} x {demo.image_size[1]}, {demo.ids} drawn people (half "
        f"for testing), {demo.cameras} cameras; seeds {seeds}. Every method clusters features "
        "extracted anew, as a memory is stale after so few steps."
    )
    return "\n".join([*lines, "", note])
