"""From plain data to a file: the templates of the pages, and what several of them show.

Jinja2 escapes everything that a template prints, so a name with markup in it stays a name.
Templates lay out; numbers and texts come ready from Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dhcl.config import ConfigError
from dhcl.report.charts import Chart
from dhcl.words import show
from dhcl_ops import __version__

__all__ = ["Table", "check_file", "grouped", "percent", "render", "scripted"]


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell is the row's heading.

    Attributes:
        head: headings of the columns.
        rows: their cells.
        changed: numbers of rows that stand out.
        numeric: whether the cells after the first are numbers.
        name: for those who can't see it.
        caption: is shown, and takes the place of the name.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    changed: Sequence[int] = ()
    numeric: bool = True
    name: str = "Table"
    caption: str = ""


def render(template: str, **content: Any) -> bytes:
    """A page as the bytes of its file.

    Args:
        template: its name in ``dhcl/report/templates``.
        content: what the template shows; it raises on a name that is not given.

    Raises:
        ConfigError: Plotly is needed and not installed.
    """
    text = _environment().get_template(template).render(content)
    # What can't be encoded are bytes of file names.
    return text.encode("utf-8", "backslashreplace")


def scripted(
    charts: Sequence[Chart],
    pictures: Sequence[str] = (),
    points: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """What the scripts of a page of charts read, for :func:`render`.

    Args:
        charts: in the order in which they are drawn; their places are in the page by key.
        pictures: data URIs; ``<img data-picture="3">`` shows the fourth.
        points: of the map: ``cluster``, ``person``, ``camera``, ``picture`` and ``text`` of each.
    """
    data: dict[str, Any] = {"figures": {c.key: c.figure for c in charts}, "pictures": pictures}
    return {"data": data if points is None else {**data, "points": points}}


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dhcl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Figures keep their order; NaN is no JSON.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals.update(version=__version__, asset=_asset, plotly=_plotly)
    return environment


def _asset(name: str) -> Markup:
    """A style sheet or script of ours."""
    file = resources.files("dhcl.report") / "templates" / name
    return Markup(file.read_text(encoding="utf-8"))


def _plotly() -> Markup:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a report needs {error.name}, which is not installed: pip install 'dhcl[train]'"
        ) from error
    return Markup(get_plotlyjs())


def check_file(out: Path) -> None:
    """Raise :class:`ConfigError` if no page can be written there, before there is one to write."""
    if not out.parent.is_dir():
        raise ConfigError(f"out: there is no folder {show(out.parent)} to write {out.name} in")
    if out.is_dir():
        raise ConfigError(f"out: must be a file (got the folder {show(out)})")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text, a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.{digits}f} %"


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is missing and why, the names of parts with the same reason together."""
    parts: dict[str, list[str]] = {}
    for part, why in reasons.items():
        parts.setdefault(why, []).append(part)
    return [(", ".join(names), why) for why, names in parts.items()]
