"""Exact neighbours of rows that lie on several ranks: the bits of :func:`dhcl_ops.knn`.

Blocks of rows go around a half ring, so that each pair of rows is multiplied once, and both rows
take what they find. A row's k-th score so far travels with it: only what can beat that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dhcl_ops._progress import Progress
from dhcl_ops.knn import Neighbours, knn, meet
from dhcl_ops.sharded.shards import PIECE_BYTES, Shards


class _Best(NamedTuple):
    """The best neighbours so far: (n, k) similarities, -inf in empty places, and indices."""

    similarities: torch.Tensor
    indices: torch.Tensor

    def take(self, rows: slice, similarities: torch.Tensor, indices: torch.Tensor) -> None:
        """Merge what some rows have found elsewhere: best first, lower indices first."""
        k = self.indices.shape[1]
        found = torch.cat([self.indices[rows], indices], 1)
        scores = torch.cat([self.similarities[rows], similarities], 1)
        found, order = found.sort(dim=1)
        scores, second = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        self.similarities[rows] = scores[:, :k]
        self.indices[rows] = found.gather(1, second)[:, :k]

    def floor(self, begin: int, end: int) -> torch.Tensor:
        """The last similarity of each list."""
        return self.similarities[begin:end, -1].contiguous()


def search(features: torch.Tensor, k: int, shards: Shards, progress: Progress | None) -> Neighbours:
    """Lists (n, k) of own rows float32 among all rows, each row first in its own; k <= total."""
    rows, device = shards.rows, shards.device
    others = max(k - 1, 0)
    near = knn(features, min(k, rows))
    best = _Best(
        torch.full((rows, others), -torch.inf, device=device),
        torch.full((rows, others), shards.total, dtype=torch.int64, device=device),
    )
    known = max(min(k, rows) - 1, 0)
    best.similarities[:, :known] = near.similarities[:, 1:]
    best.indices[:, :known] = near.indices[:, 1:] + shards.begin
    width = features.shape[1]
    uncertified = near.uncertified.clone()

    def outline(rank: int, begin: int, end: int) -> list[Sequence[int]]:
        return [(end - begin, width), (end - begin,)]

    def give(begin: int, end: int) -> list[torch.Tensor]:
        return [features[begin:end], best.floor(begin, end)]

    if others:
        size = max(PIECE_BYTES // max(4 * width, 1), 1)
        for visit in shards.visits(size, outline, give):
            visitor, floor = visit.tables
            mine = visit.mine
            here, away = meet(
                features[mine], visitor, others, (best.floor(mine.start, mine.stop), floor)
            )
            best.take(mine, here.similarities, here.indices + visit.first)
            found = torch.full((len(visitor), others), -torch.inf, device=device)
            ids = torch.full((len(visitor), others), shards.total, dtype=torch.int32, device=device)
            found[:, : away.indices.shape[1]] = away.similarities
            ids[:, : away.indices.shape[1]] = (away.indices + shards.begin).int()
            ids.masked_fill_(found == -torch.inf, shards.total)
            # What the visitor's rows found here goes home.
            similarities, indices = shards.swap(visit.owner, visit.host, found, ids)
            best.take(visit.away, similarities, indices.long())
            uncertified += here.uncertified + away.uncertified
            if progress is not None:
                progress("products", min(visit.first, shards.total), shards.total)
    # A rank without rows has lists of no length.
    first = near.similarities[:, : min(k, 1)].reshape(rows, min(k, 1))
    own = torch.arange(shards.begin, shards.end, device=device)[:, None]
    return Neighbours(
        torch.cat([first, best.similarities], 1),
        torch.cat([own[:, : min(k, 1)], best.indices], 1),
        shards.gather(uncertified[None]).sum(),
    )
