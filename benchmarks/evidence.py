"""Paired trainings, and the table that docs/results.md makes claims with.

    python -m benchmarks.evidence --out FOLDER --plan                # what there is to do, how long
    python -m benchmarks.evidence --out FOLDER --photographs PHOTOS  # do it, or go on with it
    python -m benchmarks.evidence --out FOLDER --write               # docs/results.md, its figures

A file of runs (:data:`PLAN`, or the first argument) names beds, settings, seeds and comparisons. A
run is a training on one bed with one setting and one seed; its figures are of the last epoch.
Settings are compared pair by pair, with the same bed and seed. All of it lies in ``--out``: a run
that is there is not made again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from dhcl.config import TrainConfig, check_resumed, preset, read_run, with_changes
from dhcl.errors import DHCLError, Interrupted
from dhcl.files import write_atomic
from dhcl.pretrain import Pretrain, pretrain
from dhcl.words import duration, first_line, show
from pydantic import TypeAdapter, ValidationError

from benchmarks.beds import Bed, root_of
from benchmarks.evidence_table import between_markers, results_of, section

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "benchmarks" / "evidence.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "evidence.json"
PAGE = ROOT / "docs" / "results.md"
IMAGENET = "imagenet"
Task = functools.partial[None]


@dataclass(frozen=True)
class Plan:
    """The file of runs."""

    beds: dict[str, Bed]
    settings: dict[str, dict[str, Any]]
    """What each setting changes of the bed's options, in the names of ``dhcl train``."""
    seeds: tuple[int, ...]
    comparisons: tuple[tuple[str, str], ...] = ()
    """Pairs of settings: the first is compared with the second."""
    starts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of ``dhcl pretrain`` for what beds start from; its seed is the run's."""

    def check(self) -> None:
        """Raise :class:`DHCLError` for names that stand for nothing."""
        for name, bed in self.beds.items():
            bed.check(name)
            if bed.start not in (None, IMAGENET) and bed.start not in self.starts:
                raise DHCLError(f"beds: {name} starts from {bed.start!r}, which is not in starts")
        for pair in self.comparisons:
            for name in pair:
                if name not in self.settings:
                    raise DHCLError(f"comparisons: {name!r} is not in settings")


@dataclass(frozen=True)
class Run:
    """A training that the plan asks for."""

    bed: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """Bed, setting and seed, as the folder of the run is called."""
        return "/".join((slug(self.bed), f"{slug(self.setting)}-seed{self.seed}"))


def slug(name: str) -> str:
    """A name as a folder has it."""
    return name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Work:
    """What a process needs to know to make a run."""

    plan: Plan
    out: Path
    photographs: Path | None
    threads: int
    imagenet: Path | None = None  # weights of benchmarks.imagenet, for beds that start from them

    def folder(self, run: Run) -> Path:
        """Where a run lies."""
        return self.out / "runs" / run.name

    def start(self, bed: Bed, seed: int) -> Path | None:
        """Where the training that a bed starts from lies."""
        if bed.start is None or bed.start == IMAGENET:
            return None
        return self.out / "starts" / f"{slug(bed.start)}-seed{seed}"

    def config(self, run: Run, root: Path | None) -> TrainConfig:
        """The options of a run whose images lie there."""
        bed, setting = self.plan.beds[run.bed], self.plan.settings[run.setting]
        start = self.start(bed, run.seed)
        common: dict[str, Any] = {
            "data": "market1501",
            "workers": 0,
            "cache_gb": 1.0,
            "eval_every": 0,
            "report": False,
        }
        if bed.start == IMAGENET:
            common["weights"] = self.imagenet
        if start is not None:
            common["weights"] = start / "checkpoints" / "last.pt"
        changes = {**common, **bed.options, **setting}
        changes |= {"root": root, "out": self.folder(run), "seed": run.seed}
        return with_changes(preset(str(changes.get("preset", "dhcl"))), changes).resolved()


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; raises :class:`DHCLError` naming what is wrong with it."""
    try:
        plan = TypeAdapter(Plan).validate_python(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise DHCLError(f"{show(path)}: {error}") from error
    plan.check()
    return plan


def runs_of(plan: Plan, only: Sequence[str]) -> list[Run]:
    """Every run, pairs close to each other, so that a part of them can be compared already."""
    every = [
        Run(bed, setting, seed)
        for seed in plan.seeds
        for bed in plan.beds
        for setting in plan.settings
    ]
    return [run for run in every if not only or any(word in run.name for word in only)]


# ---- making runs --------------------------------------------------------------------------------


def is_done(folder: Path) -> bool:
    """Whether a training has its results."""
    return (folder / "metrics.json").exists()


def timed(folder: Path, what: Callable[[], object]) -> None:
    """Do it, and add the seconds of this process and of the clock to those of the folder."""
    began = time.process_time(), time.monotonic()
    file = folder / "cost.json"
    try:
        what()
    finally:
        spent = json.loads(file.read_text()) if file.exists() else {"cpu": 0.0, "clock": 0.0}
        spent["cpu"] += time.process_time() - began[0]
        spent["clock"] += time.monotonic() - began[1]
        if folder.exists():
            write_atomic(file, json.dumps(spent).encode())


def make_start(work: Work, name: str, seed: int) -> None:
    """Train what beds start from, or go on with it."""
    folder = work.out / "starts" / f"{slug(name)}-seed{seed}"
    options = {"workers": 0, **work.plan.starts[name], "out": folder, "seed": seed}
    given = TypeAdapter(Pretrain).validate_python(options)
    torch.set_num_threads(work.threads)
    timed(folder, lambda: pretrain(given))


def make_run(work: Work, run: Run) -> None:
    """Train with one setting, or go on with it."""
    from dhcl.training.runs import train

    if work.plan.beds[run.bed].start == IMAGENET and work.imagenet is None:
        raise DHCLError(f"imagenet: the bed {run.bed} needs the file of its weights (got None)")
    root = root_of(work.plan.beds[run.bed], slug(run.bed), work.out / "data", work.photographs)
    config = work.config(run, root)
    torch.set_num_threads(work.threads)
    begun = (config.run / "config.yaml").exists()
    if begun:
        check_resumed(read_run(config.run), config)
    timed(config.run, lambda: train(config, resume=begun, quiet=True))


def tasks_of(work: Work, runs: Sequence[Run]) -> Iterator[list[Task]]:
    """What is left to do, in rounds of which each needs the one before."""
    wanted = [run for run in runs if not is_done(work.folder(run))]
    starts = {(work.plan.beds[run.bed].start, run.seed): work.plan.beds[run.bed] for run in wanted}
    yield [
        functools.partial(make_start, work, str(name), seed)
        for (name, seed), bed in starts.items()
        if (folder := work.start(bed, seed)) is not None and not is_done(folder)
    ]
    # The images of a bed are made by one process, which the others would race.
    firsts = {run.bed: run for run in reversed(wanted)}
    for bed in firsts:
        root_of(work.plan.beds[bed], slug(bed), work.out / "data", work.photographs)
    yield [functools.partial(make_run, work, run) for run in wanted]


def attempt(task: Task) -> str | None:
    """What went wrong, if anything did; a stop is passed on."""
    try:
        task()
    except Interrupted:
        raise
    except Exception as error:
        what = ", ".join(str(getattr(each, "name", each)) for each in task.args[1:])
        return f"{what}: {first_line(error)}"
    return None


def do(work: Work, runs: Sequence[Run], processes: int) -> list[str]:
    """Make all runs that are not there yet; what went wrong with some."""
    wrong: list[str | None] = []
    for tasks in tasks_of(work, runs):
        if processes == 1:
            wrong += [attempt(task) for task in tasks]
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            wrong += pool.map(attempt, tasks)
    return [each for each in wrong if each is not None]


# ---- what it would take -------------------------------------------------------------------------


def seconds_of(work: Work, run: Run) -> float:
    """CPU seconds that a run would take, by a batch of its own kind that is timed here."""
    from dhcl.training.network import make_model

    config = work.config(run, None)
    options, batches = config.model, config.batches
    size = batches.classes_per_batch * batches.images_per_class
    return _of_batches(options.backbone, options.image_size, size, make_model) * (
        config.epochs * batches.iterations
    )


@functools.cache
def _of_batches(
    backbone: str, image_size: tuple[int, int], size: int, make_model: Callable[..., Any]
) -> float:
    """CPU seconds of a batch, forward and backward, the second of two."""
    options = {"backbone": backbone, "image_size": image_size, "pretrained": False}
    model = make_model(with_changes(preset("dhcl"), options).model, 0, 0)
    spent = 0.0
    for _ in range(2):
        began = time.process_time()
        model(torch.zeros(size, 3, *image_size), torch.zeros(size).long()).sum().backward()
        spent = time.process_time() - began
    return spent


def print_plan(work: Work, runs: Sequence[Run]) -> None:
    """Every run with its CPU minutes: measured where it or another of its bed is done."""
    measured: dict[str, list[float]] = {}
    for run in runs:
        file = work.folder(run) / "cost.json"
        if is_done(work.folder(run)) and file.exists():
            measured.setdefault(run.bed, []).append(json.loads(file.read_text())["cpu"])
    left = 0.0
    for run in runs:
        known = measured.get(run.bed)
        # Extraction, clustering and the reading of images come to about as much again.
        seconds = statistics.fmean(known) if known else 1.6 * seconds_of(work, run)
        state = "done"
        if not is_done(work.folder(run)):
            state = f"{seconds / 60:.0f} minutes of one core"
            left += seconds
        print(f"{run.name}: {state}")
    starts = {
        folder
        for run in runs
        if (folder := work.start(work.plan.beds[run.bed], run.seed)) and not is_done(folder)
    }
    for folder in sorted(starts):
        print(f"start {folder.name}: about 9 minutes of one core where dhcl pretrain is as it is")
        left += 9 * 60
    print(f"{len(runs)} runs; {duration(left)} of one core are left")


# ---- the command --------------------------------------------------------------------------------


def figures(work: Work, runs: Sequence[Run]) -> dict[str, Any]:
    """Metrics of the finished runs: by bed, setting and seed."""
    found: dict[str, Any] = {}
    for run in runs:
        if not is_done(work.folder(run)):
            continue
        last = json.loads((work.folder(run) / "metrics.json").read_text())["last"]
        seeds = found.setdefault(run.bed, {}).setdefault(run.setting, {})
        seeds[str(run.seed)] = last
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("runs", nargs="?", type=Path, default=PLAN, help="the file of runs, YAML")
    made.add_argument("--out", type=Path, required=True, help="folder of images, starts and runs")
    made.add_argument("--photographs", type=Path, help="folder for the beds of photographs")
    made.add_argument("--imagenet", type=Path, help="file of weights for the beds that need it")
    made.add_argument("--processes", type=int, default=1, help="trainings at a time")
    made.add_argument("--threads", type=int, help="of each; by default the cores, shared out")
    made.add_argument("--only", nargs="+", default=[], help="runs whose BED/SETTING-seedS has this")
    made.add_argument("--plan", action="store_true", help="say what there is to do, and how long")
    made.add_argument("--write", action="store_true", help="write results and page, train nothing")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a run failed or an argument is wrong."""
    given = parser().parse_args(words)
    processes = max(given.processes, 1)
    threads = given.threads or max((os.cpu_count() or 1) // processes, 1)
    try:
        plan = read_plan(given.runs)
        runs = runs_of(plan, given.only)
        work = Work(plan, given.out, given.photographs, threads, given.imagenet)
        for run in runs:
            work.config(run, None)  # wrong options are found before the first run
        if given.plan:
            print_plan(work, runs)
            return 0
        wrong = [] if given.write else do(work, runs, processes)
    except DHCLError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1
    results = results_of(figures(work, runs), plan.comparisons, described(plan))
    text = section(results)
    print(text)
    if given.write:
        write_atomic(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(PAGE, between_markers(PAGE.read_text(), text).encode())
    for line in wrong:
        print(f"evidence: {line}", file=sys.stderr)
    return int(bool(wrong))


def described(plan: Plan) -> Mapping[str, Any]:
    """Beds, starts and settings as they go into the results: options, and no paths."""
    beds = TypeAdapter(dict[str, Bed]).dump_python(plan.beds, mode="json")
    return {"beds": beds, "starts": plan.starts, "settings": plan.settings}


if __name__ == "__main__":
    sys.exit(main())
