"""The nearest images of each image of an index, found once, so that re-ranking is quick.

k-reciprocal re-ranking (Zhong et al., CVPR 2017) asks of every row which its nearest are, whatever
the query. Those lists are kept with the index. A query enters the lists of few rows, and its
distances differ from those of rows that share nothing with it in the Euclidean part alone; so what
is computed anew is small, and the result is that of :func:`dhcl_ops.rerank` on all rows, up to the
rounding of matrix products and of the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.inference.gallery.store import Neighbours, Store
from dhcl.inference.search import Found, nearest
from dhcl_ops import knn
from dhcl_ops.defaults import ZHONG
from dhcl_ops.reranking import jaccard_of_some, smallest

__all__ = ["Lists", "missing_lists", "reranked"]

WIDTH = ZHONG.k1 + 1
"""Rows of a list, the row itself among them."""

# By how much products of matrices may differ from similarities in the stated order of summation.
_SLACK = 1e-4

Blocks = Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]
Progress = Callable[[str, int, int], None]


class Gallery(Protocol):
    """What is asked of :class:`dhcl.inference.index.Index`."""

    store: Store

    def __len__(self) -> int:
        """N rows."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(N,) numbers of the rows."""

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, d)."""

    def batches(self) -> Blocks:
        """Numbers and features, part by part."""

    def features_of(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of some rows."""


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of all N rows of an index, by rows instead of numbers.

    ``ranks`` (N, k) int32, ``similarities`` (N, k) float32, ``least`` (N,) float32.
    """

    ranks: NDArray[np.int32]
    similarities: NDArray[np.float32]
    least: NDArray[np.float32]

    @classmethod
    def of(cls, index: Gallery) -> Lists | None:
        """Those of an index; None where they were not made, or not after the last change."""
        found = index.store.neighbours()
        if found is None or found.lists.shape[1] != WIDTH:
            return None
        numbers = index.numbers
        if not np.array_equal(found.rows, numbers):
            return None
        ranks = _rows_of(numbers, found.lists)
        if (ranks < 0).any() or (_rows_of(numbers, found.farthest) < 0).any():
            return None
        return cls(ranks.astype(np.int32), found.similarities, found.least)


def _rows_of(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of numbers, -1 where one is not there."""
    rows = np.searchsorted(numbers, wanted)
    rows[rows == len(numbers)] = 0
    return np.where(numbers[rows] == wanted, rows, -1)


def _part(lists: Neighbours, rows: NDArray[Any]) -> Neighbours:
    """The lists of some rows, by places or by a mask."""
    return Neighbours._make(column[rows] for column in lists)


# ---- finding them -------------------------------------------------------------------------------


def missing_lists(
    index: Gallery, *, progress: Progress | None = None
) -> tuple[Neighbours, bool] | None:
    """What has to be put so that every row has a true list, and whether in place of all there is.

    Lists of rows that came, or of whose rows some went, are found by one pass over the index; rows
    that came enter the lists of others on the way. Where most are missing, all are found.

    Returns:
        None if nothing is missing, or the index has no more rows than a list has places.
    """
    numbers, old = index.numbers, index.store.neighbours()
    if len(numbers) <= WIDTH:
        return None
    if old is None or old.lists.shape[1] != WIDTH:
        return _all_lists(index, progress), True
    there = np.isin(old.rows, numbers)
    old = _part(old, there)
    broken = (_rows_of(numbers, old.lists) < 0).any(1) | (_rows_of(numbers, old.farthest) < 0)
    came = numbers[~np.isin(numbers, old.rows)]
    if not len(came) and not broken.any():
        return None
    if len(came) + broken.sum() > len(numbers) // 4:
        return _all_lists(index, progress), True
    kept = _part(old, ~broken)
    return _some_lists(index, kept, came, old.rows[broken], progress), False


def _all_lists(index: Gallery, progress: Progress | None) -> Neighbours:
    features = torch.from_numpy(index.features)
    found = knn(features, WIDTH, progress=progress)
    least = torch.empty(len(features))
    farthest = torch.empty(len(features), dtype=torch.int64)
    for start in range(0, len(features), 1024):
        part = slice(start, start + 1024)
        least[part], farthest[part] = (features[part] @ features.T).min(1)
    numbers = index.numbers
    return Neighbours(
        numbers,
        numbers[found.indices.numpy()],
        found.similarities.numpy(),
        least.numpy(),
        numbers[farthest.numpy()],
    )


def _some_lists(
    index: Gallery,
    kept: Neighbours,
    came: NDArray[np.int64],
    broken: NDArray[np.int64],
    progress: Progress | None,
) -> Neighbours:
    """Lists of rows that came and of broken ones, and of others that change by those that came."""
    anew = np.sort(np.concatenate([came, broken]))
    query = torch.from_numpy(np.array(index.features_of(anew)))
    new = query[torch.from_numpy(np.isin(anew, came))]
    least = torch.full((len(anew),), torch.inf)
    farthest = np.zeros(len(anew), np.int64)
    changed: list[Neighbours] = []

    def passing() -> Blocks:
        for numbers, features in index.batches():
            block = torch.from_numpy(np.array(features))
            low, place = (query @ block.T).min(1)
            lower = (low < least).numpy()
            farthest[lower] = numbers[place.numpy()[lower]]
            torch.minimum(least, low, out=least)
            if len(came):
                changed.append(_entered(numbers, block, kept, came, new))
            yield numbers, features

    found = nearest(query, passing(), WIDTH, backend="torch", progress=progress, count=len(index))
    itself = knn(query, 1).similarities.numpy()
    lists, similarities = _merged(
        anew, (anew[:, None], itself), (found.rows.numpy(), found.similarities.numpy())
    )
    own = Neighbours(anew, lists, similarities, least.numpy(), farthest)
    return Neighbours._make(map(np.concatenate, zip(own, *changed, strict=True)))


def _entered(
    numbers: NDArray[np.int64],
    block: torch.Tensor,
    kept: Neighbours,
    came: NDArray[np.int64],
    new: torch.Tensor,
) -> Neighbours:
    """Lists of rows of a block that change by rows which came; these come last among equals."""
    rows = _rows_of(kept.rows, numbers) if len(kept.rows) else np.full(len(numbers), -1)
    mine = rows >= 0
    old = _part(kept, rows[mine])
    block = block[torch.from_numpy(mine)]
    products = block @ new.T
    low, place = (x.numpy() for x in products.min(1))
    near = products.max(1).values.numpy() > old.similarities[:, -1] - _SLACK
    touched = np.flatnonzero(near | (low < old.least))
    old = _part(old, touched)
    found = knn(new, min(len(new), WIDTH), queries=block[torch.from_numpy(touched)])
    lists, similarities = _merged(
        old.rows,
        (old.lists, old.similarities),
        (came[found.indices.numpy()], found.similarities.numpy()),
    )
    lower = low[touched] < old.least
    return Neighbours(
        old.rows,
        lists,
        similarities,
        np.where(lower, low[touched], old.least),
        np.where(lower, came[place[touched]], old.farthest),
    )


def _merged(
    own: NDArray[np.int64],
    first: tuple[NDArray[np.int64], NDArray[np.float32]],
    then: tuple[NDArray[np.int64], NDArray[np.float32]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best of two lists for each row, itself first, as long as the longer; ties to the first.

    A row comes before its equals in its own list, as :func:`dhcl_ops.knn` has it.
    """
    width = max(first[0].shape[1], then[0].shape[1])
    lists = np.concatenate([first[0], then[0]], 1)
    values = np.concatenate([first[1], then[1]], 1)
    mine = lists == own[:, None]
    again = mine & (mine.cumsum(1) > 1)
    keys = np.where(mine, np.where(again, -np.inf, np.inf), values)
    order = np.argsort(-keys, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(lists, order, 1), np.take_along_axis(values, order, 1)


# ---- with them ----------------------------------------------------------------------------------


def reranked(
    index: Gallery,
    lists: Lists,
    query: torch.Tensor,
    topk: int,
    *,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
    progress: Progress | None = None,
) -> Found:
    """All rows of an index re-ranked for some queries, as :func:`dhcl_ops.rerank` does.

    Args:
        index: to search in.
        lists: of its rows.
        query: (Q, d) float32, rows of length 1.
        topk: rows for each query.
        k2, lambda_value: as of :func:`dhcl_ops.rerank`.
        progress: called as ``progress("search", rows_done, rows)``.

    Returns:
        Indices are rows. It takes 4 Q bytes for each row of the index while it works.
    """
    products, ranks = _with_queries(index, lists, query, progress)
    count = len(query)
    own = (query @ query.T).min(1).values
    scale = 2.0 - 2.0 * torch.cat(
        [
            torch.minimum(products.min(1).values, own),
            torch.minimum(products.min(0).values, torch.from_numpy(lists.least)),
        ]
    )
    distances = products.mul(-2.0).add_(2.0).clamp_(min=0.0)
    distances.div_(scale[:count, None].clamp(min=torch.finfo(torch.float32).tiny))
    distances.mul_(lambda_value)
    order, listed, weighted = _what_matters(ranks, count, k2)
    local = np.full(len(ranks), len(order), np.int32)
    local[order] = np.arange(len(order), dtype=np.int32)
    near = np.concatenate([local[ranks[order]], np.full((1, WIDTH), len(order), np.int32)])
    some = np.append(order, 0)

    def features(rows: torch.Tensor) -> torch.Tensor:
        wanted = some[rows.numpy()]
        mine = wanted < count
        out = torch.empty(len(rows), query.shape[1])
        out[torch.from_numpy(mine)] = query[torch.from_numpy(wanted[mine])]
        theirs = index.features_of(index.numbers[wanted[~mine] - count])
        out[torch.from_numpy(~mine)] = torch.from_numpy(np.array(theirs))
        return out

    jaccard = jaccard_of_some(
        torch.from_numpy(near), scale[torch.from_numpy(some)], features,
        queries=count, listed=listed, weighted=weighted, k2=k2,
    )  # fmt: skip
    rest = torch.ones_like(distances)
    rest[:, torch.from_numpy(order[count:listed] - count)] = jaccard[:, count:]
    distances += rest.mul_(1.0 - lambda_value)
    best, found = smallest(distances, min(topk, len(index)))
    return Found(found, products.gather(1, found), best)


def _with_queries(
    index: Gallery, lists: Lists, query: torch.Tensor, progress: Progress | None
) -> tuple[torch.Tensor, NDArray[np.int32]]:
    """Products (Q, N), and lists of queries and rows (Q + N, k) by their numbers together."""
    count = len(query)
    products = torch.empty(count, len(index))
    ranks = np.empty((count + len(index), WIDTH), np.int32)
    ranks[count:] = lists.ranks + count
    done = 0

    def passing() -> Blocks:
        nonlocal done
        for numbers, features in index.batches():
            rows = slice(done, done + len(numbers))
            done += len(numbers)
            block = torch.from_numpy(np.array(features))
            products[:, rows] = query @ block.T
            last = torch.from_numpy(lists.similarities[rows, -1])
            near = (products[:, rows].max(0).values > last - _SLACK).nonzero().squeeze(1)
            found = knn(query, min(count, WIDTH), queries=block[near])
            there = near.numpy() + rows.start
            # A query comes before rows that are as similar, as it has a lower number.
            merged, _ = _merged(
                there + count,
                (found.indices.numpy(), found.similarities.numpy()),
                (lists.ranks[there].astype(np.int64) + count, lists.similarities[there]),
            )
            ranks[count + there] = merged
            yield numbers, features

    nearby = nearest(query, passing(), WIDTH, backend="torch", progress=progress, count=len(index))
    among = knn(query, min(count, WIDTH))
    rows = np.searchsorted(index.numbers, nearby.rows.numpy()) + count
    ranks[:count], _ = _merged(
        np.arange(count),
        (among.indices.numpy(), among.similarities.numpy()),
        (rows, nearby.similarities.numpy()),
    )
    return products, ranks


def _what_matters(
    ranks: NDArray[np.int32], count: int, k2: int
) -> tuple[NDArray[np.int64], int, int]:
    """Rows in the order of :func:`dhcl_ops.reranking.jaccard_of_some`, and where two parts end.

    A row shares something with a query only if one of the first k2 of its list has in its expanded
    set what one of the first k2 of the query's list has. Being mutual neighbours goes both ways, so
    these are found from the query on, by lists alone, among some more.
    """
    half = round((WIDTH - 1) / 2) + 1
    queries = np.arange(count)
    shared = _sets(ranks, np.unique(ranks[:count, :k2]), half)
    holders = np.zeros(len(ranks), bool)
    holders[_sets_backwards(ranks, shared, half)] = True
    listed = np.flatnonzero(holders[ranks[:, :k2]].any(1))
    order = np.concatenate([queries, listed[listed >= count]])
    ends = [len(order)]
    for width in (k2, WIDTH, half):
        more = np.setdiff1d(np.unique(ranks[order, :width]), order)
        order = np.concatenate([order, more])
        ends.append(len(order))
    return order, ends[0], ends[1]


def _mutual(ranks: NDArray[np.int32], rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Rows that are mutual neighbours, in so many first places, of some of these."""
    theirs = ranks[rows, :width]
    there = (ranks[theirs, :width] == rows[:, None, None]).any(2)
    return np.unique(theirs[there]).astype(np.int64)


def _sets(ranks: NDArray[np.int32], rows: NDArray[np.int64], half: int) -> NDArray[np.int64]:
    """What is in the expanded sets of these rows, and maybe more."""
    near = _mutual(ranks, rows, WIDTH)
    return np.union1d(near, _mutual(ranks, near, half))


def _sets_backwards(
    ranks: NDArray[np.int32], held: NDArray[np.int64], half: int
) -> NDArray[np.int64]:
    """Rows in whose expanded sets some of these are, and maybe more."""
    return _mutual(ranks, np.union1d(held, _mutual(ranks, held, half)), WIDTH)
