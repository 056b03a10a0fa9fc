"""Plots of results files: time and memory against N, B and K, and the roofline.

Matplotlib is needed: ``pip install 'dhcl[bench]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Results, Row, case_label, epoch_parts

SIZES = ("N", "K", "B")  # parameters that a plot can have on its horizontal axis


class MissingMatplotlib(RuntimeError):
    """The library that draws is not installed."""


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "dhcl"  # the same file for the same rows
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingMatplotlib("plots need matplotlib: pip install 'dhcl[bench]'") from error
    return plt


def series(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[Row, ...]]]:
    """Rows that differ in the parameter ``axis`` only, by what they have in common.

    Lists hold one tuple of at least two rows per variant, ascending in the parameter.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if isinstance(row.params.get(axis), int):
            rest = {k: v for k, v in row.params.items() if k != axis}
            found.setdefault(case_label(row.op, rest), {}).setdefault(row.variant, []).append(row)
    out: dict[str, list[tuple[Row, ...]]] = {}
    for label, variants in found.items():
        lines = [
            tuple(sorted(group, key=lambda row: row.params[axis]))
            for group in variants.values()
            if len(group) > 1
        ]
        if lines:
            out[label] = lines
    return out


def _growth(plt: Any, op: str, axis: str, groups: dict[str, list[tuple[Row, ...]]]) -> Any:
    """Time above and memory below, a column per group."""
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4.2 * len(groups), 6.4), squeeze=False, layout="constrained"
    )
    names = sorted({line[0].variant for lines in groups.values() for line in lines})
    colour = {name: f"C{number}" for number, name in enumerate(names)}
    for column, (label, lines) in enumerate(groups.items()):
        for line in lines:
            style: dict[str, Any] = {"color": colour[line[0].variant], "marker": "o"}
            style |= {"markersize": 4, "label": line[0].variant}
            x = [row.params[axis] for row in line]
            axes[0][column].plot(x, [row.seconds for row in line], **style)
            known = [row for row in line if row.peak_extra_bytes]
            if known:
                axes[1][column].plot(
                    [row.params[axis] for row in known],
                    [(row.peak_extra_bytes or 0) / 2**20 for row in known],
                    **style,
                )
        # One floor for all variants of a case.
        floors = [row for row in max(lines, key=len) if row.floor_seconds]
        if floors:
            axes[0][column].plot(
                [row.params[axis] for row in floors],
                [row.floor_seconds for row in floors],
                color="black",
                linestyle=":",
                label="floor",
            )
        axes[0][column].set_title(label.removeprefix(f"{op} ").strip("[]") or op, fontsize=7)
        for plot, name in ((axes[0][column], "seconds"), (axes[1][column], "MiB")):
            if not plot.lines:  # a logarithmic axis without points can't be drawn
                plot.set_axis_off()
                continue
            plot.set(xscale="log", yscale="log", xlabel=axis, ylabel=name)
            plot.grid(alpha=0.3)
            if plot.get_legend_handles_labels()[1]:
                plot.legend(fontsize=7)
    figure.suptitle(f"{op}: time and peak memory against {axis}")
    return figure


def _roofline(plt: Any, results: Results, title: str) -> Any | None:
    """Achieved operations per second over operations per byte, under the measured ceilings."""
    ceilings = results.ceilings
    # What takes a fraction of its floor was done elsewhere: a gradient that came with its loss.
    rows = [
        row
        for row in results.rows
        if row.flop and row.bytes_moved and (row.time_over_floor or 1.0) > 0.5
    ]
    if ceilings is None or not rows:
        return None
    figure, plot = plt.subplots(figsize=(7, 5), layout="constrained")
    intensity = [row.flop / row.bytes_moved for row in rows]
    low, high = min(intensity) / 4, max(intensity) * 4
    edges = [low * (high / low) ** (step / 100) for step in range(101)]
    for rate, peak in ceilings.flop_per_second.items():
        roof = [min(peak, x * ceilings.read_bytes_per_second) / 1e9 for x in edges]
        plot.plot(edges, roof, label=f"measured ceiling, {rate}", linewidth=1)
    for number, name in enumerate(sorted({row.variant for row in rows})):
        own = [row for row in rows if row.variant == name]
        plot.plot(
            [row.flop / row.bytes_moved for row in own],
            [row.flop / row.seconds / 1e9 for row in own],
            "ov^sD*Px"[number % 8],
            markersize=5,
            alpha=0.7,
            label=name,
        )
    plot.set(xscale="log", yscale="log", title=f"{title}: roofline")
    plot.set(xlabel="operations per byte that must move", ylabel="GFLOP/s")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=7)
    return figure


def _split(plt: Any, results: Results) -> Any | None:
    """Parts of an epoch other than the network, for each size and batch."""
    totals = [row for row in results.rows if row.op == "epoch: total"]
    if not totals:
        return None
    figure, plot = plt.subplots(figsize=(8, 1.2 + 0.5 * len(totals)), layout="constrained")
    drawn: dict[str, str] = {}
    for place, total in enumerate(totals):
        left = 0.0
        for row in epoch_parts(results.rows, total):
            part = row.op.removeprefix("epoch: ")
            share = 100 * row.seconds / total.seconds
            known = part in drawn
            colour = drawn.setdefault(part, f"C{len(drawn)}")
            plot.barh(place, share, left=left, color=colour, label=None if known else part)
            left += share
    names = [f"{t.params['data']}, B={t.params['B']}, {t.variant}" for t in totals]
    plot.set_yticks(range(len(totals)), names, fontsize=8)
    plot.set(xlabel="% of the epoch", title="An epoch without its backbone")
    plot.legend(fontsize=7)
    return figure


def draw(results: Results, family: str, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw all plots that the rows of one family allow; returns the files written.

    Raises:
        MissingMatplotlib: it is not installed.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for op in dict.fromkeys(row.op for row in results.rows):
        for axis in SIZES:
            groups = series([row for row in results.rows if row.op == op], axis)
            if groups:
                name = op.replace(" ", "-").replace(":", "").strip("_")
                figures[f"{family}-{name}-{axis}"] = _growth(plt, op, axis, groups)
    figures[f"{family}-roofline"] = _roofline(plt, results, family)
    figures[f"{family}-parts"] = _split(plt, results)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}{suffix}")
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(written[-1], metadata=metadata, dpi=100)
            plt.close(figure)
    return written
