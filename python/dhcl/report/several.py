"""``dhcl compare``: several runs together, as plain data for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dhcl.config import ConfigError
from dhcl.files import write_atomic
from dhcl.report import charts
from dhcl.report.charts import Chart, Series
from dhcl.report.curves import CURVES, epoch_series, seconds_of
from dhcl.report.gather import Findings, look
from dhcl.report.pages import Table, check_file, grouped, percent, render, scripted
from dhcl.training.logs import flat
from dhcl.training.record import Record
from dhcl.training.results import Results
from dhcl.words import duration, show

__all__ = ["comparison_page", "labels_of", "write_comparison"]

_METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")
# Differ between any two runs and say nothing of the method.
_OWN = ("out", "workers", "report")


def write_comparison(results: Iterable[Results], *, out: Path, retrieval: bool = True) -> Path:
    """Write a page that compares runs, and return its file.

    Args:
        results: of at least two runs, finished or not; they are taken one after another, so that
            the features of one run at a time need be in memory.
        out: file.
        retrieval: show similarities and cameras, for which test features are needed.

    Raises:
        ConfigError: fewer than two runs, or no file can be written there. OSError: it could not be
            written.
    """
    check_file(out)
    found = [look(each, pictures=False) for each in results]
    if len(found) < 2:
        raise ConfigError(f"runs: at least two are needed to compare (got {len(found)})")
    write_atomic(out, comparison_page(found, retrieval=retrieval))
    return out


def comparison_page(found: Sequence[Findings], *, retrieval: bool = True) -> bytes:
    """The page."""
    records = [each.record for each in found]
    names = labels_of(records)
    epochs = _over_epochs(names, records)
    time = _time(names, records)
    clusters = _clusters(names, found)
    looked_up = _retrieval(names, found) if retrieval else []
    drawn = [*epochs, time.chart if time else None, clusters, *looked_up]
    return render(
        "comparison.html",
        title=f"Comparison of {len(names)} runs",
        subtitle=", ".join(names),
        picture_width=64,
        metrics={"table": _metrics(names, records), "missing": _missing(names, found)},
        settings=_settings(names, records),
        epochs=epochs,
        time=time,
        clusters=clusters,
        retrieval={"charts": looked_up} if retrieval else None,
        **scripted([chart for chart in drawn if chart is not None]),
    )


def labels_of(records: list[Record]) -> list[str]:
    """A name for each run, all different: of the folder, with as many parents as it takes."""
    parts = [r.run.resolve().parts for r in records]
    names = [show(p[-1]) for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        names = [
            show("/".join(p[-depth:])) if name in twice else name
            for name, p in zip(names, parts, strict=True)
        ]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _metrics(names: list[str], records: list[Record]) -> Table:
    head = ["run", "epochs", "mAP", "rank-1", "rank-5", "rank-10", "mINP", "mAP, re-ranked", "ARI"]
    head += ["clusters", "outliers", "time"]
    rows = []
    for name, record in zip(names, records, strict=True):
        entry = flat(record.log[-1]) if record.log else {}
        last = record.last
        rows.append(
            [
                name,
                f"{len(record.log)} of {record.options.get('epochs', '?')}",
                *(percent(last.get(key)) for key in _METRICS),
                percent(last.get("reranked", {}).get("mAP")),
                percent(entry.get("observed.ari")),
                str(entry.get("clusters", "-")),
                str(entry.get("outliers", "-")),
                duration(seconds_of(record)) if record.log else "-",
            ]
        )
    return Table(head, rows, name="Final metrics")


def _missing(names: list[str], found: Sequence[Findings]) -> list[tuple[str, str]]:
    return grouped(
        {
            f"{name}, {part}": why
            for name, each in zip(names, found, strict=True)
            for part, why in each.missing.items()
            if part != "map"
        }
    )


def _settings(names: list[str], records: list[Record]) -> Table:
    keys = list(dict.fromkeys(key for r in records for key in r.options))
    rows = []
    for key in keys:
        values = [_value(r.options, key) for r in records]
        if key not in _OWN and len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["option", *names], rows, numeric=False, name="Settings that differ")


def _value(options: dict[str, Any], key: str) -> str:
    if key not in options:
        return "not given"
    return "-" if options[key] is None else str(options[key])


def _over_epochs(names: list[str], records: list[Record]) -> list[Chart]:
    drawn = []
    for key, title, text, unit, lines in CURVES:
        for number, (line, logged) in enumerate(lines.items()):
            series = [
                Series(name, epoch_series(r, logged))
                for name, r in zip(names, records, strict=True)
            ]
            # All values are 0 where a part of the loss is off.
            if any(any(s.values.values()) for s in series):
                about = f"{title}: {line}" if line.lower() not in title.lower() else line
                heading = about[0].upper() + about[1:] if about != "mAP" else about
                drawn.append(charts.lines(f"{key}-{number}", heading, text, series, unit=unit))
    return drawn


class _Time(NamedTuple):
    chart: Chart
    table: Table


def _time(names: list[str], records: list[Record]) -> _Time | None:
    """Mean seconds per epoch, if a run has an epoch in its log."""
    means = []
    for record in records:
        entries = [e["seconds"] for e in record.log if e.get("seconds")]
        stages = charts.stage_names(entries)
        means.append({s: sum(e.get(s, 0.0) for e in entries) / len(entries) for s in stages})
    if not any(means):
        return None
    stages = charts.stage_names(means)
    rows = [
        [
            name,
            *(f"{mean[s]:.3g}" if s in mean else "-" for s in stages),
            f"{sum(mean.values()):.3g}",
        ]
        for name, mean in zip(names, means, strict=True)
    ]
    head = ["run", *stages, "all"]
    table = Table(head, rows, caption="Seconds per epoch, mean over the epochs")
    return _Time(charts.stages_of_runs(names, means), table)


def _clusters(names: list[str], found: Sequence[Findings]) -> Chart | None:
    series = [(n, f.sizes) for n, f in zip(names, found, strict=True) if len(f.sizes)]
    return charts.cluster_sizes(series) if series else None


def _retrieval(names: list[str], found: Sequence[Findings]) -> list[Chart]:
    drawn = []
    for number, (name, each) in enumerate(zip(names, found, strict=True)):
        r = each.retrieval
        if r is None:
            continue
        if r.similarities is not None:
            drawn.append(
                charts.similarity(r.similarities, f"similarity-{number}", f"Similarities: {name}")
            )
        if np.isfinite(r.matrix).any():
            drawn.append(charts.cameras(r, f"cameras-{number}", f"From camera to camera: {name}"))
    return drawn
