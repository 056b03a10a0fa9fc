"""The figures of :mod:`benchmarks.evidence` as a table: means, and differences of pairs.

Nothing here trains, so that the page can be made again from the committed figures alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["BEGIN", "COLUMNS", "END", "between_markers", "results_of", "section"]

BEGIN = "<!-- evidence: begin (python -m benchmarks.evidence --write) -->"
END = "<!-- evidence: end -->"
# Title of a column, and where a run's metrics have its figure.
COLUMNS = {
    "mAP": ("mAP",),
    "rank-1": ("rank1",),
    "mAP, re-ranked": ("reranked", "mAP"),
    "rank-1, re-ranked": ("reranked", "rank1"),
}
NONE = "\N{EN DASH}"


def figure(metrics: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """A run's figure in percent; None where it was not measured."""
    value: Any = metrics
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else 100.0 * float(value)


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], path: Sequence[str]
) -> dict[str, float]:
    """Of the seeds that both settings have: the first's figure less the second's, in points."""
    found = {}
    for seed in one:
        a, b = figure(one[seed], path), figure(other.get(seed, {}), path)
        if a is not None and b is not None:
            found[seed] = a - b
    return found


def results_of(
    figures: Mapping[str, Any],
    comparisons: Sequence[tuple[str, str]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What is kept of the runs: their metrics by bed, setting and seed, and what was compared.

    Args:
        figures: metrics by bed, setting and seed.
        comparisons: pairs of settings.
        about: beds, starts and settings, for whoever wants to know what a name stands for.
    """
    return {**about, "comparisons": [list(pair) for pair in comparisons], "figures": dict(figures)}


def section(results: Mapping[str, Any]) -> str:
    """The text between the markers, and these."""
    lines = [BEGIN]
    for bed, settings in results["figures"].items():
        lines += ["", f"**{bed}**", "", *_means(settings)]
        pairs = [pair for pair in results["comparisons"] if all(name in settings for name in pair)]
        if pairs:
            lines += ["", *_pairs(settings, pairs)]
    return "\n".join([*lines, "", END])


def _means(settings: Mapping[str, Any]) -> list[str]:
    """Mean and standard deviation over the seeds of each setting."""
    lines = [f"| setting | {' | '.join(COLUMNS)} | seeds |", f"|---|{'---:|' * len(COLUMNS)}---|"]
    for name, seeds in settings.items():
        cells = []
        for path in COLUMNS.values():
            values = [v for each in seeds.values() if (v := figure(each, path)) is not None]
            cells.append(_spread(values))
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(sorted(seeds, key=int))} |")
    return lines


def _pairs(settings: Mapping[str, Any], pairs: Sequence[Sequence[str]]) -> list[str]:
    """Mean and standard deviation of the differences, and how many seeds agree with the mean."""
    lines = [f"| difference | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for one, other in pairs:
        cells = []
        for path in COLUMNS.values():
            values = list(differences(settings[one], settings[other], path).values())
            agree = sum(v * sum(values) > 0 for v in values)
            count = f", {agree} of {len(values)}" if values else ""
            cells.append(_spread(values, signed=True) + count)
        lines.append(f"| {one} less {other} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and, of several, the standard deviation."""
    if not values:
        return NONE
    sign = "+" if signed else ""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def between_markers(page: str, text: str) -> str:
    """The page with this text, markers included, in place of what its markers hold.

    Raises:
        ValueError: the page does not have both, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the markers {BEGIN} and {END}")
    return before + text + after
