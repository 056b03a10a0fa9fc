"""The commands ``dhcl report`` and ``dhcl compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dhcl.errors import ConfigError
from dhcl.words import say, show

__all__ = ["compare", "report"]


@dataclass(frozen=True)
class ReportArguments:
    """Write what a run did as one HTML file: curves, clusters, ranked lists, a map."""

    run: tyro.conf.Positional[Path]
    """Folder that the run lies in, finished or not."""
    out: Path | None = None
    """File to write; report.html in the run by default."""
    root: Path | None = None
    """Folder that the images lie in now, if they were moved since the training."""
    queries: int = 10
    """Number of queries to show of each kind: best, median and worst."""
    topk: int = 10
    """Number of images in the ranked list of a query."""
    clusters: int = 8
    """Number of clusters to show of each kind, such as the largest, purest or most mixed."""
    points: int = 1500
    """Largest number of points on the map of the features."""
    workers: int | None = None
    """Number of processes that load images; by default as in training."""


@dataclass(frozen=True)
class CompareArguments:
    """Write the charts of several runs as one HTML file, and what differs in their settings."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that the runs lie in."""
    out: Path = Path("compare.html")
    """File that the page is written to."""
    root: Path | None = None
    """Folder that the images of all runs lie in now, if they were moved since the training."""
    retrieval: bool = True
    """Whether to extract test features, for similarities and cameras of each run."""


def report(given: ReportArguments) -> None:
    """Write the report of a run."""
    for name in ("queries", "topk", "clusters", "points"):
        if getattr(given, name) < 1:
            raise ConfigError(f"{name}: must be at least 1 (got {getattr(given, name)})")
    if given.workers is not None and given.workers < 0:
        raise ConfigError(f"workers: must be at least 0 (got {given.workers})")
    from dhcl.report.gather import Limits
    from dhcl.report.pages import check_file
    from dhcl.report.single import write_report
    from dhcl.training.record import read_record
    from dhcl.training.results import collect

    record = read_record(given.run)
    record.change(root=given.root, workers=given.workers)
    limits = Limits(queries=given.queries, topk=given.topk, clusters=given.clusters)
    out = given.out or given.run / "report.html"
    check_file(out)  # before the work
    path = write_report(collect(record, points=given.points), out=out, limits=limits)
    say(f"report: {show(path)}")


def compare(given: CompareArguments) -> None:
    """Write the comparison of several runs."""
    if len(given.runs) < 2:
        raise ConfigError(f"runs: at least two are needed to compare (got {len(given.runs)})")
    from dhcl.report.several import write_comparison
    from dhcl.training.record import Record, read_record
    from dhcl.training.results import Results, collect

    records = [read_record(run) for run in given.runs]  # all of them before the work

    def results(record: Record) -> Results:
        if not given.retrieval:
            return Results(record)
        record.change(root=given.root)
        return collect(record, points=0)

    path = write_comparison(map(results, records), out=given.out, retrieval=given.retrieval)
    say(f"comparison: {show(path)}")
