"""Neighbours in fixed shares of the own and of other cameras, of rows that lie on several ranks.

The lists of :func:`dhcl_ops.camera_neighbours`, to the bit. On the half ring of
:mod:`dhcl_ops.sharded.neighbours` rows meet camera by camera, with two lists each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops._progress import Progress
from dhcl_ops.camera_neighbours import mixed
from dhcl_ops.knn import Neighbours, knn, meet
from dhcl_ops.sharded.neighbours import Best, rows_of
from dhcl_ops.sharded.shards import Shards, agreed_width, piece_rows

__all__ = ["camera_neighbours"]


def check_cameras(op: str, cameras: torch.Tensor, features: torch.Tensor) -> None:
    """Raise unless these are cameras (n,) of this rank's features."""
    _checks.integers(op, "cameras", cameras, len(features), "one per feature of this rank")
    _checks.same_device(op, features=features, cameras=cameras)


@torch.no_grad()
def camera_neighbours(
    features: torch.Tensor,
    cameras: torch.Tensor,
    k: int,
    own: int,
    *,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    traffic: dict[str, int] | None = None,
) -> Neighbours:
    """:func:`dhcl_ops.camera_neighbours` of rows that lie on several ranks, to the bit.

    Args:
        features: (n, d) this rank's rows, any number of them.
        cameras: (n,) int64 of this rank's rows, any numbers.
        k, own: as in :func:`dhcl_ops.camera_neighbours`, equal on all ranks.
        group, progress, traffic: as in :func:`knn`.

    Returns:
        :class:`dhcl_ops.Neighbours` of this rank's rows, with indices among all rows.

    Raises:
        TypeError, ValueError, RuntimeError, PeerError: as :func:`knn` and
            :func:`dhcl_ops.camera_neighbours`.
    """
    op = "sharded.camera_neighbours"

    def check() -> torch.Tensor:
        _checks.integer(op, "k", k, 1)
        _checks.integer(op, "own", own, 1)
        rows = rows_of(op, features)
        check_cameras(op, cameras, features)
        return rows

    shards = Shards(op, group, check, agreed_width(features, k=k, own=own), traffic)
    if not own <= k <= shards.total:
        raise ValueError(
            f"{op}: own, k and the number of features must not descend "
            f"(got own={own}, k={k}, N={shards.total})"
        )
    with shards.stage("neighbours"):
        return search_by_camera(shards.own, cameras, k, own, shards, progress)


class _Cameras(NamedTuple):
    """Cameras of own rows, numbered among those of all ranks."""

    number: torch.Tensor  # (n,) int32
    here: torch.Tensor  # (C,) neighbours of the own camera in a list, the row itself included


def _numbered(cameras: torch.Tensor, k: int, own: int, shards: Shards) -> _Cameras:
    values, counts = cameras.unique(return_counts=True)
    every = shards.gather(torch.stack([values, counts], 1))
    names, place = every[:, 0].unique(return_inverse=True)
    sizes = torch.zeros_like(names).index_add_(0, place, every[:, 1])
    # Where one kind has too few rows a list gets more of the other.
    here = sizes.clamp(max=own).maximum(k - (shards.total - sizes))
    return _Cameras(torch.searchsorted(names, cameras).int(), here)


class _Lists(NamedTuple):
    """Neighbours of rows among their own camera, without themselves, and among the others."""

    near: Best
    far: Best


def _meet_by_camera(
    shards: Shards,
    rows: tuple[torch.Tensor, torch.Tensor, int],
    others: tuple[torch.Tensor, torch.Tensor, int],
    lists: tuple[_Lists, _Lists],
    floors: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Let rows meet others, each (features, cameras, first row); returns how many were repeated.

    ``floors`` are those of the others' two kinds of lists.
    """
    repeated = torch.zeros((), dtype=torch.int64, device=shards.device)
    (x, own, first), (y, theirs, their_first) = rows, others
    for camera in own.unique().tolist():
        mine = (own == camera).nonzero().squeeze(1)
        for kind, same in enumerate((True, False)):
            away = ((theirs == camera) == same).nonzero().squeeze(1)
            best, back = lists[0][kind], lists[1][kind]
            if best.width == 0 or len(away) == 0:
                continue
            floor = best.similarities[mine, -1], floors[kind][away]
            here, there = meet(x[mine], y[away], best.width, floor)
            for table, of, found, among, start in (
                (best, mine, here, away, their_first),
                (back, away, there, mine, first),
            ):
                empty = found.similarities == -torch.inf
                ids = among[found.indices.masked_fill(empty, 0)] + start
                table.take(of, found.similarities, ids.masked_fill(empty, shards.total))
            repeated += here.uncertified + there.uncertified
    return repeated


def _own_lists(
    features: torch.Tensor, cameras: _Cameras, lists: _Lists, shards: Shards
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the lists from own rows; each row's similarity to itself, and how many were repeated."""
    first = features.new_zeros(len(features), 1)
    repeated = torch.zeros((), dtype=torch.int64, device=shards.device)
    for camera in cameras.number.unique().tolist():
        inside = (cameras.number == camera).nonzero().squeeze(1)
        outside = (cameras.number != camera).nonzero().squeeze(1)
        near = knn(features[inside], min(lists.near.width + 1, len(inside)))
        far = knn(features[outside], min(lists.far.width, len(outside)), queries=features[inside])
        first[inside] = near.similarities[:, :1]
        ids = inside[near.indices[:, 1:]] + shards.begin
        lists.near.take(inside, near.similarities[:, 1:], ids)
        lists.far.take(inside, far.similarities, outside[far.indices] + shards.begin)
        repeated += near.uncertified + far.uncertified
    return first, repeated


def search_by_camera(
    features: torch.Tensor,
    cameras: torch.Tensor,
    k: int,
    own: int,
    shards: Shards,
    progress: Progress | None,
) -> Neighbours:
    """Lists (n, k) of own rows float32 among all rows; own <= k <= total."""
    numbered = _numbered(cameras, k, own, shards)
    widths = (int(numbered.here.max()) - 1, k - int(numbered.here.min()))

    def empty(rows: int) -> _Lists:
        return _Lists(*(Best.empty(rows, width, shards) for width in widths))

    lists = empty(shards.rows)
    first, repeated = _own_lists(features, numbered, lists, shards)
    width = features.shape[1]

    def outline(rank: int, begin: int, end: int) -> list[Sequence[int]]:
        return [(end - begin, width), *((end - begin,) for _ in range(3))]

    def give(begin: int, end: int) -> list[torch.Tensor]:
        floors = [best.floor(begin, end) for best in lists]
        return [features[begin:end], numbered.number[begin:end], *floors]

    def take(away: slice, found: list[torch.Tensor]) -> None:
        for best, similarities, indices in zip(lists, found[::2], found[1::2], strict=True):
            best.take(away, similarities, indices.long())

    size = piece_rows(4 * width, shards.device)
    for visit in shards.visits(size, outline, give, take):
        visitor, theirs, *floors = visit.tables
        mine, away = visit.mine, empty(len(visitor))
        # Rows that meet the visitor are the first ones of this rank, if not all.
        rows = (features[mine], numbered.number[mine], shards.begin)
        others = (visitor, theirs, visit.first)
        both = (lists, away)
        repeated += _meet_by_camera(shards, rows, others, both, (floors[0], floors[1]))
        for best in away:
            visit.found.extend([best.similarities, best.indices.int()])
        if progress is not None:
            progress("products", min(visit.first, shards.total), shards.total)
    return _mixed(lists, first, numbered, k, repeated, shards)


def _mixed(
    lists: _Lists,
    first: torch.Tensor,
    cameras: _Cameras,
    k: int,
    repeated: torch.Tensor,
    shards: Shards,
) -> Neighbours:
    similarities = torch.empty(shards.rows, k, device=shards.device)
    indices = torch.empty(shards.rows, k, dtype=torch.int64, device=shards.device)
    for camera in cameras.number.unique().tolist():
        inside = (cameras.number == camera).nonzero().squeeze(1)
        here = int(cameras.here[camera])
        near, far = (
            best.first(inside, count)
            for best, count in zip(lists, (here - 1, k - here), strict=True)
        )
        itself = Neighbours(first[inside], inside[:, None] + shards.begin, repeated)
        order = mixed(here, k).to(shards.device)
        parts = (itself, near, far)
        similarities[inside] = torch.cat([part.similarities for part in parts], 1)[:, order]
        indices[inside] = torch.cat([part.indices for part in parts], 1)[:, order]
    return Neighbours(similarities, indices, shards.gather(repeated[None]).sum())
