"""The tables of figures in README and in ``docs/benchmarks.md``, made from the committed results.

README has a digest of ten rows, the page has every line. ``python -m benchmarks.readme --write``
puts each between its file's two markers, ``--check`` says whether they are what the results say,
and neither measures anything.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import (
    Results,
    Row,
    epoch_parts,
    format_bytes,
    format_seconds,
    load_results,
)
from benchmarks.scaling import exponents

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- measured: begin (python -m benchmarks.readme --write) -->"
END = "<!-- measured: end -->"
NONE = "\N{EN DASH}"
Folder = dict[str, Results]  # results of one machine by family


@dataclass(frozen=True)
class Line:
    """One line of the table of ops: a case of a family, and what stands beside ours."""

    what: str
    family: str
    op: str
    params: Mapping[str, Any]
    beside: Sequence[str] = ()
    # A variant that does the unavoidable part alone; else the floor of the measured ceilings.
    floor: str = ""
    ours: str = "dhcl"

    def rows(self, folder: Folder) -> dict[str, Row]:
        """The case's rows by variant; empty if it was not measured."""
        found = folder[self.family].rows if self.family in folder else []
        same = (
            row for row in found if row.op == self.op and self.params.items() <= row.params.items()
        )
        rows = {row.variant: row for row in same}
        return rows if self.ours in rows else {}


def _lines(
    family: str,
    op: str,
    beside: Sequence[str],
    cases: Mapping[str, Mapping[str, Any]],
    **more: str,
) -> list[Line]:
    """Lines of one op, by what they are."""
    return [Line(what, family, op, params, beside, **more) for what, params in cases.items()]


LINES = (
    *_lines(
        "memory", "momentum_update_", ("pytorch loop", "pytorch vectorised"),
        {
            "momentum update, B = 64, N = 12,936, d = 2048": {"B": 64, "N": 12_936},
            "momentum update, B = 256": {"B": 256, "N": 12_936},
        },
    ),
    *_lines(
        "memory", "prototypes", ("pytorch index_add_", "torch.compile"),
        {
            "class means, N = 12,936, d = 2048": {"N": 12_936},
            "class means, N = 1,000,000": {"N": 1_000_000},
        },
    ),
    *_lines(
        "knn", "knn", ("mm and topk", "torch.compile"),
        {
            "exact neighbours, N = 12,936, d = 2048, k = 30": {"N": 12_936},
            "exact neighbours, N = 32,621, d = 768": {"N": 32_621},
            "exact neighbours, N = 100,000, d = 256": {"N": 100_000},
        },
        floor="one symmetric product",
    ),
    *_lines(
        "jaccard", "cluster", ("dense NumPy", "pytorch reference"),
        {
            "Jaccard and DBSCAN, N = 12,936 (Market-1501's size)": {"N": 12_936},
            "Jaccard and DBSCAN, N = 32,621 (MSMT17's size)": {"N": 32_621},
            "Jaccard and DBSCAN, N = 20,000": {"N": 20_000, "data": "identities"},
            "the same, a hub forged into every list": {"N": 20_000, "data": "a hub in every list"},
            "Jaccard and DBSCAN, N = 100,000": {"N": 100_000},
        },
    ),
    *_lines(
        "jaccard", "rerank", ("dense NumPy", "pytorch reference"),
        {
            "re-ranking, 500 x 4,500, d = 256, neighbours included": {"Q": 500},
            "re-ranking, 11,659 x 82,161 (MSMT17's test size)": {"Q": 11_659},
        },
    ),
    *_lines(
        "contrastive", "loss both", ("pytorch", "torch.compile"),
        {
            "loss and its gradient, B = 64, K = 700, d = 2048": {"B": 64, "K": 700},
            "loss and its gradient, B = 256, K = 13,000": {"B": 256, "K": 13_000},
            "loss and its gradient, B = 256, K = 100,000": {"B": 256, "K": 100_000},
            "loss and its gradient, B = 1024, K = 100,000": {"B": 1024, "K": 100_000},
        },
        floor="products alone",
    ),
    *_lines(
        "ranking", "evaluate_ranking", ("argsort per query", "pytorch"),
        {"CMC, mAP, mINP, 3,368 x 15,913, d = 2048": {"Q": 3_368}},
        floor="product alone", ours="dhcl, features",
    ),
)  # fmt: skip


# README's rows: lines of the table above, and one epoch.
DIGEST = (
    "momentum update, B = 256",
    "exact neighbours, N = 12,936, d = 2048, k = 30",
    "exact neighbours, N = 32,621, d = 768",
    "Jaccard and DBSCAN, N = 12,936 (Market-1501's size)",
    "Jaccard and DBSCAN, N = 100,000",
    "re-ranking, 500 x 4,500, d = 256, neighbours included",
    "loss and its gradient, B = 256, K = 13,000",
    "loss and its gradient, B = 256, K = 100,000",
    "CMC, mAP, mINP, 3,368 x 15,913, d = 2048",
)
DIGEST_EPOCH = {"data": "Market-1501", "B": 64}


def _table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column text; nothing without rows."""
    if not rows:
        return []
    rule = "|".join("---" if not i else "---:" for i in range(len(rows[0])))
    return ["", head, f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _memory(row: Row) -> str:
    return NONE if row.peak_extra_bytes is None else format_bytes(row.peak_extra_bytes)


def _ops(folder: Folder) -> list[str]:
    """Ours beside plain code and the floor."""
    cells = []
    for line in LINES:
        if not (rows := line.rows(folder)):
            continue
        ours = rows[line.ours]
        others = [rows[name] for name in line.beside if name in rows]
        floor = rows[line.floor].seconds if line.floor in rows else ours.floor_seconds
        beside = "; ".join(f"{row.variant} {format_seconds(row.seconds)}" for row in others)
        cells.append(
            (
                line.what,
                format_seconds(ours.seconds),
                beside or NONE,
                "; ".join(f"{row.seconds / ours.seconds:.3g}" for row in others) or NONE,
                f"{ours.seconds / floor:.3g}" if floor else NONE,
                "; ".join(_memory(row) for row in (ours, *others)),
            )
        )
    return _table(
        "| what | ours | beside it | times as fast | ours / floor | memory: ours; beside it |",
        cells,
    )


@dataclass(frozen=True)
class Epoch:
    """One training epoch by variant: its whole time, and that of what is not the backbone."""

    params: Mapping[str, Any]
    totals: Mapping[str, float]
    rest: Mapping[str, float]

    def share(self, variant: str) -> str:
        """What is not the backbone, of the whole."""
        return f"{100 * self.rest[variant] / self.totals[variant]:.2g} %"


def epochs(folder: Folder) -> list[Epoch]:
    """The epochs that were measured, ours first among the variants."""
    rows = folder["end_to_end"].rows if "end_to_end" in folder else []
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in (row for row in rows if row.op == "epoch: total"):
        key = (row.params["data"], row.params["N"], row.params["B"])
        found.setdefault(key, {})[row.variant] = row
    measured = []
    for variants in found.values():
        if "dhcl" not in variants:
            continue
        shown: tuple[str, ...] = ("dhcl", "pytorch reference")
        kept = {name: variants[name] for name in shown if name in variants}
        totals = {name: row.seconds for name, row in kept.items()}
        rest = {
            name: math.fsum(part.seconds for part in epoch_parts(rows, row))
            for name, row in kept.items()
        }
        measured.append(Epoch(kept["dhcl"].params, totals, rest))
    return measured


def _epoch(folder: Folder) -> list[str]:
    """One epoch, and how much of it is not the backbone."""
    measured = epochs(folder)
    if not measured:
        return []
    cells = [
        (
            f"{epoch.params['data']} (N = {epoch.params['N']:,}), B = {epoch.params['B']}, "
            f"{epoch.params['steps']} batches",
            "; ".join(map(format_seconds, epoch.totals.values())),
            "; ".join(map(format_seconds, epoch.rest.values())),
            "; ".join(map(epoch.share, epoch.totals)),
        )
        for epoch in measured
    ]
    params = measured[0].params
    text = (
        f"One training epoch, summed from its parts; backbone {params['backbone']}, images of "
        f"{params['image']}, {params['precision']}. Ours; the same loop on the reference ops:"
    )
    head = "| epoch | seconds | without the backbone | its share |"
    return ["", text, *_table(head, cells)]


def _scaling(folder: Folder) -> list[str]:
    """How far each line of the scaling run went, and its exponents."""
    results = folder.get("scaling")
    if results is None:
        return []
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        name = "K" if "K" in row.params else "N"
        lines.setdefault((row.op, str(row.params.get("data", "")), name), []).append(row)
    cells = []
    for (op, data, name), rows in lines.items():
        last = max(rows, key=lambda row: row.params[name])
        time, memory = exponents(rows, name)
        cells.append(
            (
                ", ".join(filter(None, (op.removeprefix("scaling "), data))),
                f"{name} = {last.params[name]:,}",
                format_seconds(last.seconds),
                NONE if time is None else f"{name}^{time:.2f}",
                _memory(last),
                NONE if memory is None else f"{name}^{memory:.2f}",
            )
        )
    head = "| d = 256 | largest | time | grows as | memory | grows as |"
    stops = [f"- {text}" for text in results.skipped]
    return [*_table(head, cells), *([""] if stops else []), *stops]


def _sharded(folder: Folder) -> list[str]:
    """What several processes take beside one; many rows have a file of their own."""
    results = [folder[family] for family in ("sharded", "sharded_large") if family in folder]
    if not results:
        return []
    cells = []
    for row in (row for each in results for row in each.rows):
        inputs, _, traffic = row.note.partition("; ")
        cells.append(
            (
                row.op.removeprefix("sharded "),
                f"{row.params['N']:,}",
                row.variant,
                format_seconds(row.seconds),
                _memory(row),
                inputs.removeprefix("rows of a rank "),
                traffic.partition(":")[0].removeprefix("sends ").replace("bytes ", "") or NONE,
            )
        )
    head = "| rank that takes most | N | | time | memory | its rows | sent, in bytes |"
    return ["", *_table(head, cells)]


def machine_name(folder: Folder) -> str:
    """The GPU, or the processor and the threads, of a folder's results."""
    first = next(iter(folder.values())).machine
    return str(first["gpu"]) if is_gpu(folder) else f"{first['cpu']}, {first['threads']} threads"


def _header(name: str, folder: Folder) -> str:
    """Machine, versions and commits of a folder's results."""
    made: dict[str, list[str]] = {}
    for family, results in folder.items():
        facts = results.machine
        dirty = " with changes" if facts["git_dirty"] else ""
        commit = f"commit {str(facts['git_commit'])[:7]}{dirty}"
        made.setdefault(f"torch {facts['torch']}, {commit}, {facts['date'][:10]}", []).append(
            family
        )
    texts = (text if len(made) == 1 else f"{', '.join(f)}: {text}" for text, f in made.items())
    return f"**{machine_name(folder)}** (`benchmarks/results/{name}`): {'; '.join(texts)}."


def is_gpu(folder: Folder) -> bool:
    """Whether a folder's rows were measured on CUDA."""
    return any(row.device == "cuda" for results in folder.values() for row in results.rows)


def never_on_gpu(folders: Mapping[str, Folder]) -> str:
    """Which lines no GPU has run."""
    known = [folder for folder in folders.values() if is_gpu(folder)]
    missing = [line.what for line in LINES if not any(line.rows(folder) for folder in known)]
    for family in ("end_to_end", "scaling"):
        if not any(family in folder for folder in known):
            missing.append(family)
    if not known:
        return "**None of this has been measured on a GPU yet**: every figure above is of a CPU."
    return f"Never measured on a GPU: {'; '.join(missing)}." if missing else ""


def load_folders(path: Path = RESULTS) -> dict[str, Folder]:
    """Results by machine and family; raises :class:`SchemaError` if a file is malformed."""
    return {
        folder.name: {file.stem: load_results(file) for file in sorted(folder.glob("*.json"))}
        for folder in sorted(path.iterdir())
        if any(folder.glob("*.json"))
    }


def section(folders: Mapping[str, Folder]) -> str:
    """Every line and machine, for the page; markers included."""
    lines = [BEGIN]
    for name, folder in folders.items():
        tables = (*_ops(folder), *_epoch(folder), *_scaling(folder), *_sharded(folder))
        lines += ["", _header(name, folder), *tables]
    return "\n".join([*lines, "", never_on_gpu(folders), END])


def _digest_op(line: Line, folder: Folder) -> tuple[str, str]:
    """Ours, and the fastest of what stands beside it with the factor between them."""
    rows = line.rows(folder)
    if not rows:
        return NONE, NONE
    ours = rows[line.ours].seconds
    others = [rows[name] for name in line.beside if name in rows]
    if not others:
        return format_seconds(ours), NONE
    best = min(others, key=lambda row: row.seconds)
    times = f"{format_seconds(best.seconds)}, {best.variant}: {best.seconds / ours:.2g} times"
    return format_seconds(ours), times


def _digest_epoch(folder: Folder) -> tuple[str, str]:
    """The share of an epoch that is not the backbone, ours and of the reference ops."""
    for epoch in epochs(folder):
        if DIGEST_EPOCH.items() <= epoch.params.items():
            share = {name: epoch.share(name) for name in epoch.totals}
            beside = share.get("pytorch reference")
            return share["dhcl"], f"{beside}, pytorch reference" if beside else NONE
    return NONE, NONE


def digest(folders: Mapping[str, Folder]) -> str:
    """README's ten rows, a pair of columns for each machine; markers included."""
    lines = {line.what: line for line in LINES}
    names = [machine_name(folder) for folder in folders.values()]
    head = "| | " + " | ".join(f"{name} | beside it" for name in names) + " |"
    rows = [
        (what, *(cell for folder in folders.values() for cell in _digest_op(lines[what], folder)))
        for what in DIGEST
    ]
    epoch = (cell for folder in folders.values() for cell in _digest_epoch(folder))
    data, batch = DIGEST_EPOCH.values()
    rows.append((f"share of an epoch outside of the backbone, {data}, B = {batch}", *epoch))
    return "\n".join([BEGIN, *_table(head, rows), "", END])


FILES: Mapping[str, Callable[[Mapping[str, Folder]], str]] = {
    "README.md": digest,
    "docs/benchmarks.md": section,
}


def replaced(text: str, new: str) -> str:
    """``text`` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must have {BEGIN!r} and then {END!r}, once each")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def main(words: Sequence[str] | None = None) -> int:
    """Write the tables, or say whether they are current."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--write", action="store_true")
    which.add_argument("--check", action="store_true")
    options = parser.parse_args(words)
    folders = load_folders()
    stale = []
    for name, table in FILES.items():
        file = ROOT / name
        old = file.read_text()
        new = replaced(old, table(folders))
        if new != old:
            stale.append(name)
            if options.write:
                file.write_text(new)
    if options.check and stale:
        print(
            f"the figures of {' and '.join(stale)} are not those of benchmarks/results: "
            "run with --write"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
