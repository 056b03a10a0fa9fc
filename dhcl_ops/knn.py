"""Exact nearest neighbours by inner product, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Neighbours", "knn"]

_BLOCK = 1024


class Neighbours(NamedTuple):
    """What :func:`knn` returns.

    ``similarities`` (Q, k) float32 and ``indices`` (Q, k) int64, best first; ``uncertified`` is the
    number of rows (int64, 0-d) that had to be searched again.
    """

    similarities: torch.Tensor
    indices: torch.Tensor
    uncertified: torch.Tensor


def knn(
    features: torch.Tensor,
    k: int,
    *,
    queries: torch.Tensor | None = None,
    backend: str = "auto",
    precision: str = "exact",
    progress: Callable[[str, int, int], object] | None = None,
) -> Neighbours:
    """Find the k features of largest inner product with each query; ties go to the lower index.

    Without queries the features are searched for themselves, and each row comes first in its list.
    """
    features = features.detach().float()
    rows = features if queries is None else queries.detach().float()
    similarities = rows.new_empty(len(rows), k)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] @ features.T
        keys = block.clone()
        if queries is None:
            own = torch.arange(len(block), device=block.device)
            keys[own, start + own] = torch.inf
        # More than k, so that ties at the end are seen; a row full of ties is sorted as a whole.
        kept = min(k + 16, len(features))
        values, found = keys.topk(kept, dim=1)
        found, order = found.sort(dim=1)
        values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        found = found.gather(1, best)
        if 0 < k < kept < len(features):
            tied = (values[:, k - 1] == values[:, -1]).nonzero().squeeze(1)
            for row in tied.tolist():
                order_of_row = keys[row].sort(descending=True, stable=True).indices
                found[row] = order_of_row[:kept]
        found = found[:, :k]
        indices[start : start + len(block)] = found
        similarities[start : start + len(block)] = block.gather(1, found)
        if progress is not None:
            progress("neighbours", start + len(block), len(rows))
    return Neighbours(similarities, indices, torch.zeros((), dtype=torch.int64))
