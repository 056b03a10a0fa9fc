"""Charts as Plotly figures in plain dictionaries.

Colours are names that the page replaces, so that they suit its light or dark look: ``@0`` to ``@7``
of a series, ``@text``, ``@muted``, ``@grid``, ``@page``, and ``@scale`` for a colour scale.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dhcl.report.gather import Map, Retrieval, Similarities

__all__ = [
    "STAGES",
    "Chart",
    "Series",
    "cameras",
    "cluster_sizes",
    "lines",
    "plane",
    "similarity",
    "stages",
    "stages_of_runs",
]

# In the order of an epoch.
STAGES = ("extract", "neighbours", "jaccard", "dbscan", "train", "evaluate")
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLOURS = 8


@dataclass(frozen=True)
class Chart:
    """A figure with what is said about it.

    Attributes:
        key: its name in the page.
        title: heading.
        text: how to read it, one or two sentences; no HTML.
        alt: what it shows, for those who can't see it.
        figure: ``data`` and ``layout`` of Plotly.
        wide: over the whole width.
    """

    key: str
    title: str
    text: str
    alt: str
    figure: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Series:
    """A line: a name and values by epoch, from 1."""

    name: str
    values: Mapping[int, float]


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "@grid", "zerolinecolor": "@grid", "automargin": True}
    layout: dict[str, Any] = {
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}, "rangemode": "tozero"},
        "height": 320,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {
            "traceorder": "normal",
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@text", "size": 13},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@text"},
        "hoverlabel": {"bgcolor": "@page", "bordercolor": "@muted", "font": {"color": "@text"}},
    }
    for name, value in more.items():
        layout[name] = {**layout[name], **value} if isinstance(layout.get(name), dict) else value
    return layout


def _legend(text: str) -> str:
    """Plotly reads tags in its texts."""
    return html.escape(text, quote=False)


def colour(number: int) -> str:
    """Name of the colour of a series."""
    return f"@{number % _COLOURS}"


def lines(
    key: str,
    title: str,
    text: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    wide: bool = False,
) -> Chart:
    """Values over epochs; ``unit="%"`` for shares. Lines without a value are left out."""
    percent = unit == "%"
    data = []
    parts = []
    longest = 0
    for number, line in enumerate(series):
        points = {e: v for e, v in sorted(line.values.items()) if math.isfinite(v)}
        if not points:
            continue
        longest = max(longest, *points)
        last = max(points)
        shown = f"{100 * points[last]:.1f} %" if percent else f"{points[last]:.4g}"
        parts.append(f"{line.name}: {shown} after epoch {last}")
        data.append(
            {
                "type": "scatter",
                "name": _legend(line.name),
                "x": list(points),
                "y": [_round(v) for v in points.values()],
                "mode": "lines+markers" if len(points) < 40 else "lines",
                "marker": {"size": 9 if len(points) == 1 else 5, "color": colour(number)},
                "line": {
                    "color": colour(number),
                    "width": 2,
                    "dash": _DASHES[number // _COLOURS % len(_DASHES)],
                },
            }
        )
    layout = _layout("epoch", "", showlegend=len(data) > 1, hovermode="x unified")
    layout["height"] += 10 * max(len(data) - 4, 0)  # for the legend
    # Whole epochs only.
    layout["xaxis"].update(rangemode="normal", tickformat="d", dtick=_step(longest))
    layout["xaxis"]["range"] = [0.5, longest + 0.5]
    if percent:
        layout["yaxis"]["tickformat"] = ".0%"
        layout["yaxis"]["hoverformat"] = ".1%"
    else:
        layout["yaxis"]["hoverformat"] = ".4~g"
    return Chart(key, title, text, "; ".join(parts), {"data": data, "layout": layout}, wide)


def _step(longest: int) -> int:
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if longest / step <= 12:
            return step
    return 1000


def _round(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def stages(seconds: Mapping[int, Mapping[str, float]]) -> Chart:
    """Time of each stage, stacked, over epochs."""
    names = stage_names(seconds.values())
    epochs = list(seconds)
    data: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        data.append(
            {
                "type": "bar",
                "name": _legend(name),
                "x": epochs,
                "y": [_round(seconds[e].get(name, 0.0)) for e in epochs],
                "marker": {"color": colour(number)},
            }
        )
    totals = {name: sum(s.get(name, 0.0) for s in seconds.values()) for name in names}
    alt = "; ".join(f"{name}: {total:.1f} s" for name, total in totals.items())
    layout = _layout(
        "epoch", "seconds", barmode="stack", hovermode="x unified", bargap=0.15,
        showlegend=True,
    )  # fmt: skip
    layout["xaxis"].update(tickformat="d", dtick=_step(max(epochs, default=1)))
    layout["yaxis"]["hoverformat"] = ".3~g"
    return Chart(
        "stages",
        "Time per stage",
        "Seconds of each epoch. Neighbours, jaccard and dbscan together are the clustering.",
        f"Over all epochs: {alt}",
        {"data": data, "layout": layout},
    )


def stage_names(entries: Any) -> list[str]:
    """Stages that occur, in the order of an epoch."""
    there = dict.fromkeys(name for entry in entries for name in entry)
    return [s for s in STAGES if s in there] + [s for s in there if s not in STAGES]


def stages_of_runs(runs: Sequence[str], totals: Sequence[Mapping[str, float]]) -> Chart:
    """Mean seconds per epoch of each stage, one bar a run."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _legend(name),
            "y": [_legend(run) for run in runs],
            "x": [_round(total.get(name, 0.0)) for total in totals],
            "marker": {"color": colour(number)},
        }
        for number, name in enumerate(stage_names(totals))
    ]
    layout = _layout("seconds per epoch", "", barmode="stack", showlegend=True)
    layout["yaxis"].update(autorange="reversed", type="category")
    layout["height"] = 150 + 36 * len(runs)
    alt = "; ".join(
        f"{run}: {sum(total.values()):.1f} s an epoch"
        for run, total in zip(runs, totals, strict=True)
    )
    text = "Mean over the epochs of each run."
    return Chart("stages", "Time per stage", text, alt, {"data": data, "layout": layout}, wide=True)


def cluster_sizes(series: Sequence[tuple[str, Any]]) -> Chart:
    """How many clusters there are of each size; of one run, or of several as lines."""
    data: list[dict[str, Any]] = []
    parts = []
    several = len(series) > 1
    largest = max((int(sizes.max()) for _, sizes in series if len(sizes)), default=1)
    width = max(1, math.ceil(largest / 40))
    edges = np.arange(0, largest + width + 1, width) + 0.5
    middle = (edges[:-1] + edges[1:]) / 2
    spans = [
        f"{int(a + 0.5)}" if width == 1 else f"{int(a + 0.5)} to {int(b - 0.5)}"
        for a, b in itertools.pairwise(edges)
    ]
    for number, (name, sizes) in enumerate(series):
        counts = np.histogram(sizes, edges)[0]
        median = float(np.median(sizes)) if len(sizes) else 0
        biggest = int(sizes.max()) if len(sizes) else 0
        about = f"{len(sizes)} clusters, median {median:g}, largest {biggest} images"
        parts.append(f"{name}: {about}" if name else about)
        shared = {
            "name": _legend(name),
            "x": [_round(x) for x in middle],
            "y": counts.tolist(),
            "customdata": spans,
            "hovertemplate": "%{customdata} images: %{y} clusters<extra></extra>",
        }
        if len(series) == 1:
            data.append(
                {**shared, "type": "bar", "width": width * 0.9, "marker": {"color": colour(0)}}
            )
        else:
            shared["hovertemplate"] = "%{customdata} images: %{y} clusters"
            line = {
                "shape": "hvh",
                "color": colour(number),
                "dash": _DASHES[number // _COLOURS % len(_DASHES)],
            }
            data.append({**shared, "type": "scatter", "mode": "lines", "line": line})
    layout = _layout(
        "images in the cluster", "clusters", showlegend=len(series) > 1, height=260 + 60 * several
    )
    return Chart(
        "sizes",
        "Cluster sizes",
        "How many clusters have how many images. Few very large ones often hold several people.",
        "; ".join(parts),
        {"data": data, "layout": layout},
        wide=True,
    )


def similarity(found: Similarities, key: str = "similarity", title: str = "") -> Chart:
    """Histograms of positive and negative pairs."""
    middle = (found.edges[:-1] + found.edges[1:]) / 2
    seen = np.flatnonzero(found.positive + found.negative)
    part = slice(int(seen[0]), int(seen[-1]) + 1)
    data = []
    pairs = (
        ("same person", found.positive, 2, "solid"),
        ("different people", found.negative, 1, "dot"),
    )
    for name, counts, number, dash in pairs:
        share = counts / counts.sum()
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "fill": "tozeroy",
                "name": name,
                "x": [_round(x) for x in middle[part]],
                "y": [_round(y) for y in share[part]],
                "line": {"shape": "hvh", "color": colour(number), "dash": dash, "width": 2},
            }
        )
    layout = _layout("cosine similarity", "share of pairs", hovermode="x unified", showlegend=True)
    layout["yaxis"].update(tickformat=".0%", hoverformat=".2%")
    layout["xaxis"]["hoverformat"] = ".2f"
    pair = "in different cameras" if found.across else "(cameras are not known)"
    return Chart(
        key,
        title or "Similarities",
        f"Pairs of a query and a gallery image {pair}: {found.positive.sum():,} of the same "
        f"person, {found.negative.sum():,} of different people. The less they overlap, the better.",
        f"Same person: mean similarity {found.mean_positive:.2f}; different people: "
        f"{found.mean_negative:.2f}",
        {"data": data, "layout": layout},
    )


def cameras(found: Retrieval, key: str = "cameras", title: str = "") -> Chart:
    """mAP of queries of each camera against the gallery of each."""
    names = [f"camera {c + 1}" for c in found.cameras]
    values = [[_round(v) for v in row] for row in found.matrix]
    known = found.matrix[~np.isnan(found.matrix)]
    count = len(names)
    data = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": values,
        "zmin": 0,
        "zmax": 1,
        "colorscale": "@scale",
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "queries of %{y}, gallery of %{x}: mAP %{z:.1%}<extra></extra>",
        "hoverongaps": False,
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
        "textfont": {"color": "@text"},
        "texttemplate": "%{z:.0%}" if count <= 12 else "",
    }
    layout = _layout("gallery of", "queries of")
    layout["xaxis"].update(showgrid=False, zeroline=False, type="category")
    layout["yaxis"].update(showgrid=False, zeroline=False, type="category", autorange="reversed")
    layout["height"] = max(320, 140 + 26 * count)
    alt = "nothing to find across cameras"
    if known.size:
        low, high = float(np.min(known)), float(np.max(known))
        alt = (
            f"lowest mAP {low:.1%} ({_where(found, low)}), "
            f"highest {high:.1%} ({_where(found, high)})"
        )
    return Chart(
        key,
        title or "From camera to camera",
        "mAP of the queries of one camera among the gallery images of another. Within a camera "
        "nothing counts, as in evaluation, so the diagonal is empty.",
        alt,
        {"data": [data], "layout": layout},
    )


def _where(found: Retrieval, value: float) -> str:
    i, j = np.argwhere(found.matrix == value)[0]
    return f"queries of camera {found.cameras[i] + 1}, gallery of camera {found.cameras[j] + 1}"


def plane(found: Map, labels: Any, texts: Sequence[str]) -> Chart:
    """The map: a point per image; the page colours it and shows the image on hover."""
    alone = labels[found.images] < 0
    data = {
        "type": "scatter",
        "mode": "markers",
        "x": [_round(x) for x in found.xy[:, 0]],
        "y": [_round(y) for y in found.xy[:, 1]],
        "hoverinfo": "none",
        "marker": {
            "size": 7,
            "symbol": ["x-thin-open" if a else "circle" for a in alone],
            "color": ["@muted"] * len(alone),
            "line": {"width": 1.2, "color": ["@muted"] * len(alone)},
        },
    }
    layout = _layout("", "", height=620, hovermode="closest", showlegend=False, dragmode="pan")
    for name in ("xaxis", "yaxis"):
        layout[name] = {"visible": False}
    layout["yaxis"]["scaleanchor"] = "x"
    what = "features of training images" if found.extracted else "rows of the memory bank"
    why = (
        " This run's memory has a row per cluster, so the model's features are shown."
        if found.extracted
        else ""
    )
    return Chart(
        "map",
        "Map of the bank",
        f"{len(texts):,} of {found.total:,} {what}, laid out by t-SNE: near points are similar, "
        f"distances between groups mean little.{why} Crosses are outliers. Point at one, or focus "
        "the map and press the arrow keys, to see the image.",
        f"{int((~alone).sum())} images of {len(set(labels[found.images][~alone].tolist()))} "
        f"clusters, {int(alone.sum())} outliers",
        {"data": [data], "layout": layout},
        wide=True,
    )
