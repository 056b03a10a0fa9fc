"""All that a machine with a GPU is needed for, in one command: ``scripts/gpu_day.sh``.

Facts, build, an epoch, the ops' benchmarks, tests, Nsight Compute and Compute Sanitizer, one part
after another, the most telling first, since a machine may be lent for minutes only. One that fails
does not keep the others from running; what a part found is on disk when it ends, and in the archive
if one is asked for. On a machine without a GPU the parts that need one are skipped and the others
run on the CPU. Nothing here changes a setting of the GPU. It needs the standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import ncu
from benchmarks.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
# Without a GPU everything is slower than the limits below allow for.
CPU_FACTOR = 6
# Test processes at most that share one GPU; each has a context of its own.
TEST_WORKERS = 14
# Where programs of the CUDA toolkit lie that are not on PATH; the last of several versions counts.
TOOL_HOMES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda-*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/opt/nvidia/compute-sanitizer",
)
# Asks the Python of the parts what it has; prints one line of JSON.
PROBE = """
import importlib.util, json, torch
names = ("hypothesis", "pytest", "timm", "torchvision", "xdist")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(json.dumps({"gpu": gpu, "modules": [n for n in names if importlib.util.find_spec(n)]}))
"""
FACTS = """
import json, torch
from benchmarks.machine import machine_facts
print(json.dumps(machine_facts(torch.get_num_threads())))
"""


class Failed(Exception):
    """A part did not do what it should; the message says what and how."""


@dataclasses.dataclass
class Outcome:
    """How a part went: ``passed``, ``failed`` or ``skipped``, its seconds, and what to know."""

    part: str
    status: str
    seconds: float
    note: str


@dataclasses.dataclass
class Day:
    """One part's surroundings: where results go, which Python runs, until when."""

    out: Path
    python: str
    found: dict[str, Any]
    quick: bool
    folder: Path = Path()
    deadline: float = 0.0
    commit: str = ""

    @property
    def cuda(self) -> bool:
        """Whether torch sees a GPU."""
        return bool(self.found["gpu"])

    def missing(self, *modules: str) -> str:
        """Those of the modules that the Python of the parts lacks."""
        return ", ".join(name for name in modules if name not in self.found["modules"])

    @property
    def device(self) -> str:
        """What benchmarks run on."""
        return "cuda" if self.cuda else "cpu"

    def environment(self) -> dict[str, str]:
        """That of every command: this checkout's code, and libraries built beside the results."""
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        changed["DHCL_CACHE"] = os.environ.get("DHCL_CACHE") or str(self.out / "cache")
        if self.commit:
            changed["DHCL_COMMIT"] = self.commit
        if not self.cuda:
            # Compiling kernels that can't run takes minutes.
            changed["DHCL_CUDA"] = "off"
        return {**os.environ, **changed}

    def left(self) -> float:
        """Seconds until the part's limit."""
        return self.deadline - time.monotonic()

    def call(
        self, *words: str, log: str = "log.txt", seconds: float = math.inf, **variables: str
    ) -> Path:
        """Run a command; its output goes to a file of the part's folder, which is returned.

        Raises:
            Failed: it did not end with status 0, or not in ``seconds`` or the part's limit.
        """
        path = self.folder / log
        seconds = max(min(seconds, self.left()), 0.1)
        with path.open("a") as file:
            print(f"$ {' '.join(words)}", file=file, flush=True)
            ended = run(words, file, seconds, {**self.environment(), **variables})
        if ended is None:
            raise Failed(f"{name_of(words)} ended after {seconds:.0f} s")
        if ended:
            raise Failed(f"{name_of(words)} ended with status {ended}, see {path}")
        return path

    def module(self, *words: str, **how: Any) -> Path:
        """Run ``python -m`` with the words."""
        return self.call(self.python, "-m", *words, **how)


def run(words: Sequence[str], file: Any, seconds: float, variables: dict[str, str]) -> int | None:
    """Run a command with its children in a group; None if time was up and they were killed."""
    process = subprocess.Popen(
        words,
        stdout=file,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=variables,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def name_of(words: Sequence[str]) -> str:
    """A command in a message: what runs, without paths and options."""
    if "-m" in words[:2]:
        return " ".join(words[2:4] if len(words) > 3 and words[3][0] != "-" else words[2:3])
    return " ".join([Path(words[0]).name, *(words[1:3] if words[1:2] == ["--tool"] else [])])


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on ``PATH``, in ``$CUDA_HOME/bin`` or in a usual home."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    places = [str(Path(home) / "bin") for home in homes if home]
    places += [place for home in TOOL_HOMES for place in sorted(glob.glob(home), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


# ---- parts --------------------------------------------------------------------------------------


def facts(day: Day) -> str:
    """What this machine is."""
    path = day.call(day.python, "-c", FACTS, log="machine.txt")
    machine: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    del machine["command"]
    for tool in ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu"):
        machine[tool] = None
        if program := find_tool(tool):
            words = [program] if tool == "nvidia-smi" else [program, "--version"]
            try:
                said = day.call(*words, log=f"{tool}.txt").read_text()
            except Failed as error:
                said = f"\n{error}"
            machine[tool] = "\n".join(said.splitlines()[1:])
    (day.folder / "facts.json").write_text(json.dumps(machine, indent=1) + "\n")
    doctor = day.module("dhcl_ops", "--no-build", log="doctor.txt")
    lines = [f"{name}: {value}" for name, value in machine.items()]
    (day.folder / "facts.txt").write_text("\n".join([*lines, doctor.read_text()]))
    return f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}"


def build(day: Day) -> str:
    """Compile the ops, and compare each with its reference on its sample."""
    path = day.module("dhcl_ops", "--json", log="doctor.txt")
    text = path.read_text()
    report, _ = json.JSONDecoder().raw_decode(text, text.index("\n{\n") + 1)
    (day.folder / "doctor.json").write_text(json.dumps(report, indent=1) + "\n")
    line = str(report["library"]["line"])
    if day.cuda and not report["library"]["cuda"]:
        raise Failed(f"no CUDA kernels: {line}")
    return line.removeprefix("dhcl_ops: ")


def tests(which: str, day: Day) -> str:
    """Those op tests; with a GPU only what runs on it, and none may skip for want of it."""
    if missing := day.missing("pytest", "hypothesis"):
        raise Failed(f"no {missing} in {day.python}")
    # The tests of kernels on an emulator of CUDA say nothing about this machine. Every test is
    # named as it ends, since the XML comes last.
    chosen = f"cuda and {which}" if day.cuda else f"{which} and not cuda and not thread"
    few = ["tests/ops/test_memory.py"] if day.quick else ["tests/ops"]
    words = ["pytest", *few, "-k", chosen, "-v", "-p", "no:cacheprovider"]
    words += ["--ignore-glob", "*_host*.py", "--junitxml", str(day.folder / "junit.xml")]
    variables = {"DHCL_REQUIRE_CUDA": "1"} if day.cuda else {}
    if not day.missing("xdist"):
        cores = os.cpu_count() or 1
        workers = max(min(TEST_WORKERS, cores), 1)
        words += ["-n", str(workers)]
        variables["OMP_NUM_THREADS"] = str(max(cores // workers, 1))
    path = day.module(*words, **variables)
    return path.read_text().splitlines()[-1].strip("= ")


def sanitizer(day: Day) -> str:
    """Compute Sanitizer's memcheck and racecheck on all ops and on sizes that fill no tile."""
    program = str(find_tool("compute-sanitizer"))
    families = FAMILIES[:1] if day.quick else FAMILIES
    # Without torch's cache every tensor is an allocation of its own, whose ends are checked.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    problems, said = [], []
    for tool, share in (("memcheck", day.left() / 2), ("racecheck", math.inf)):
        words = [program, "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
        # Only our kernels are checked, by the namespace in their names.
        words += ["--kernel-name", "kns=dhcl", "--print-limit", "20"]
        words += [day.python, "-m", "benchmarks.kernels", "--check", *families]
        try:
            # The log names each call before it is made, also where time was up.
            text = day.call(*words, log=f"{tool}.txt", seconds=share, **plain).read_text()
            found = [line.strip("= ") for line in text.splitlines() if " SUMMARY: " in line]
            if not found:
                raise Failed("it ended without a summary")
            said += found
        except Failed as error:
            problems.append(f"{tool}: {error}")
    if problems:
        raise Failed("; ".join(problems))
    return "; ".join(said)


def measure(names: Sequence[str], day: Day) -> str:
    """Run benchmarks in one process; their results lie in one folder for all parts."""
    words = ["benchmarks.together", *names, "--device", day.device]
    words += ["--out", str(day.out / "results")]
    words += ["--quick", "--seconds", "0.1"] if day.quick else []
    log = day.folder / "log.txt"
    try:
        day.module(*words)
    except Failed as error:
        stopped = [
            line.removeprefix("failed: ")
            for line in log.read_text().splitlines()
            if line.startswith("failed: ")
        ]
        raise Failed("; ".join(stopped) or str(error)) from error
    return f"{', '.join(names)} on {day.device}, in {day.out / 'results'}"


def nsight(day: Day) -> str:
    """Nsight Compute on all kernels of the families: bandwidth, occupancy, what warps wait for."""
    program = str(find_tool("ncu"))
    launches: list[ncu.Launch] = []
    problems = []
    for number, family in enumerate(FAMILIES):
        csv = day.folder / f"{family}.csv"
        target = (day.python, "-m", "benchmarks.kernels", "--profile", family)
        words = ncu.command(program, family, csv, target)
        share = day.left() / (len(FAMILIES) - number)
        try:
            day.call(*words, log=f"{family}.txt", seconds=share)
        except Failed as error:
            problems.append(f"{family}: {error}")
        try:  # ncu's reason for a failure is in the same file
            launches += ncu.read(csv.read_text())
        except (ncu.CsvError, OSError) as error:
            problems.append(f"{family}: {error}")
        # After each family: an interrupted run keeps what it has.
        (day.folder / "table.txt").write_text(ncu.render(ncu.longest(launches)) + "\n")
    print((day.folder / "table.txt").read_text(), flush=True)
    if problems:
        raise Failed("; ".join(problems))
    return f"{len({one.kernel for one in launches})} kernels, {len(launches)} launches"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the day: seconds it may take on an H200 with 16 cores, and what it needs."""

    name: str
    what: str
    limit: float
    run: Callable[[Day], str]
    tools: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def obstacle(self, day: Day) -> str:
        """Why it can't run here; empty if it can. Tools are those that watch a GPU."""
        if self.tools and not day.cuda:
            return "no CUDA device"
        if missing := ", ".join(name for name in self.tools if find_tool(name) is None):
            return f"no {missing} on PATH, in $CUDA_HOME or a usual home of CUDA"
        if missing := day.missing(*self.modules):
            return f"no {missing} in {day.python}: pip install 'dhcl[train]'"
        return ""


# The limits together stay below nine minutes. The order is that of what one would miss most.
PARTS = (
    Part("facts", "GPU, driver, compilers, versions, commit", 20, facts),
    Part("build", "compile the ops and compare each with its reference", 60, build),
    Part("end_to_end", "an epoch and its parts", 60, functools.partial(measure, ("end_to_end",)),
         modules=("timm", "torchvision")),
    Part("benchmarks", f"python -m benchmarks.together {' '.join(FAMILIES)}", 140,
         functools.partial(measure, FAMILIES)),
    Part("tests", "the op tests without compilation, on CUDA where there is a GPU", 60,
         functools.partial(tests, "not compile")),
    Part("compiled", "the op tests under torch.compile", 60, functools.partial(tests, "compile")),
    Part("scaling", "time and memory as N and K grow", 30,
         functools.partial(measure, ("scaling",))),
    Part("ncu", "Nsight Compute on the main kernels", 45, nsight, ("ncu",)),
    Part("sanitizer", "Compute Sanitizer: memcheck, racecheck", 60, sanitizer,
         ("compute-sanitizer",)),
)  # fmt: skip


def pack(out: Path, archive: Path) -> None:
    """Everything that was found, without the built library, in one file beside it or elsewhere."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(out.iterdir()):
            if path.name != "cache" and path not in (archive, partial):
                file.add(path, f"day/{path.name}")
    partial.replace(archive)


# ---- the day ------------------------------------------------------------------------------------


def run_part(part: Part, day: Day, limit: float) -> Outcome:
    """Run one part in an emptied folder of its name, and leave ``outcome.json`` there."""
    day = dataclasses.replace(day, folder=day.out / part.name)
    shutil.rmtree(day.folder, ignore_errors=True)
    day.folder.mkdir(parents=True)
    started = time.monotonic()
    day.deadline = started + limit
    reason = part.obstacle(day)
    if reason:
        outcome = Outcome(part.name, "skipped", 0.0, reason)
    else:
        print(f"== {part.name}: {part.what} (at most {limit:.0f} s)", flush=True)
        try:
            status, note = "passed", part.run(day)
        except Failed as error:
            status, note = "failed", str(error)
        except Exception as error:  # a mistake in one part is not the end of the day
            status, note = "failed", f"{type(error).__name__}: {error}"
        outcome = Outcome(part.name, status, round(time.monotonic() - started, 1), note)
    print(f"== {part.name}: {outcome.status}, {outcome.seconds:.0f} s, {outcome.note}", flush=True)
    text = json.dumps(dataclasses.asdict(outcome), indent=1) + "\n"
    (day.folder / "outcome.json").write_text(text)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """The parts, how they went and how long they took."""
    wide = max(len(outcome.part) for outcome in outcomes)
    return "\n".join(
        f"{o.part:<{wide}}  {o.status:<7}  {o.seconds:6.1f} s  {o.note}" for o in outcomes
    )


def probe(python: str) -> dict[str, Any]:
    """What the Python of the parts has; raises ValueError if it lacks torch."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{python} does not run: {error}") from error
    if done.returncode:
        raise ValueError(f"{python} has no working torch: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [part.name for part in PARTS]
    made = argparse.ArgumentParser(prog="scripts/gpu_day.sh", description=__doc__)
    made.add_argument("--out", type=Path, default=Path("gpu-day"), metavar="FOLDER")
    made.add_argument("--part", nargs="+", action="extend", choices=names, metavar="PART",
                      help=f"of {', '.join(names)} (default: all, in this order)")  # fmt: skip
    made.add_argument("--archive", type=Path, metavar="FILE",
                      help="also pack what was found into it after each part")  # fmt: skip
    made.add_argument("--commit", default="", metavar="HASH",
                      help="of a copy that has no history, for the results")  # fmt: skip
    made.add_argument("--list", action="store_true", help="name the parts and end")
    made.add_argument("--quick", action="store_true", help="small sizes and few tests")
    made.add_argument("--limit", type=float, metavar="SECONDS",
                      help="of each part, instead of those that --list tells")  # fmt: skip
    made.add_argument("--python", default=sys.executable, help="with torch, numpy, pytest, ninja")
    return made


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # on the way out the running command is killed


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    command_line = parser()
    options = command_line.parse_args(words)
    if options.list:
        for part in PARTS:
            print(f"{part.name:<12} {part.limit:4.0f} s  {part.what}")
        return 0
    if options.limit is not None and not options.limit > 0:
        command_line.error(f"--limit must be positive (got {options.limit})")
    if options.archive is not None and not options.archive.resolve().parent.is_dir():
        command_line.error(f"--archive {options.archive} is in no folder")
    if options.out.exists() and not options.out.is_dir():
        command_line.error(f"--out {options.out} is not a folder")
    python = shutil.which(options.python)
    if python is None:
        command_line.error(f"--python {options.python}: there is no such program")
    try:
        found = probe(python)
    except ValueError as error:
        command_line.error(f"--python: {error}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    day = Day(out, python, found, options.quick, commit=options.commit)
    outcomes = []
    for part in PARTS:
        if options.part is None or part.name in options.part:
            limit = options.limit or part.limit * (1 if day.cuda else CPU_FACTOR)
            outcomes.append(run_part(part, day, limit))
            (out / "parts.txt").write_text(table(outcomes) + "\n")
            if options.archive is not None:
                pack(out, options.archive.resolve())
    print(table(outcomes))
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
