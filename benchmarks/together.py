"""Several benchmarks in one process: ``python -m benchmarks.together --out FOLDER memory knn``.

For a machine that is lent by the minute: PyTorch and the GPU's context are set up once, and so are
the ceilings measured. Each benchmark leaves FAMILY.json and its table FAMILY.txt, as ``python -m
benchmarks`` does, which starts a process for each and so survives the crash of one. JSON is written
after each case: what was measured is there also when the process is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.families import COMPOSITIONS, FAMILIES
from benchmarks.results import Ceilings, format_seconds

# What follows the common options, to fit many families into a few minutes of a GPU.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "contrastive": ("--sizes", "700", "13000", "100000"),
    "end_to_end": ("--batches", "64", "256"),
    "scaling": ("--limit", "1"),
}


def run(
    name: str, out: Path, words: Sequence[str], ceilings: Ceilings | None
) -> tuple[str, Ceilings | None]:
    """Run one benchmark; what went wrong, empty if nothing did, and the ceilings measured."""
    json = out / f"{name}.json"
    json.unlink(missing_ok=True)  # a failed run must not leave an earlier run's results
    with (out / f"{name}.txt").open("w") as file, contextlib.redirect_stdout(file):
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            results = module.main(["--json", str(json), *words], ceilings)
        except (Exception, SystemExit) as error:  # one that fails does not keep others from running
            return f"{type(error).__name__}: {error}", ceilings
    return "", results.ceilings


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named, in that order; returns the exit status."""
    names = (*FAMILIES, *COMPOSITIONS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together", description=__doc__)
    parser.add_argument("benchmark", nargs="+", choices=names)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--seconds", default="0.2", help="time budget per row (default: 0.2)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that all runs")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    common = ["--device", options.device, "--seconds", options.seconds]
    problems, ceilings = [], None
    for name in dict.fromkeys(options.benchmark):
        started = time.perf_counter()
        own = ["--quick"] if options.quick else [*OPTIONS.get(name, ())]
        problem, ceilings = run(name, options.out, [*common, *own], ceilings)
        took = format_seconds(time.perf_counter() - started)
        print(f"== {name}: {problem or 'done'}, {took}", flush=True)
        if problem:
            problems.append(f"{name}: {problem}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next one finds the memory that this one had
    for text in problems:
        print(f"failed: {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
