"""Nsight Compute on our kernels: its command line, and a short table of what it measured.

``python -m benchmarks.ncu FILE.csv`` prints the table of CSV files of ``ncu --csv --page raw``. It
needs the standard library only.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.families import kernels

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
LAUNCHES = 24

# Names differ between versions of Nsight Compute; the first that is there counts.
METRICS = {
    "seconds": ("gpu__time_duration.sum", "gpu__time_duration.avg"),
    "bandwidth": ("dram__bytes.sum.per_second",),
    "dram": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "compute": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
# Cycles a warp waits for each reason per instruction; a selected warp does not wait.
STALL = re.compile(r"issue_stalled_(?!selected)(\w+?)_per_(?:issue|warp)_active\.ratio$")
# Units are said as in "Gbyte/second", "usecond" or "us", whatever the version.
UNIT = re.compile(r"(?P<scale>[KMGTmun]?)(?:byte/s(?:econd)?|B/s|s(?:econds?|ec)?)$")
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class CsvError(ValueError):
    """A file is not what ``ncu --csv --page raw`` writes."""


@dataclass(frozen=True)
class Launch:
    """One launch: time in seconds, bandwidth in bytes per second, shares in percent.

    What was not measured is None.
    """

    kernel: str
    grid: str
    seconds: float | None
    bandwidth: float | None
    dram: float | None
    compute: float | None
    occupancy: float | None
    registers: float | None
    stall: str


def command(ncu: str, family: str, log: Path, target: Sequence[str]) -> list[str]:
    """How ncu profiles a family's kernels while ``target`` runs; clocks stay as they are."""
    words = [ncu, "--clock-control", "none", "--target-processes", "application-only"]
    words += ["--profile-from-start", "off", "--launch-count", str(LAUNCHES)]
    wanted = f"regex:{'|'.join(kernels(family))}"
    words += ["--kernel-name", wanted, "--kernel-name-base", "function"]
    for section in SECTIONS:
        words += ["--section", section]
    words += ["--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function"]
    return [*words, "--log-file", str(log), *target]


def number(text: str, unit: str = "") -> float | None:
    """A cell as a number in seconds, bytes per second or its own unit; None for ``n/a``."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    match = UNIT.fullmatch(unit)
    return value * SCALES[match["scale"]] if match else value


def top_stall(cells: Mapping[str, str]) -> str:
    """The reason for which warps wait longest, with its share of all waiting."""
    found: dict[str, float] = {}
    for name, text in cells.items():
        match, value = STALL.search(name), number(text)
        if match and value is not None:
            found[match[1]] = max(value, found.get(match[1], 0.0))
    total = sum(found.values())
    if not total:
        return "-"
    reason = max(found, key=lambda name: found[name])
    return f"{reason.replace('_', ' ')} {100 * found[reason] / total:.0f} %"


def read(text: str) -> list[Launch]:
    """The launches in what ``ncu --csv --page raw`` wrote, in order.

    A line of names and one of units come first; ncu's own messages and the program's output may
    stand before them.

    Raises:
        CsvError: there is no such table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        said = [line for line in lines if line.startswith("==")]
        raise CsvError(f"no table of ncu's raw page: {' '.join(said[-2:]) or 'nothing said'}")
    table = [line for line in lines[start:] if line.startswith('"')]
    names, *records = csv.reader(io.StringIO("\n".join(table)))
    if "Kernel Name" not in names or "Metric Name" in names:
        raise CsvError("not ncu's raw page, which has a column Kernel Name and one per metric")
    units = dict(zip(names, records[0], strict=False)) if records else {}
    launches = []
    for record in records[1:]:
        cells = dict(zip(names, record, strict=False))
        values = {
            key: next(
                (number(cells[name], units.get(name, "")) for name in wanted if name in cells), None
            )
            for key, wanted in METRICS.items()
        }
        # Of a full signature only the name.
        name = re.search(r"\w+_kernel\b", cells["Kernel Name"])
        kernel = name[0] if name else cells["Kernel Name"]
        launches.append(
            Launch(kernel, cells.get("Grid Size", ""), **values, stall=top_stall(cells))
        )
    return launches


def longest(launches: Sequence[Launch]) -> list[Launch]:
    """Of each kernel the launch that took longest, in the order of first launches."""
    found: dict[str, Launch] = {}
    for one in launches:
        if (one.seconds or 0.0) >= (found.setdefault(one.kernel, one).seconds or 0.0):
            found[one.kernel] = one
    return list(found.values())


def render(launches: Sequence[Launch]) -> str:
    """Launches as an aligned table."""
    head = ("kernel", "grid", "us", "GB/s", "DRAM %", "SM %", "occupancy %", "registers")
    table: list[tuple[str, ...]] = [(*head, "top stall")]
    for one in launches:
        measured = (
            (one.seconds, 1e6),
            (one.bandwidth, 1e-9),
            (one.dram, 1.0),
            (one.compute, 1.0),
            (one.occupancy, 1.0),
            (one.registers, 1.0),
        )
        texts = ["-" if value is None else f"{value * scale:.4g}" for value, scale in measured]
        kernel = one.kernel.removesuffix("_kernel")
        table.append((kernel, one.grid.replace(" ", ""), *texts, one.stall))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, 1, len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def main(words: Sequence[str] | None = None) -> int:
    """Print one table of all files: the longest launch of each kernel, or every launch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ncu", description=__doc__)
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="every launch (default: the longest)")
    options = parser.parse_args(words)
    launches: list[Launch] = []
    for path in options.file:
        try:
            launches += read(path.read_text())
        except (OSError, CsvError) as error:
            parser.error(f"{path}: {error}")
    print(render(launches if options.all else longest(launches)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
