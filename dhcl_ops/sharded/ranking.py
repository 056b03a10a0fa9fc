"""CMC, mAP and mINP over a gallery that lies on several ranks.

All metrics follow from the ranks of the right matches, and such a rank is one more than the entries
before it: every rank of the process group counts those of its own, and the counts are added up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops._products import full_precision
from dhcl_ops.ranking import (
    FeatureDistances,
    GivenDistances,
    Identities,
    RankingMetrics,
    Settings,
    matches,
    metrics_of_ranks,
    without_junk,
)
from dhcl_ops.sharded.shards import Shards

__all__ = ["evaluate_ranking"]

# Entries of the distance matrix that a rank sorts at a time.
_BLOCK_ENTRIES = 1 << 22


@torch.no_grad()
def evaluate_ranking(
    distance_or_features: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    query_cameras: torch.Tensor | None = None,
    gallery_cameras: torch.Tensor | None = None,
    *,
    metric: str = "euclidean",
    ap: str = "hits",
    max_rank: int = 50,
    junk_id: int | None = -1,
    per_query: bool = False,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    traffic: dict[str, int] | None = None,
) -> RankingMetrics:
    """:func:`dhcl_ops.evaluate_ranking` of a gallery that lies on several ranks.

    Every rank gives all queries and its own gallery rows, or distances to them. Rows are numbered
    on from rank to rank where equal distances go by number. Distances from features are as exact as
    an fp32 matrix product, so where two are equal to rounding the order may be another than with
    the gallery in one piece. A rank holds its own rows, distances to them of some queries at a
    time, and those of all right matches.

    Args:
        distance_or_features: query features (Q, d), equal on all ranks, and those of this rank's
            gallery (g, d), any number; or distances (Q, g) of all queries to this rank's gallery.
        query_ids, query_cameras: (Q,) integers, equal on all ranks.
        gallery_ids, gallery_cameras: (g,) integers of own rows.
        metric, ap, max_rank, junk_id, per_query: as in :func:`dhcl_ops.evaluate_ranking`, in the
            protocol of Market-1501, and equal on all ranks.
        group, progress, traffic: as in :func:`knn`.

    Returns:
        :class:`dhcl_ops.RankingMetrics`, equal on all ranks.

    Raises:
        TypeError, ValueError: as :func:`dhcl_ops.evaluate_ranking`, on all ranks; ranks that do not
            agree. RuntimeError, PeerError: as :func:`knn`.
    """
    op = "sharded.evaluate_ranking"
    settings = Settings(metric, "market", ap, max_rank, junk_id, 1, per_query)
    distances: FeatureDistances | GivenDistances
    identities: Identities

    def check() -> torch.Tensor:
        nonlocal distances, identities
        _checks.one_of(op, "metric", metric, ("euclidean", "cosine"))
        _checks.one_of(op, "ap", ap, ("hits", "trapezoid"))
        _checks.integer(op, "max_rank", max_rank, 1)
        distances, own = _source(op, distance_or_features, metric)
        given = Identities(query_ids, gallery_ids, query_cameras, gallery_cameras)
        with full_precision(distances.device):
            identities = without_junk(distances, given, junk_id)
        return own

    given = distance_or_features
    shape = tuple(getattr(given[0] if isinstance(given, tuple) else given, "shape", ()))
    agreed = {
        "the shape of queries": shape if isinstance(given, tuple) else shape[:1], "metric": metric,
        "ap": ap, "max_rank": max_rank, "junk_id": junk_id, "cameras": query_cameras is not None,
    }  # fmt: skip
    shards = Shards(op, group, check, agreed, traffic)
    with shards.stage("matches"), full_precision(distances.device):
        ranks, offsets = _match_ranks(distances, identities, shards, progress)
        kept = shards.gather(torch.tensor([len(identities.gallery_ids)], device=shards.device))
    return metrics_of_ranks(ranks, offsets, int(kept.sum()), settings)


def _source(
    op: str, given: torch.Tensor | tuple[torch.Tensor, torch.Tensor], metric: str
) -> tuple[FeatureDistances | GivenDistances, torch.Tensor]:
    """Distances by blocks of queries, and a tensor with a row for each own entry."""
    if isinstance(given, tuple):
        return FeatureDistances(*given, metric), given[1]
    distances = GivenDistances(given)
    # Here, where all ranks hear of it.
    for row in range(0, len(given), 1024):
        if bool((wrong := given[row : row + 1024].isnan().any(1)).any()):
            at = row + int(wrong.nonzero()[0])
            raise ValueError(f"{op}: distance must not be NaN (got one in row {at})")
    return distances, given.T


def _match_ranks(
    distances: FeatureDistances | GivenDistances,
    identities: Identities,
    shards: Shards,
    progress: Callable[[str, int, int], object] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (T,) of the matches of all queries, 0 of removed ones, and offsets (Q + 1,)."""
    queries = distances.shape[0]
    members, begin, own_offsets = matches(identities.query_ids, identities.gallery_ids)
    lengths = own_offsets.diff()
    every = shards.gather_shares(lengths, [queries] * shards.world).view(shards.world, queries)
    largest = max(end - first for first, end in zip(shards.starts, shards.starts[1:], strict=False))
    step = max(_BLOCK_ENTRIES // max(largest, 1), 1)
    found = [torch.zeros(0, dtype=torch.int64, device=shards.device)]
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        query = torch.arange(stop - start, device=shards.device).repeat_interleave(
            lengths[start:stop]
        )
        place = torch.arange(len(query), device=shards.device) + own_offsets[start]
        match = members[begin[start + query] + place - own_offsets[start + query]]
        block = distances.block(start, stop)
        found.append(
            _ranks_of_block(block, query, match, every[:, start:stop], start, identities, shards)
        )
        if progress is not None:
            progress("queries", stop, queries)
    return torch.cat(found), torch.nn.functional.pad(every.sum(0).cumsum(0), (1, 0))


def _ranks_of_block(
    block: torch.Tensor,
    query: torch.Tensor,
    match: torch.Tensor,
    every: torch.Tensor,
    start: int,
    identities: Identities,
    shards: Shards,
) -> torch.Tensor:
    """Ranks of the matches of some queries, by query and then in the order of the gallery.

    Args:
        block: (b, g) distances of the queries to own rows.
        query, match: (t,) own right matches, by query: its place in the block, and the own row.
        every: (world, b) how many right matches each rank has of each query.
        start: the first query.
    """
    distance = block[query, match]
    removed = torch.zeros_like(query, dtype=torch.bool)
    if identities.query_cameras is not None:
        cameras = identities.query_cameras[start + query]
        removed = cameras == identities.gallery_cameras[match]
    # What is removed comes behind everything and so before no match.
    block = block.clone()
    block[query[removed], match[removed]] = torch.inf
    ordered, order = block.sort(dim=1, stable=True)
    sizes = every.sum(1).tolist()
    distances = shards.gather_shares(distance, sizes)
    gone = shards.gather_shares(removed, sizes)
    queries = torch.arange(block.shape[0], device=block.device)
    theirs = torch.cat([queries.repeat_interleave(count) for count in every])
    owner = torch.arange(len(sizes), device=block.device).repeat_interleave(every.sum(1))
    before = torch.zeros_like(theirs)
    for rank in range(shards.world):
        there = owner == rank
        if rank == shards.rank:
            places = torch.arange(order.shape[1], device=order.device).expand(order.shape)
            before[there] = torch.empty_like(order).scatter_(1, order, places)[query, match]
        else:
            # Of equal distance own rows come before those of higher ranks alone.
            right = shards.rank < rank
            before[there] = _before(ordered, theirs[there], distances[there], right)
    dist.all_reduce(before, group=shards.group)
    shards.count((shards.world - 1) * before.numel() * 8)
    by_query = theirs.argsort(stable=True)
    return torch.where(gone, 0, before + 1)[by_query]


def _before(
    ordered: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, right: bool
) -> torch.Tensor:
    """How many entries of ascending rows are below each value, or equal to it with ``right``."""
    if ordered.shape[1] == 0:
        return torch.zeros_like(rows)
    sizes = torch.bincount(rows, minlength=len(ordered))
    widest = int(sizes.max()) if len(rows) else 0
    wanted = ordered.new_full((len(ordered), widest), torch.inf)
    place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]
    wanted[rows, place] = values
    return torch.searchsorted(ordered.contiguous(), wanted, right=right)[rows, place]
