"""Ranking a gallery for each query, by features: in memory, or block by block from a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.errors import ConfigError
from dhcl_ops import knn, rerank
from dhcl_ops.defaults import ZHONG

__all__ = ["Backend", "Found", "nearest", "search"]

Backend = Literal["auto", "torch", "faiss"]

# Gallery rows in memory at a time.
_BLOCK = 1 << 14


class Found(NamedTuple):
    """The best of a gallery for each query, best first; ties by ascending index.

    ``indices`` (Q, k) int64 into the gallery, ``similarities`` (Q, k) float32 cosines in [-1, 1],
    and with re-ranking ``distances`` (Q, k) float32, by which they are then ordered.
    """

    indices: torch.Tensor
    similarities: torch.Tensor
    distances: torch.Tensor | None = None


def search(
    query: torch.Tensor,
    gallery: torch.Tensor,
    topk: int,
    reranked: bool = False,
    *,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """:meth:`dhcl.ReID.search` on features (Q, d) and (G, d) with rows of length 1."""
    topk = min(topk, len(gallery))
    if not topk or not len(query):
        nothing = torch.empty(len(query), topk)
        return Found(nothing.long(), nothing, nothing.clone() if reranked else None)
    if not reranked:
        near = knn(gallery, topk, queries=query, progress=progress)
        return Found(near.indices, near.similarities)
    lists = rerank(query, gallery, k1, k2, lambda_value, topk=topk, progress=progress)
    pairs = zip(query, lists.indices, strict=True)
    similarities = torch.stack([gallery[chosen] @ row for row, chosen in pairs])
    return Found(lists.indices, similarities, lists.distances)


def nearest(
    query: torch.Tensor,
    gallery: NDArray[np.float32],
    rows: NDArray[np.int64] | None,
    topk: int,
    *,
    backend: Backend = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """The nearest of some rows of a gallery, block by block, so that memory does not grow with it.

    Exact; best first, ties by row.

    Args:
        query: (Q, d) float32, rows of length 1.
        gallery: (N, d) float32, rows of length 1; may be memory-mapped.
        rows: (n,) the rows that count, ascending; None for all.
        topk: how many for each query; of fewer rows all.
        backend: what computes similarities: ``faiss``, ``torch``, or faiss where it is installed.
            They differ in the last places at most.
        progress: called as ``progress("search", rows_done, rows)``.

    Raises:
        ConfigError: no faiss.
    """
    find = _faiss_nearest if _use_faiss(backend) else _torch_nearest
    count = len(gallery) if rows is None else len(rows)
    topk = min(topk, count)
    best = torch.empty(len(query), 0)
    found = torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        part = slice(start, stop) if rows is None else rows[start:stop]
        similarities, indices = find(query, gallery[part], min(topk, stop - start))
        # The best so far come first, so that a stable sort keeps ties in order.
        best = torch.cat([best, similarities], 1)
        found = torch.cat([found, indices + start], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, found = best[:, :topk], found.gather(1, order)[:, :topk]
        if progress:
            progress("search", stop, count)
    return Found(found if rows is None else torch.from_numpy(rows)[found], best)


def _use_faiss(backend: Backend) -> bool:
    there = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not there:
        raise ConfigError(
            "backend: faiss is not installed (pip install faiss-cpu); torch needs nothing and "
            "finds the same"
        )
    return there and backend != "torch"


def _torch_nearest(
    query: torch.Tensor, gallery: NDArray[np.float32], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    near = knn(torch.from_numpy(np.array(gallery)), k, queries=query)
    return near.similarities, near.indices


def _faiss_nearest(
    query: torch.Tensor, gallery: NDArray[np.float32], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By faiss's flat inner product, straight from the memory-mapped rows."""
    import faiss

    similarities, indices = faiss.knn(
        np.ascontiguousarray(query.numpy()),
        np.ascontiguousarray(gallery),
        k,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    # Among equals, the lower row first.
    order = np.lexsort((indices, -similarities), axis=1)
    return (
        torch.from_numpy(np.take_along_axis(similarities, order, 1)),
        torch.from_numpy(np.take_along_axis(indices, order, 1).astype(np.int64)),
    )
