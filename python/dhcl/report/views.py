"""What the template of a run's page lays out: texts, charts and thumbnails by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dhcl.report.charts import Chart
from dhcl.report.pages import Table

__all__ = [
    "Clusters",
    "Configuration",
    "Epochs",
    "Lists",
    "Map",
    "Overview",
    "Picture",
    "Query",
    "Retrieval",
    "Sheet",
    "Sheets",
]


@dataclass(frozen=True)
class Overview:
    """Key figures, name and value; and what is missing, with its reason."""

    figures: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Epochs:
    """Charts of the log and its table; or a reason why there are none."""

    reason: str = ""
    charts: tuple[Chart, ...] = ()
    missing: Sequence[tuple[str, str]] = ()
    log: Table | None = None


@dataclass(frozen=True)
class Picture:
    """An image in a row of them.

    Attributes:
        number: of its thumbnail, -1 if it has none.
        kind: ``query``, ``right``, ``wrong`` or nothing.
        alt: what it is, for those who can't see it.
        lines: of text below it.
    """

    number: int
    kind: str
    alt: str
    lines: tuple[str, ...]

    @property
    def mark(self) -> str:
        """Before the first line, since a colour alone says nothing to some."""
        return {"right": "✓", "wrong": "✗"}.get(self.kind, "")


@dataclass(frozen=True)
class Sheet:
    """A contact sheet of a cluster, or of the outliers; ``kinds`` say why it is shown."""

    name: str
    about: str
    pictures: tuple[Picture, ...]
    kinds: tuple[str, ...] = ()
    size: int = 1


@dataclass(frozen=True)
class Sheets:
    """Contact sheets; ``kinds`` are the choices of a filter, value to text."""

    about: str
    kinds: Mapping[str, str]
    clusters: Sequence[Sheet]
    outliers: Sheet | None


@dataclass(frozen=True)
class Clusters:
    """A chart of sizes and contact sheets, or a reason why either is not there."""

    sizes: Chart | None
    reason: str = ""
    sheets: Sheets | None = None


@dataclass(frozen=True)
class Query:
    """A ranked list: the query's picture and those of the gallery. ``camera`` counts from 1."""

    name: str
    kind: str
    about: str
    camera: str
    person: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Lists:
    """Ranked lists; ``kinds`` and ``cameras`` are the choices of their filters."""

    about: str
    kinds: Mapping[str, str]
    cameras: Sequence[int]
    queries: Sequence[Query]


@dataclass(frozen=True)
class Retrieval:
    """How the test images are found, or a reason why it is not known."""

    reason: str = ""
    text: str = ""
    charts: tuple[Chart, ...] = ()
    lists: Lists | None = None


@dataclass(frozen=True)
class Map:
    """The chart and by what its points can be coloured, value to text; or a reason."""

    reason: str = ""
    chart: Chart | None = None
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Configuration:
    """The options of the run, or a reason why they can't be read."""

    reason: str = ""
    options: Table | None = None
