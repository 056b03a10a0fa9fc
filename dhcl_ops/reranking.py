"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017), sparse inside.

The distance is ``(1 - lambda) * jaccard + lambda * d2``, where d2 is the squared distance divided
by the largest one of the query, as in the code the authors published and which torchreid and
fast-reid carry. Theirs holds five or more matrices of all rows by all rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch

from dhcl_ops import _arrays, _checks
from dhcl_ops._csr import Rows
from dhcl_ops._products import SplitProducts, full_precision, split_where_it_pays
from dhcl_ops._progress import Progress, slices
from dhcl_ops.defaults import ZHONG
from dhcl_ops.jaccard import dense_rows
from dhcl_ops.knn import knn_and_least, pair_scores
from dhcl_ops.reciprocal import (
    Lists,
    expanded_sets,
    expanded_weights,
    feature_weights,
    first_sets,
    largest_squares,
    list_width,
    query_expand,
    softmax_rows,
)

__all__ = ["RankedLists", "jaccard_of_some", "rerank", "rerank_distances"]

# Queries at a time: what is dense is this many rows by all rows.
_QUERIES = 256
_TINY = torch.finfo(torch.float32).tiny


class RankedLists(NamedTuple):
    """The best gallery rows of each query, best first; ties by ascending index.

    ``distances`` (Q, topk) float32 and ``indices`` (Q, topk) int64 into the gallery.
    """

    distances: torch.Tensor
    indices: torch.Tensor


def smallest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest values of each row in ascending order, and their columns; ties by column."""
    values, columns = rows.topk(min(k + 1, rows.shape[1]), dim=1, largest=False)
    cut = []
    if 0 < k < rows.shape[1]:
        # Among values equal to the last one topk takes any; such rows are sorted in full.
        cut = (values[:, k] == values[:, k - 1]).nonzero().squeeze(1).tolist()
    values, columns = values[:, :k], columns[:, :k]
    for row in cut:
        whole, order = rows[row].sort(stable=True)
        values[row], columns[row] = whole[:k], order[:k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, stable=True)
    return values, columns.gather(1, order)


class _Source(Protocol):
    """Where distances come from. Rows are the queries, then the gallery."""

    queries: int
    total: int
    device: torch.device

    def weights(self, k: int, half: int, k2: int, progress: Progress | None) -> tuple[Lists, Rows]:
        """The neighbour lists, and the expanded sets with their weights."""

    def block(self, begin: int, end: int) -> torch.Tensor:
        """Squared distances of queries [begin, end) to the gallery over the query's largest."""


class _Features:
    def __init__(self, query: torch.Tensor, gallery: torch.Tensor) -> None:
        self.queries = len(query)
        self.features = torch.cat([query, gallery])
        self.total = len(self.features)
        self.device = query.device
        self.scale = self.features.new_empty(0)

    @functools.cached_property
    def split(self) -> SplitProducts | None:
        """Products of queries and gallery by fp16 pieces, where that is faster."""
        query, gallery = self.features[: self.queries], self.features[self.queries :]
        return split_where_it_pays(query, gallery)

    def weights(self, k: int, half: int, k2: int, progress: Progress | None) -> tuple[Lists, Rows]:
        found, least = knn_and_least(self.features, k, progress)
        lists = Lists(found.indices.int(), k, half, k2)
        largest = largest_squares(self.features, progress) if least is None else 2.0 - 2.0 * least
        self.scale = largest.clamp(min=_TINY)
        weights = feature_weights(self.features, lists, found.similarities, self.scale, progress)
        return lists, weights

    def block(self, begin: int, end: int) -> torch.Tensor:
        with full_precision(self.device):
            if self.split is not None:
                products = self.split.tile(slice(begin, end))
            else:
                products = self.features[begin:end] @ self.features[self.queries :].T
        return products.mul_(-2.0).add_(2.0).clamp_(min=0.0).div_(self.scale[begin:end, None])


class _Distances:
    def __init__(self, q_g: torch.Tensor, q_q: torch.Tensor, g_g: torch.Tensor) -> None:
        self.q_g, self.q_q, self.g_g = q_g, q_q, g_g
        self.queries = len(q_q)
        self.total = len(q_q) + len(g_g)
        self.device = q_g.device

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows of the normalised squares: columns of the matrix, over their largest, as theirs."""
        parts = []
        if begin < self.queries:
            own = slice(begin, min(end, self.queries))
            parts.append(torch.cat([self.q_q[:, own].T, self.q_g[own]], dim=1))
        if end > self.queries:
            own = slice(max(begin - self.queries, 0), end - self.queries)
            parts.append(torch.cat([self.q_g[:, own], self.g_g[:, own]]).T)
        rows = torch.cat(parts).float()
        squares = rows * rows
        largest = squares.amax(1, keepdim=True)
        large, small = largest > 2.0**80, largest < 2.0**-80
        if bool((large | small).any()):
            # These squares may be beyond fp32; a power of two cancels in the quotient.
            rows = torch.where(large, rows * 2.0**-70, torch.where(small, rows * 2.0**100, rows))
            squares = rows * rows
            largest = squares.amax(1, keepdim=True)
        return squares / largest.clamp(min=_TINY)

    def weights(self, k: int, half: int, k2: int, progress: Progress | None) -> tuple[Lists, Rows]:
        ranks = torch.empty(self.total, k, dtype=torch.int32, device=self.device)
        for begin, end in slices(self.total, "neighbours", progress, _QUERIES):
            rows = self._rows(begin, end)
            own = torch.arange(end - begin, device=self.device)
            rows[own, begin + own] = -1.0  # a row comes first in its own list
            ranks[begin:end] = smallest(rows, k)[1].int()
        lists = Lists(ranks, k, half, k2)
        offsets, columns = expanded_sets(lists, progress)
        logits = torch.empty(len(columns), device=self.device)
        for begin, end in slices(self.total, "weights", progress, _QUERIES):
            first, last = int(offsets[begin]), int(offsets[end])
            owner = torch.arange(end - begin, device=self.device)
            owner = owner.repeat_interleave(offsets[begin : end + 1].diff())
            logits[first:last] = -self._rows(begin, end)[owner, columns[first:last].long()]
        return lists, Rows(offsets, columns, softmax_rows(offsets, logits))

    def block(self, begin: int, end: int) -> torch.Tensor:
        return self._rows(begin, end)[:, self.queries :]


def _rerank(
    op: str,
    source: _Source,
    k1: int,
    k2: int,
    lambda_value: float,
    topk: int | None,
    progress: Progress | None,
) -> torch.Tensor | RankedLists:
    lambda_value = _checks.number(op, "lambda_value", lambda_value, 0.0, 1.0, rule="in [0, 1]")
    k, half, k2 = list_width(op, source.total, k1, k2, "zhong")
    queries, gallery = source.queries, source.total - source.queries
    if topk is None:
        instead = "topk= gives ranked lists without it"
        _checks.fits_in_memory(op, (queries, gallery), source.device, instead)
        out = torch.empty(queries, gallery, device=source.device)
    else:
        topk = _checks.integer(op, "topk", topk, 1)
        if topk > gallery:
            raise ValueError(f"{op}: topk must be at most the gallery's {gallery} (got {topk})")
        best = torch.empty(queries, topk, device=source.device)
        found = torch.empty(queries, topk, dtype=torch.int64, device=source.device)
    lists, weights = source.weights(k, half, k2, progress)
    rows = expanded_weights(lists, weights, progress)
    del lists, weights
    for begin, end, jaccard in dense_rows(rows, progress, stop=queries, size=_QUERIES):
        final = source.block(begin, end).mul_(lambda_value)
        final += jaccard[:, queries:].mul_(1.0 - lambda_value)
        if topk is None:
            out[begin:end] = final
        else:
            best[begin:end], found[begin:end] = smallest(final, topk)
    return out if topk is None else RankedLists(best, found)


@torch.no_grad()
def rerank(
    query: torch.Tensor,
    gallery: torch.Tensor,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
    *,
    topk: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Re-rank the gallery for each query with k-reciprocal encoding.

    Neighbours are searched among queries and gallery together, k1 of them and the row itself; sets,
    weights and query expansion are those of :func:`dhcl_ops.jaccard_graph` with
    ``convention="zhong"``. The distance is ``(1 - lambda_value) * jaccard + lambda_value * d2``,
    d2 the squared Euclidean distance over the largest one from the query. Where the published code
    lets rounding take the Jaccard distance of equal rows below zero, here it is zero.

    Args:
        query: (Q, d) rows of norm 1; an array gives arrays back.
        gallery: (G, d) rows of norm 1.
        k1, k2: neighbours, and neighbours in the query expansion (in [1, k1]); both count at most
            Q + G.
        lambda_value: share of the original distance, in [0, 1].
        topk: give the best ``topk`` of the gallery, without a matrix of Q x G.
        progress: called as ``progress(stage, rows_done, rows_total)``.

    Returns:
        (Q, G) float32 distances, or :class:`RankedLists` with ``topk``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; a row
            that is not finite or not of norm 1.
        MemoryError: the (Q, G) matrix does not fit into the free memory.
    """
    op = "rerank"
    given = query
    query, gallery = _arrays.as_tensors(op, query=query, gallery=gallery)
    query = _checks.unit_rows(op, "query", query)
    gallery = _checks.unit_rows(op, "gallery", gallery)
    _checks.same_device(op, query=query, gallery=gallery)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"{op}: query and gallery must have one width (got {query.shape[1]} and "
            f"{gallery.shape[1]})"
        )
    source = _Features(query, gallery)
    return _arrays.like(given, _rerank(op, source, k1, k2, lambda_value, topk, progress))


@torch.no_grad()
def rerank_distances(
    q_g: torch.Tensor,
    q_q: torch.Tensor,
    g_g: torch.Tensor,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
    *,
    topk: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Re-rank from distance matrices; otherwise as :func:`rerank`.

    The distances are squared here, as in the published code: pass Euclidean distances, not squared
    ones. A row comes first in its own list whatever the diagonals hold; ties go to the lower index.

    Args:
        q_g: (Q, G) distances of queries and gallery; an array gives arrays back.
        q_q: (Q, Q) distances among the queries.
        g_g: (G, G) distances among the gallery.
        k1, k2, lambda_value, topk, progress: as in :func:`rerank`.

    Returns:
        (Q, G) float32 distances, or :class:`RankedLists` with ``topk``.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`rerank`.
    """
    op = "rerank_distances"
    given = q_g
    q_g, q_q, g_g = _arrays.as_tensors(op, q_g=q_g, q_q=q_q, g_g=g_g)
    for name, value in (("q_g", q_g), ("q_q", q_q), ("g_g", g_g)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
        _checks.dtype(op, name, value, _checks.ALL_FLOATS)
    queries, gallery = q_g.shape
    _checks.shape(op, "q_q", q_q, (queries, queries), "one row and column per query")
    _checks.shape(op, "g_g", g_g, (gallery, gallery), "one row and column per gallery row")
    _checks.same_device(op, q_g=q_g, q_q=q_q, g_g=g_g)
    for name, value in (("q_g", q_g), ("q_q", q_q), ("g_g", g_g)):
        for begin, end in slices(len(value), "check", None, _QUERIES):
            finite = value[begin:end].detach().float().isfinite()
            if not bool(finite.all()):
                row, column = (int(place) for place in (~finite).nonzero()[0])
                got = float(value[begin + row, column])
                rule = "finite in float32" if math.isfinite(got) else "finite"
                what = f"{got:g}" if math.isfinite(got) else "nan or inf"
                raise ValueError(f"{op}: {name} must be {rule} (got {what} in row {begin + row})")
    source = _Distances(q_g.detach(), q_q.detach(), g_g.detach())
    result = _rerank(op, cast("_Source", source), k1, k2, lambda_value, topk, progress)
    return _arrays.like(given, result)


@torch.no_grad()
def jaccard_of_some(
    ranks: torch.Tensor,
    scale: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
    *,
    queries: int,
    listed: int,
    weighted: int,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
) -> torch.Tensor:
    """Jaccard distances of queries to some rows, where lists of all rows that matter are known.

    It is the part of :func:`rerank` which needs no search. Rows are numbered so that the queries
    come first, then those that distances are asked of, then all others that are among the first
    ``k2`` of the lists of these, whose weights are needed; last, rows of which only the lists
    matter. A row whose list does not matter either has itself in all places of it.

    Args:
        ranks: (n, k) int32, the k1 + 1 nearest rows of each row, itself among them, best first.
        scale: (n,) float32, the largest squared distance of each row to any.
        features: gives those (m, d) of rows (m,), float32 and of norm 1.
        queries: number of rows that are queries, Q.
        listed: number of these and of rows that a distance is asked of, L.
        weighted: number of these and of rows whose weights are needed.
        k1, k2: as of :func:`rerank`.

    Returns:
        (Q, L) float32.
    """
    n = len(ranks)
    k, half, k2 = list_width("rerank", n, k1, k2, "zhong")
    offsets, columns = first_sets(Lists(ranks, k, half, k2), weighted)
    owners = torch.arange(weighted, device=ranks.device).repeat_interleave(offsets.diff())
    needed, places = torch.cat([owners, columns.long()]).unique(return_inverse=True)
    rows = features(needed)
    own, other = places[: len(owners)], places[len(owners) :]
    squares = (2.0 - 2.0 * pair_scores(rows, rows, own, other)) / scale.clamp(min=_TINY)[owners]
    weights = Rows(_up_to(offsets, n), columns, softmax_rows(offsets, -squares))
    if k2 > 1:
        offsets, columns, values = query_expand(ranks, *weights, k2, 0, listed)
        weights = Rows(_up_to(offsets, n), columns, values)
    parts = [part[:, :listed] for _, _, part in dense_rows(weights, None, stop=queries)]
    return torch.cat(parts) if parts else scale.new_empty(0, listed)


def _up_to(offsets: torch.Tensor, n: int) -> torch.Tensor:
    """Offsets of so many rows, of which those behind the last one are empty."""
    return torch.cat([offsets, offsets[-1:].expand(n + 1 - len(offsets))])
