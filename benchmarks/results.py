"""What a benchmark run stores: rows, their table, the JSON file and its comparison.

Times are in seconds, sizes in bytes and rates per second everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
RATES = ("fp32", "tf32", "fp16", "bf16")
FEW_RUNS = 4  # below this many runs the inter-quartile range says little ...
FEW_RUNS_NOISE = 0.1  # ... and comparisons assume at least this fraction of the median


class SchemaError(ValueError):
    """A results file does not have the expected form."""


@dataclass
class Row:
    """The measurements of one variant of one case.

    ``seconds`` is the median over ``runs`` samples, ``iqr_seconds`` their inter-quartile range
    (None for a single run). Each sample is the mean over a block of calls; ``calls`` counts
    these. ``bytes_moved`` is the least traffic in bytes (inputs read once, outputs written
    once), ``flop`` the number of floating-point operations. ``floor_seconds`` is the time of
    this traffic or of these operations at the measured ceiling, whichever is longer (see
    ``floor_kind``). ``peak_extra_bytes`` is memory above the inputs, the output included, or
    None where unknown. ``max_difference`` is the largest absolute difference to the reference,
    None for the reference itself. ``speedup`` is relative to the variant ``baseline``.
    """

    op: str
    variant: str
    params: dict[str, Any]
    device: str
    threads: int
    seconds: float
    iqr_seconds: float | None
    runs: int
    calls: int
    bytes_moved: int
    flop: int
    floor_seconds: float | None = None
    floor_kind: str = ""
    time_over_floor: float | None = None
    peak_extra_bytes: int | None = None
    max_difference: float | None = None
    baseline: str = ""
    speedup: float | None = None
    timing: str = "calls"
    note: str = ""

    @property
    def key(self) -> str:
        """A readable label that identifies the row across results files."""
        where = f"{self.device}, threads={self.threads}, {self.timing}"
        return f"{case_label(self.op, self.params)}: {self.variant} ({where})"


@dataclass
class Ceilings:
    """Measured upper limits: bytes per second and floating-point operations per second.

    ``copy_bytes_per_second`` counts the bytes read and the bytes written.
    """

    device: str
    threads: int
    copy_bytes_per_second: float
    read_bytes_per_second: float
    flop_per_second: dict[str, float]

    def floor(
        self, bytes_read: int, bytes_written: int, flop: int, rate: str
    ) -> tuple[float | None, str]:
        """Least time in seconds and what sets it, "memory" or "compute".

        Reading and writing in equal parts goes at the copy rate, the rest of the reads at the
        read rate. Without a measured ``rate`` on this device an operation with ``flop`` has no
        floor.
        """
        if rate not in RATES:
            raise ValueError(f"rate must be one of {RATES}, not {rate!r}")
        reads_only = max(bytes_read - bytes_written, 0)
        rest = bytes_read + bytes_written - reads_only
        memory = rest / self.copy_bytes_per_second + reads_only / self.read_bytes_per_second
        if flop and rate not in self.flop_per_second:
            return None, ""
        compute = flop / self.flop_per_second[rate] if flop else 0.0
        if max(memory, compute) == 0:
            return None, ""
        return (memory, "memory") if memory >= compute else (compute, "compute")


@dataclass
class Results:
    """All that one benchmark run writes to disk."""

    machine: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | Path) -> None:
        """Write JSON to ``path``; a reader never sees a half-written file."""
        data = dataclasses.asdict(self)
        for row in data["rows"]:
            if row["max_difference"] == math.inf:
                row["max_difference"] = "inf"  # JSON has no infinity
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _build(cls: Any, data: Any, where: str) -> Any:
    """Make the dataclass ``cls`` from a JSON object, checking names and types of its fields."""
    if not isinstance(data, dict):
        raise SchemaError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for problem, names in (("missing", fields.keys() - data), ("unknown", data.keys() - fields)):
        if names:
            raise SchemaError(f"{where}: {problem} field(s) {', '.join(sorted(names))}")
    classes: dict[str, tuple[type, ...]] = {
        "str": (str,), "int": (int,), "float": (int, float), "None": (type(None),),
        "dict": (dict,), "list": (list,), "Ceilings": (dict,),
    }  # fmt: skip
    for name, kind in fields.items():
        allowed = sum((classes[part.split("[")[0]] for part in kind.split(" | ")), ())
        if not isinstance(data[name], allowed) or isinstance(data[name], bool):
            raise SchemaError(f"{where}: field {name} must be {kind}, found {data[name]!r:.60}")
    return cls(**data)


def load_results(path: str | Path) -> Results:
    """Read a file written by :meth:`Results.save`; raises :class:`SchemaError` if malformed."""
    try:
        data = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not JSON ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise SchemaError(f"{path}: schema_version {version!r}, expected {SCHEMA_VERSION}")
    results: Results = _build(Results, data, str(path))
    if results.ceilings is not None:
        results.ceilings = _build(Ceilings, results.ceilings, f"{path}: ceilings")
    rows: dict[str, Row] = {}
    for index, entry in enumerate(data["rows"]):
        where = f"{path}: row {index}"
        if isinstance(entry, dict) and entry.get("max_difference") == "inf":
            entry = {**entry, "max_difference": math.inf}
        row = _build(Row, entry, where)
        if not row.seconds > 0 or row.key in rows:
            raise SchemaError(f"{where}: time not positive, or a second row {row.key}")
        rows[row.key] = row
    results.rows = list(rows.values())
    return results


def epoch_parts(rows: Sequence[Row], total: Row) -> list[Row]:
    """The parts of an epoch that are not the network, with the total's ops and sizes."""
    return [
        row
        for row in rows
        if row.op.startswith("epoch: ")
        and row.op != total.op
        and row.variant == total.variant
        and row.params.items() <= total.params.items()
    ]


@dataclass(frozen=True)
class Change:
    """A row whose median time in seconds differs between two results files."""

    key: str
    old_seconds: float
    new_seconds: float


@dataclass
class Comparison:
    """Differences between two results files; ``machine`` lists facts that differ."""

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"machine differs: {text}" for text in self.machine]
        for word, changes in (("slower", self.slower), ("faster", self.faster)):
            for c in changes:
                times = f"{format_seconds(c.old_seconds)} -> {format_seconds(c.new_seconds)}"
                lines.append(f"{word}: {c.key}: {times} ({c.new_seconds / c.old_seconds:.2f}x)")
        lines += [f"only in the old file: {key}" for key in self.only_old]
        lines += [f"only in the new file: {key}" for key in self.only_new]
        return "\n".join(lines) or "no difference beyond the noise"


def compare(old: Results, new: Results) -> Comparison:
    """List rows that changed by more than both runs' spread together and by more than 5 %."""

    def noise(row: Row) -> float:
        least = FEW_RUNS_NOISE * row.seconds if row.runs < FEW_RUNS else 0.0
        return max(row.iqr_seconds or 0.0, least)

    old_rows, new_rows = ({row.key: row for row in r.rows} for r in (old, new))
    found = Comparison(
        only_old=[key for key in old_rows if key not in new_rows],
        only_new=[key for key in new_rows if key not in old_rows],
    )
    for fact in ("cpu", "usable_cores", "gpu", "gpu_driver", "python", "torch", "cuda"):
        before, after = old.machine.get(fact), new.machine.get(fact)
        if before != after:
            found.machine.append(f"{fact}: {before} -> {after}")
    for key in (key for key in old_rows if key in new_rows):
        a, b = old_rows[key], new_rows[key]
        difference = b.seconds - a.seconds
        if abs(difference) > max(noise(a) + noise(b), 0.05 * a.seconds):
            change = Change(key, a.seconds, b.seconds)
            (found.slower if difference > 0 else found.faster).append(change)
    return found


def case_label(op: str, params: Mapping[str, Any]) -> str:
    """The text that ``--only`` is matched against, such as ``gather [B=64 dtype=float32]``."""
    return f"{op} [{' '.join(f'{k}={plain(params[k])}' for k in sorted(params))}]"


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers, booleans and None as they are, the rest as text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value).removeprefix("torch.")


def format_seconds(seconds: float) -> str:
    """Seconds as text with three significant digits and a sensible unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"


def format_bytes(size: float) -> str:
    """Bytes as text in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def render_table(rows: Sequence[Row]) -> str:
    """Rows as an aligned plain-text table."""
    head = ("case", "variant", "time", "IQR", "runs", "speed-up", "of ceiling", "peak memory")
    table = [(*head, "max diff", "note")]
    for row in rows:
        fraction = "-"
        if row.time_over_floor is not None:
            fraction = f"{100 / row.time_over_floor:.1f} % {row.floor_kind[:3]}"
        difference = "-" if row.max_difference is None else f"{row.max_difference:.2g}"
        peak = row.peak_extra_bytes
        marks = [row.timing] if row.timing != "calls" else []
        table.append(
            (
                case_label(row.op, row.params),
                f"{row.variant} (baseline)" if row.variant == row.baseline else row.variant,
                format_seconds(row.seconds),
                "-" if row.iqr_seconds is None else f"{100 * row.iqr_seconds / row.seconds:.1f} %",
                str(row.runs),
                "-" if row.speedup is None else f"{row.speedup:.2f}x",
                fraction,
                "-" if peak is None else format_bytes(peak),
                difference,
                "; ".join([*marks, *([row.note] if row.note else [])]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = {0, 1, len(widths) - 1}  # text columns; numbers are aligned to the right
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
