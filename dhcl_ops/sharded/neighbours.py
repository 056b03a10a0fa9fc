"""Exact neighbours of rows that lie on several ranks: the bits of :func:`dhcl_ops.knn`.

Blocks of rows go around a half ring, so that each pair of rows is multiplied once, and both rows
take what they find. A row's k-th score so far travels with it: only what can beat that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dhcl_ops import _checks
from dhcl_ops._products import upper_norms
from dhcl_ops._progress import Progress
from dhcl_ops.knn import Neighbours, knn, meet
from dhcl_ops.sharded.shards import Shards, piece_rows


class Best(NamedTuple):
    """The best neighbours so far: (n, k) similarities, -inf in empty places, and indices."""

    similarities: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def empty(cls, rows: int, width: int, shards: Shards) -> Best:
        """Lists of this width without neighbours."""
        return cls(
            torch.full((rows, width), -torch.inf, device=shards.device),
            torch.full((rows, width), shards.total, dtype=torch.int64, device=shards.device),
        )

    @property
    def width(self) -> int:
        """Neighbours in a list."""
        return self.indices.shape[1]

    def first(self, rows: torch.Tensor, count: int) -> Best:
        """The first neighbours of some rows."""
        return Best(self.similarities[rows, :count], self.indices[rows, :count])

    def take(
        self, rows: slice | torch.Tensor, similarities: torch.Tensor, indices: torch.Tensor
    ) -> None:
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
        if self.width == 0:
            return self.similarities.new_zeros(end - begin)
        return self.similarities[begin:end, -1].contiguous()


def rows_of(op: str, features: torch.Tensor) -> torch.Tensor:
    """This rank's rows for a search, in float32."""
    _checks.tensor(op, "features", features)
    _checks.rank(op, "features", features, 2)
    _checks.dtype(op, "features", features, _checks.ALL_FLOATS)
    rows = features.detach().to(torch.float32).contiguous()
    # Here, where all ranks hear of it, and not in the search, where the others would wait.
    upper_norms(op, "features", rows)
    return rows


def search(features: torch.Tensor, k: int, shards: Shards, progress: Progress | None) -> Neighbours:
    """Lists (n, k) of own rows float32 among all rows, each row first in its own; k <= total."""
    rows, device = shards.rows, shards.device
    others, first = max(k - 1, 0), min(k, 1)
    near = knn(features, min(k, rows))
    best = Best.empty(rows, others, shards)
    known = max(min(k, rows) - 1, 0)
    best.similarities[:, :known] = near.similarities[:, 1:]
    best.indices[:, :known] = near.indices[:, 1:] + shards.begin
    # A rank without rows has lists of no length.
    itself = near.similarities[:, :first].reshape(rows, first).clone()
    uncertified = near.uncertified.clone()
    del near
    if others:
        uncertified += _visited(best, features, shards, progress)
    own = torch.arange(shards.begin, shards.end, device=device)[:, None]
    return Neighbours(
        torch.cat([itself, best.similarities], 1),
        torch.cat([own[:, :first], best.indices], 1),
        shards.gather(uncertified[None]).sum(),
    )


def _visited(
    best: Best, features: torch.Tensor, shards: Shards, progress: Progress | None
) -> torch.Tensor:
    """Complete own lists by visits, and count the searches that were repeated."""
    width, others = features.shape[1], best.indices.shape[1]
    size = piece_rows(4 * width, shards.device)
    uncertified = torch.zeros((), dtype=torch.int64, device=shards.device)

    def outline(rank: int, begin: int, end: int) -> list[Sequence[int]]:
        return [(end - begin, width), (end - begin,)]

    def give(begin: int, end: int) -> list[torch.Tensor]:
        return [features[begin:end], best.floor(begin, end)]

    def take(away: slice, found: list[torch.Tensor]) -> None:
        best.take(away, found[0], found[1].long())

    for visit in shards.visits(size, outline, give, take):
        visitor, floor = visit.tables
        theirs = Best.empty(len(visitor), others, shards)
        # Own rows in pieces too: what a search holds of a row is more than the row itself.
        for begin in range(visit.mine.start, visit.mine.stop, size):
            mine = slice(begin, min(begin + size, visit.mine.stop))
            floors = (best.floor(mine.start, mine.stop), floor)
            here, away = meet(features[mine], visitor, others, floors)
            best.take(mine, here.similarities, here.indices + visit.first)
            found = away.indices + (shards.begin + begin)
            found.masked_fill_(away.similarities == -torch.inf, shards.total)
            theirs.take(slice(0, len(visitor)), away.similarities, found)
            floor = floor.maximum(theirs.floor(0, len(visitor)))
            uncertified += here.uncertified + away.uncertified
        visit.found.extend([theirs.similarities, theirs.indices.int()])
        if progress is not None:
            progress("products", min(visit.first, shards.total), shards.total)
    return uncertified
