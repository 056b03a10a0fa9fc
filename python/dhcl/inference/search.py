"""Ranking a gallery for each query, by features: in memory, or as it comes, block by block."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.errors import ConfigError
from dhcl_ops import knn, rerank
from dhcl_ops.defaults import ZHONG

__all__ = ["Backend", "Found", "Nearest", "nearest", "search"]

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


class Nearest(NamedTuple):
    """Numbers (Q, k) int64 and similarities (Q, k) float32, best first, of ``seen`` rows."""

    rows: torch.Tensor
    similarities: torch.Tensor
    seen: int


def nearest(
    query: torch.Tensor,
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    topk: int,
    *,
    backend: Backend = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    count: int = 0,
) -> Nearest:
    """The nearest rows of a gallery that comes block by block, so that it need not be in memory.

    Exact; best first, ties in the order of coming.

    Args:
        query: (Q, d) float32, rows of length 1.
        blocks: numbers (n,) of rows, ascending, and their features (n, d), of length 1.
        topk: how many for each query; of fewer rows all.
        backend: what computes similarities: ``faiss``, ``torch``, or faiss where it is installed.
            They differ in the last places at most.
        progress: called as ``progress("search", rows_done, count)``.
        count: rows that may come, for the progress alone.

    Raises:
        ConfigError: no faiss.
    """
    find = _faiss_nearest if _use_faiss(backend) else _torch_nearest
    best = torch.empty(len(query), 0)
    found = torch.empty(len(query), 0, dtype=torch.int64)
    done = 0
    for numbers, features in _regrouped(blocks, _BLOCK):
        similarities, places = find(query, features, min(topk, len(numbers)))
        # The best so far come first, so that a stable sort keeps ties in order.
        best = torch.cat([best, similarities], 1)
        found = torch.cat([found, torch.from_numpy(numbers)[places]], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, found = best[:, :topk], found.gather(1, order)[:, :topk]
        done += len(numbers)
        if progress:
            progress("search", done, max(done, count))
    return Nearest(found, best, done)


def _regrouped(
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]], size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The same rows, so many at a time: a search of few rows takes as long as one of more."""
    waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    count = 0
    for numbers, features in blocks:
        for start in range(0, len(numbers), size):
            part = slice(start, start + size)
            if count + len(numbers[part]) > size:
                yield _together(waiting)
                waiting, count = [], 0
            waiting.append((numbers[part], features[part]))
            count += len(numbers[part])
    if waiting:
        yield _together(waiting)


def _together(
    blocks: list[tuple[NDArray[np.int64], NDArray[np.float32]]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One block, whose arrays may be written to, as torch asks for."""
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])


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
    near = knn(torch.from_numpy(gallery), k, queries=query)
    return near.similarities, near.indices


def _faiss_nearest(
    query: torch.Tensor, gallery: NDArray[np.float32], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By faiss's flat inner product."""
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
