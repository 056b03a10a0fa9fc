"""All benchmarks in one command: ``python -m benchmarks``.

Each family runs in a process of its own and leaves FAMILY.json, its table FAMILY.txt and plots in
the folder of ``--out``. A family that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.families import COMPOSITIONS, FAMILIES
from benchmarks.results import Results, SchemaError, compare, format_seconds, load_results

BENCHMARKS = (*FAMILIES, *COMPOSITIONS)
ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="What follows -- goes to the script of the one family: "
        "python -m benchmarks --only scaling -- --limit 10",
    )
    made.add_argument("--quick", action="store_true", help="smallest sizes, to see that all runs")
    made.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="FAMILY", default=BENCHMARKS,
                      help=f"of {', '.join(BENCHMARKS)}")  # fmt: skip
    made.add_argument("--cases", default="", metavar="SUBSTRING",
                      help="run cases whose label contains this")  # fmt: skip
    made.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    made.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    made.add_argument("--seconds", type=float, help="time budget per row")
    made.add_argument("--time-limit", type=float, metavar="SECONDS",
                      help="end a family that runs longer; what it measured is kept")  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="FOLDER")
    made.add_argument("--compare", type=Path, metavar="OLD",
                      help="an earlier JSON file or folder; the exit status is 1 if a row became "
                      "slower beyond the noise of both runs")  # fmt: skip
    made.add_argument("--no-plots", action="store_true")
    return made


def old_results(path: Path, families: Sequence[str]) -> dict[str, Results]:
    """Results to compare with, by family: of a folder, or of one file named after its family.

    Raises:
        SystemExit: there is nothing, or a file is malformed.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        if len(files) == 1 or file.stem in families:
            try:
                found[file.stem] = load_results(file)
            except (OSError, SchemaError) as error:
                raise SystemExit(f"--compare: {error}") from error
    if not any(family in found for family in families):
        raise SystemExit(f"--compare {path}: no results of {', '.join(families)} there")
    return found


def run_family(family: str, options: argparse.Namespace) -> str:
    """Run one family; returns what went wrong, empty if nothing did."""
    out: Path = options.out
    json = out / f"{family}.json"
    json.unlink(missing_ok=True)  # a failed run must not leave an earlier run's results
    words = [sys.executable, "-m", f"benchmarks.{family}", "--json", str(json.resolve())]
    words += ["--device", options.device, "--only", options.cases]
    words += ["--quick"] if options.quick else []
    words += options.own
    for name in ("threads", "seconds"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value is not None else []
    table = out / f"{family}.txt"
    with table.open("w") as file:
        try:
            done = subprocess.run(words, stdout=file, cwd=ROOT, timeout=options.time_limit)
        except subprocess.TimeoutExpired:
            return f"ended after {options.time_limit:.0f} s"
        finally:
            print(table.read_text(), flush=True)
    return f"exit status {done.returncode}" if done.returncode else ""


def plot(family: str, out: Path) -> None:
    """Draw a family's plots; without matplotlib say so and go on."""
    from benchmarks.plots import MissingMatplotlib, draw

    try:
        for file in draw(load_results(out / f"{family}.json"), family, out / "plots"):
            print(f"drew {file}")
    except MissingMatplotlib as error:
        print(f"no plots: {error}")


def main(words: Sequence[str] | None = None) -> int:
    """Run, draw, compare; returns the exit status."""
    command_line = parser()
    words = list(sys.argv[1:] if words is None else words)
    end = words.index("--") if "--" in words else len(words)
    options = command_line.parse_args(words[:end])
    options.own = words[end + 1 :]
    if options.own and len(set(options.only)) != 1:
        command_line.error("options after -- are those of one family: name it with --only")
    if options.time_limit is not None and not options.time_limit > 0:
        command_line.error(f"--time-limit must be positive (got {options.time_limit})")
    old = old_results(options.compare, options.only) if options.compare else {}
    options.out.mkdir(parents=True, exist_ok=True)
    problems, slower = [], False
    for family in dict.fromkeys(options.only):
        started = time.perf_counter()
        print(f"== {family}", flush=True)
        problem = run_family(family, options)
        print(f"== {family}: {problem or 'done'}, {format_seconds(time.perf_counter() - started)}")
        if problem:
            problems.append(f"{family}: {problem}")
        if not (options.out / f"{family}.json").is_file():
            continue
        if not options.no_plots:
            plot(family, options.out)
        if family in old:
            found = compare(old[family], load_results(options.out / f"{family}.json"))
            print(f"compared with {options.compare}:\n{found}")
            slower = slower or bool(found.slower)
    for text in problems:
        print(f"failed: {text}")
    return 1 if problems or slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
