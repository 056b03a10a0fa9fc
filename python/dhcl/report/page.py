"""The HTML page: one file, with styles, scripts, charts and pictures in it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dhcl.config import ConfigError
from dhcl.report.charts import Chart
from dhcl_ops._version import __version__

__all__ = ["chart_grid", "escape", "missing", "numbers", "page", "picture", "table"]

# Nothing may be fetched from anywhere, whatever is in the page.
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'none'"
)
_HERE = Path(__file__).parent


def escape(text: object) -> str:
    """For text and attributes of HTML."""
    return html.escape(str(text))


def page(
    title: str,
    subtitle: str,
    sections: Sequence[tuple[str, str, str]],
    charts: Sequence[Chart],
    pictures: Sequence[str] = (),
    points: Mapping[str, Any] | None = None,
    picture_width: int = 64,
) -> bytes:
    """The file.

    Args:
        title, subtitle: text.
        sections: key, heading (text) and content (HTML) of each.
        charts: figures whose places are in the sections, see :func:`chart_grid`.
        pictures: data URIs; ``<img data-picture="3">`` shows the fourth.
        points: of the map: ``cluster``, ``person``, ``camera``, ``picture`` and ``text`` of each.
        picture_width: pixels of a picture of 128 pixels' height.

    Raises:
        ConfigError: Plotly is not installed.
    """
    links = "".join(f'<li><a href="#{k}">{escape(h)}</a></li>' for k, h, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(heading)}</h2>'
        f"{content}</section>"
        for key, heading, content in sections
    )
    data = {"figures": {c.key: c.figure for c in charts}, "pictures": list(pictures)}
    if points is not None:
        data["points"] = dict(points)
    scripts = "".join(
        f'<script type="application/json" id="{name}">{_json(value)}</script>\n'
        for name, value in data.items()
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dhcl {__version__}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}:root {{ --wide: {picture_width}px; }}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p></header>
<nav aria-label="Sections"><div><ul>{links}</ul>
<button type="button" id="theme">Dark</button></div></nav>
<main id="main">{body}</main>
<footer>Written by dhcl {escape(__version__)}. The file needs no network.</footer>
<div id="tip" role="status" hidden></div>
{scripts}<script>{_plotly()}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""
    return text.encode("utf-8", "backslashreplace")


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a report needs {error.name}, which is not installed: pip install 'dhcl[train]'"
        ) from error
    return str(get_plotlyjs())


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for an end tag or a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# ---- parts --------------------------------------------------------------------------------------


def numbers(values: Iterable[tuple[str, str]]) -> str:
    """Key figures: name and value."""
    return (
        '<dl class="numbers">'
        + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in values)
        + "</dl>"
    )


def missing(reasons: Mapping[str, str] | str) -> str:
    """What is not there and why: several parts, or one reason."""
    if isinstance(reasons, str):
        return f'<div class="missing"><p>Not shown: {escape(reasons)}.</p></div>'
    if not reasons:
        return ""
    parts: dict[str, list[str]] = {}
    for part, why in reasons.items():
        parts.setdefault(why, []).append(part)
    items = "".join(
        f"<li><b>{escape(', '.join(names))}</b>: {escape(why)}</li>" for why, names in parts.items()
    )
    return f'<div class="missing"><p>What this report does not have:</p><ul>{items}</ul></div>'


def chart_grid(charts: Iterable[Chart], extra: Mapping[str, str] | None = None) -> str:
    """Places of charts; ``extra`` is HTML above some of them, by key."""
    out = []
    for chart in charts:
        # The map takes keys.
        keys = ' tabindex="0"' if chart.key == "map" else ""
        out.append(
            f"<figure{' class=wide' if chart.wide else ''}><h3>{escape(chart.title)}</h3>"
            f"<figcaption>{escape(chart.text)}</figcaption>{(extra or {}).get(chart.key, '')}"
            f'<div class="chart" id="chart-{chart.key}" role="group"{keys} '
            f'aria-label="{escape(f"Chart: {chart.title}. {chart.alt}")}" '
            f'style="height:{chart.figure["layout"]["height"]}px"></div></figure>'
        )
    return f'<div class="charts">{"".join(out)}</div>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    changed: Iterable[int] = (),
    numeric: bool = True,
    name: str = "Table",
    caption: str = "",
) -> str:
    """Rows of text; the first cell is the row's heading. Rows in ``changed`` stand out.

    ``name`` is for those who can't see it; a ``caption`` is shown and takes its place.
    """
    kind = ' class="number"' if numeric else ""
    marked = set(changed)
    lines = "".join(
        f'<tr{" class=changed" if i in marked else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for i, row in enumerate(rows)
    )
    heads = "".join(
        f'<th scope="col"{kind if i else ""}>{escape(h)}</th>' for i, h in enumerate(head)
    )
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or name)}">'
        f"<table>{named}<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def picture(number: int, kind: str, alt: str, lines: Sequence[str]) -> str:
    """An item of a row of pictures; ``lines`` is HTML below it."""
    shown = (
        f'<img data-picture="{number}" alt="{escape(alt)}">'
        if number >= 0
        else f'<span class="nopicture" role="img" aria-label="{escape(alt)}">no picture</span>'
    )
    return f'<li class="{kind}">{shown}{"<br>".join(lines)}</li>'
