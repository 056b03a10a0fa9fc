"""How good a ranking is: mAP, CMC and mINP by name, and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from dhcl_ops import RankingMetrics

__all__ = ["RANKS", "by_name", "cameras_apart", "table"]

RANKS = (1, 5, 10)
"""The ranks k of which tables show CMC(k), where nobody asks for others."""


def cameras_apart(
    query: NDArray[Any] | torch.Tensor, gallery: NDArray[Any] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cameras (Q,) and (G,) for :func:`dhcl_ops.evaluate_ranking`, which drops own-camera matches.

    Unknown cameras, all negative numbers, become -1 in queries and -2 in the gallery: two images of
    unknown cameras must not be taken for images of one camera.
    """
    one, other = torch.as_tensor(query), torch.as_tensor(gallery)
    return torch.where(one < 0, -1, one), torch.where(other < 0, -2, other)


def by_name(metrics: RankingMetrics, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """``mAP``, ``rank1``, ``rank5``, ``rank10``, ``mINP`` in [0, 1] and the number of ``queries``.

    Args:
        metrics: of CMC up to the largest of the ranks at least.
        ranks: the k of ``rankK``, from 1.
    """
    found = {f"rank{k}": float(metrics.cmc[k - 1]) for k in ranks}
    return {"mAP": metrics.mAP, **found, "mINP": metrics.mINP, "queries": metrics.num_valid}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by name, in percent, as a Markdown table; the ranks are those of the first row."""
    first = next(iter(rows.values()))
    columns = ("mAP", *(name for name in first if re.fullmatch(r"rank\d+", name)), "mINP")
    width = max(len(name) for name in rows)
    lines = [
        f"| {'':<{width}} | " + " | ".join(f"{c:>6}" for c in columns) + " |",
        f"|{'-' * (width + 2)}|" + "|".join("-------:" for _ in columns) + "|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{100 * row[c]:6.1f}" for c in columns)
        lines.append(f"| {name:<{width}} | {cells} |")
    return "\n".join(lines)
