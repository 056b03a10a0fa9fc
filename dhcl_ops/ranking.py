"""How well a ranked gallery finds the right person: CMC, mAP and mINP.

A query's gallery is ordered by (distance, index): entries of equal distance go by index, as a
stable sort orders them. No row is sorted for that. All metrics follow from the ranks of the right
matches, and a match's rank is counted: the entries that come before it, less the removed ones.

Definitions: Zheng et al., "Scalable person re-identification: a benchmark" (ICCV 2015) for CMC and
mAP and for what is removed; Ye et al. (TPAMI 2021) for mINP; Li et al., "DeepReID" (CVPR 2014) for
the single-gallery-shot protocol of CUHK03.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dhcl_ops import _arrays, _checks
from dhcl_ops._ops import define
from dhcl_ops._products import full_precision, pieces_of, split_where_it_pays, upper_norms

__all__ = ["NoValidQuery", "RankingMetrics", "evaluate_ranking"]

_OP = "evaluate_ranking"
_FLOATS = (*_checks.FLOATS, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Entries of the distance matrix that exist at a time; a GPU takes four times as many, since a
# block of few queries would leave it half idle.
_BLOCK_ENTRIES = 1 << 24
# Of a gallery's size; a longer one would only take memory.
_LONGEST_CMC = 1 << 24


class NoValidQuery(ValueError):
    """No query has a right match in the gallery, so that there is nothing to take a mean of."""


class RankingMetrics(NamedTuple):
    """What :func:`evaluate_ranking` returns; Q is the number of queries.

    ``cmc`` (max_rank,) float64: share of valid queries with a right match among the first k.
    ``mAP``, ``mINP``: means over the valid queries. ``num_valid``: queries with a right match
    in the gallery, the only ones that count. With ``per_query`` also ``average_precision`` and
    ``inverse_negative_penalty`` (Q,) float64, NaN where not valid, and ``first_match`` (Q,) int64,
    the rank of the first right match from 1, 0 where not valid.
    """

    cmc: torch.Tensor
    mAP: float
    mINP: float
    num_valid: int
    average_precision: torch.Tensor | None = None
    inverse_negative_penalty: torch.Tensor | None = None
    first_match: torch.Tensor | None = None


class Identities(NamedTuple):
    """Who is in the images and which camera took them, as :func:`evaluate_ranking` takes them."""

    query_ids: Any  # (Q,)
    gallery_ids: Any  # (G,)
    query_cameras: Any = None  # (Q,)
    gallery_cameras: Any = None  # (G,)


class Settings(NamedTuple):
    """How a gallery is evaluated; :func:`evaluate_ranking` says what most fields mean."""

    metric: str = "euclidean"
    protocol: str = "market"
    ap: str = "hits"
    max_rank: int = 50
    junk_id: int | None = -1
    repeats: int = 10
    per_query: bool = False
    # Of open-reid's protocols: remove all entries of the query's camera, not only the right ones;
    # and count every right match in the CMC, past the wrong ones before it, not the first alone.
    separate_cameras: bool = False
    every_match: bool = False


# ---- op -----------------------------------------------------------------------------------------


def _match_ranks_reference(
    distance: torch.Tensor,
    members: torch.Tensor,
    begin: torch.Tensor,
    offsets: torch.Tensor,
    total: int,
    query_cameras: torch.Tensor | None,
    gallery_cameras: torch.Tensor | None,
) -> torch.Tensor:
    device = distance.device
    queries = torch.arange(len(distance), device=device)
    query = queries.repeat_interleave(offsets.diff(), output_size=total)
    match = members[begin[query] + torch.arange(total, device=device) - offsets[query]]
    removed = torch.zeros_like(query, dtype=torch.bool)
    if query_cameras is not None and gallery_cameras is not None:
        removed = query_cameras[query] == gallery_cameras[match]
    ranks = torch.zeros_like(query)
    for rows in queries.split(256):
        block = distance[rows]
        here = (query >= rows[0]) & (query <= rows[-1])
        row, entry = query[here] - rows[0], match[here]
        present = torch.ones_like(block, dtype=torch.int64)
        present[row, entry] = (~removed[here]).long()
        order = block.argsort(dim=1, stable=True)
        sorted_ranks = present.gather(1, order).cumsum(1)
        ranks[here] = torch.empty_like(order).scatter_(1, order, sorted_ranks)[row, entry]
    return ranks.masked_fill(removed, 0)


def _match_ranks_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    distance = torch.randint(0, 9, (3, 8), generator=generator).float()
    gallery = torch.tensor([1, 2, 1, 0, 2, 1, 1, 3])
    queries = torch.tensor([1, 5, 2])
    members, begin, offsets = matches(queries, gallery)
    cameras = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1, 0, 0, 1, 0, 1])
    tensors = (distance, members, begin, offsets, *cameras)
    d, m, b, o, qc, gc = (t.to(device) for t in tensors)
    return d, m, b, o, int(offsets[-1]), qc, gc


def matches(
    query_ids: torch.Tensor, gallery_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gallery entries grouped by identity, and where each query's group begins and how long it is.

    The lengths are given as offsets (Q + 1,).
    """
    ordered, members = gallery_ids.sort(stable=True)
    begin = torch.searchsorted(ordered, query_ids)
    end = torch.searchsorted(ordered, query_ids, right=True)
    return members, begin, torch.nn.functional.pad((end - begin).cumsum(0), (1, 0))


_match_ranks = define(
    "match_ranks(Tensor distance, Tensor members, Tensor begin, Tensor offsets, int total, "
    "Tensor? query_cameras, Tensor? gallery_cameras) -> Tensor",
    family="ranking",
    reference=_match_ranks_reference,
    fake=lambda distance, members, begin, offsets, total, query_cameras, gallery_cameras: (
        members.new_empty(total)
    ),
    sample=_match_ranks_sample,
)


# ---- distances ----------------------------------------------------------------------------------


class GivenDistances:
    """Blocks of rows of a distance matrix."""

    def __init__(self, distance: torch.Tensor) -> None:
        _checks.tensor(_OP, "distance", distance)
        _checks.rank(_OP, "distance", distance, 2)
        _checks.dtype(_OP, "distance", distance, _FLOATS)
        self.distance = distance.detach()
        self.shape = (distance.shape[0], distance.shape[1])
        self.device = distance.device

    def keep(self, columns: torch.Tensor) -> None:
        self.columns = columns

    def block(self, start: int, stop: int) -> torch.Tensor:
        rows = self.distance[start:stop]
        if len(self.columns) < self.shape[1]:
            rows = rows[:, self.columns]
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        if bool(rows.isnan().any()):
            row = start + int(rows.isnan().any(dim=1).nonzero()[0])
            raise ValueError(f"{_OP}: distance must not be NaN (got one in row {row})")
        return rows


class FeatureDistances:
    """Blocks of rows of what orders a gallery like the distance does, from features.

    Euclidean: |g|^2 / 2 - q.g, which is (|q - g|^2 - |q|^2) / 2. Cosine: -q.g of normalised rows.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor, metric: str) -> None:
        for name, value in (("query", query), ("gallery", gallery)):
            _checks.tensor(_OP, name, value)
            _checks.rank(_OP, name, value, 2)
            _checks.dtype(_OP, name, value, _FLOATS)
        _checks.same_device(_OP, query=query, gallery=gallery)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"{_OP}: query and gallery must have one width "
                f"(got {query.shape[1]} and {gallery.shape[1]})"
            )
        both_double = query.dtype == gallery.dtype == torch.float64
        dtype = torch.float64 if both_double else torch.float32
        self.query, self.gallery = query.detach().to(dtype), gallery.detach().to(dtype)
        for name, rows in (("query", self.query), ("gallery", self.gallery)):
            upper_norms(_OP, name, rows)
        self.pieces = pieces_of(query.dtype), pieces_of(gallery.dtype)
        self.metric = metric
        self.shape = (query.shape[0], gallery.shape[0])
        self.device = query.device

    def keep(self, columns: torch.Tensor) -> None:
        if len(columns) < self.shape[1]:
            self.gallery = self.gallery[columns]
        if self.metric == "cosine":
            # The query's length does not change its order.
            self.gallery = torch.nn.functional.normalize(self.gallery, eps=1e-30)
            self.pieces = self.pieces[0], 2
        else:
            self.half_squares = self.gallery.square().sum(dim=1) / 2
        self.split = split_where_it_pays(self.query, self.gallery, *self.pieces)

    def block(self, start: int, stop: int) -> torch.Tensor:
        if self.split is not None:
            products = self.split.tile(slice(start, stop)).neg_()
            return products if self.metric == "cosine" else products.add_(self.half_squares)
        rows = self.query[start:stop]
        if self.metric == "cosine":
            return torch.mm(rows, self.gallery.t()).neg_()
        return torch.addmm(self.half_squares, rows, self.gallery.t(), alpha=-1)


# ---- metrics ------------------------------------------------------------------------------------


class _PerQuery(NamedTuple):
    """Per query: float64 metrics, NaN without a right match, and the first match's rank or 0."""

    average_precision: np.ndarray[Any, Any]
    inverse_negative_penalty: np.ndarray[Any, Any]
    first_match: np.ndarray[Any, Any]


class _Ordered(NamedTuple):
    """The ranks of all queries' matches that are not removed, by query and ascending."""

    ranks: torch.Tensor  # (M,) int64
    hits: torch.Tensor  # (M,) int64, which right match of its query each is, from 1
    counts: torch.Tensor  # (Q,) int64


def _ordered(ranks: torch.Tensor, offsets: torch.Tensor) -> _Ordered:
    """Ranks of each query's matches, in the order of ``offsets``; 0 is that of a removed entry."""
    device, queries = ranks.device, len(offsets) - 1
    query = torch.arange(queries, device=device)
    query = query.repeat_interleave(offsets.diff(), output_size=len(ranks))
    # One number for both, so that one sort orders them.
    keys = ranks + (query << 32)
    keys = keys[ranks > 0].sort().values
    query, ranks = keys >> 32, keys & 0xFFFFFFFF
    counts = torch.bincount(query, minlength=queries)
    starts = counts.cumsum(0) - counts
    hits = torch.arange(len(ranks), device=device) - starts[query] + 1
    return _Ordered(ranks, hits, counts)


def _per_query(ordered: _Ordered, ap: str) -> _PerQuery:
    """Metrics from the ranks of each query's matches."""
    ranks, hits = ordered.ranks, ordered.hits.double()
    precision = hits / ranks
    if ap == "trapezoid":
        # Between the precision of the place before the hit and the hit's own, as in the Matlab code
        # published with Market-1501.
        before = torch.where(ranks > 1, (hits - 1) / (ranks - 1).clamp(min=1), 1.0)
        precision = (precision + before) / 2
    places, counts = ranks.numpy(force=True), ordered.counts.numpy(force=True)
    average = np.full(len(counts), np.nan)
    penalty = np.full(len(counts), np.nan)
    first = np.zeros(len(counts), np.int64)
    valid = counts > 0
    if valid.any():
        starts, sizes = (np.cumsum(counts) - counts)[valid], counts[valid]
        average[valid] = np.add.reduceat(precision.numpy(force=True), starts) / sizes
        penalty[valid] = sizes / places[starts + sizes - 1]
        first[valid] = places[starts]
    return _PerQuery(average, penalty, first)


def _cmc_of_every_match(ordered: _Ordered, max_rank: int) -> Any:
    """Sum over the queries of the share of right matches with fewer than k wrong ones before."""
    counts = ordered.counts.numpy(force=True)
    wrong = (ordered.ranks - ordered.hits).numpy(force=True)
    share = np.repeat(1.0 / np.maximum(counts, 1), counts)
    near = wrong < max_rank
    return np.cumsum(np.bincount(wrong[near], share[near], minlength=max_rank))


def _cmc_of_first_matches(first_match: Any, max_rank: int) -> Any:
    valid = first_match[first_match > 0]
    found = np.bincount(np.minimum(valid, max_rank + 1), minlength=max_rank + 2)
    return np.cumsum(found)[1 : max_rank + 1] / max(len(valid), 1)


def _single_shot_cmc(
    block: torch.Tensor,
    identities: Identities,
    settings: Settings,
    randint: Callable[[int, Any], Any],
) -> Iterator[Any]:
    """CMC (max_rank,) of each query of the block that has a match, one gallery image per identity.

    ``block`` holds the distances of the queries in ``identities``. Draws are those of
    ``np.random.choice`` for one identity after another, in the order in which identities first
    appear in the ranked list: torchreid's, given its random state.
    """
    query_ids = identities.query_ids.numpy(force=True)
    gallery_ids = identities.gallery_ids.numpy(force=True)
    removed = torch.zeros(block.shape, dtype=torch.bool, device=block.device)
    if identities.query_cameras is not None:
        removed = identities.query_cameras[:, None] == identities.gallery_cameras
        if not settings.separate_cameras:
            removed &= identities.query_ids[:, None] == identities.gallery_ids
    orders = block.argsort(dim=1, stable=True).numpy(force=True)
    rows = zip(orders, query_ids, removed.numpy(force=True), strict=True)
    for order, query_id, row_removed in rows:
        ids = gallery_ids[order[~row_removed[order]]]
        if not (ids == query_id).any():
            continue
        identity, firsts, group = np.unique(ids, return_index=True, return_inverse=True)
        by_appearance = np.argsort(firsts)
        places = np.argsort(group, kind="stable")  # in the ranked list, grouped by identity
        counts = np.bincount(group)
        starts = np.cumsum(counts) - counts
        counts, starts = counts[by_appearance], starts[by_appearance]
        own = int(np.flatnonzero(identity[by_appearance] == query_id)[0])
        cmc = np.zeros(settings.max_rank)
        for _ in range(settings.repeats):
            drawn = places[starts + randint(0, counts)]
            cmc[int((drawn < drawn[own]).sum()) :] += 1.0
        yield cmc / settings.repeats


def _ids(name: str, value: Any, size: int, what: str, device: torch.device) -> torch.Tensor:
    if _arrays.is_array(value):
        value = _arrays.to_tensor(_OP, name, value)
    _checks.tensor(_OP, name, value)
    _checks.dtype(_OP, name, value, _INTEGERS)
    _checks.shape(_OP, name, value, (size,), what)
    ids: torch.Tensor = value.detach().to(device, torch.int64).contiguous()
    return ids


def evaluate_ranking(
    distance_or_features: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    query_cameras: torch.Tensor | None = None,
    gallery_cameras: torch.Tensor | None = None,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    protocol: Literal["market", "cuhk03"] = "market",
    ap: Literal["hits", "trapezoid"] = "hits",
    max_rank: int = 50,
    junk_id: int | None = -1,
    repeats: int = 10,
    seed: int = 0,
    per_query: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> RankingMetrics:
    """Evaluate how a gallery is ranked for each query.

    Gallery entries of equal distance are ranked by index, as by a stable sort. Removed before
    ranking are gallery entries of the query's identity seen by the query's camera (where cameras
    are given), and junk: entries whose identity is ``junk_id``. Distractors, identity 0 in
    Market-1501, need no rule: they are no query's identity and count as wrong. A query without a
    right match left is not valid and counts nowhere.

    ``protocol="market"`` is the standard of the field. ``"cuhk03"`` differs in its CMC alone: for
    each query one gallery image per identity is drawn, ``repeats`` times, and the results averaged.

    Args:
        distance_or_features: (Q, G) distances, any float dtype, smaller is closer; or a pair of
            features (Q, d) and (G, d), from which distances are computed in blocks of queries (in
            float32; float64 if both are) and the matrix never exists. Arrays give arrays back.
        query_ids, gallery_ids: (Q,) and (G,) integer identities, tensors or arrays.
        query_cameras, gallery_cameras: (Q,) and (G,) integer cameras, both or neither.
        metric: of features, ``"euclidean"`` on the rows as given or ``"cosine"``.
        protocol: ``"market"`` or ``"cuhk03"``.
        ap: ``"hits"``, the mean of the precision at each right match, which torchreid and fast-reid
            take; or ``"trapezoid"``, that of the Matlab code of 2017, which lies a few
            points off.
        max_rank: length of the CMC, in [1, 2^24]. Past the gallery's end it stays as it is.
        junk_id: identity of junk, None for no junk.
        repeats, seed: of ``"cuhk03"``, the seed in [0, 2^32); the draws are torchreid's after
            ``np.random.seed(seed)``.
        per_query: return the metrics of each query too.
        progress: called as ``progress("queries", rows_done, rows_total)``.

    Returns:
        :class:`RankingMetrics`. Given distances, the same bits for any number of threads and
        any device; from features, distances are as exact as the device's fp32 matrix product, which
        for larger ones on CUDA is made of three fp16 products (off by at most 2^-21 |q| |g| beside
        the rounding of the sums; 6 bytes for each element of the features while it runs, where half
        of the free memory holds them).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range, a
            distance that is NaN, or a feature that is not finite (the message names the row).
        NoValidQuery: a ValueError too, where no query has a right match.
    """
    randint = np.random.RandomState(_checks.integer(_OP, "seed", seed, 0, 2**32 - 1)).randint
    identities = Identities(query_ids, gallery_ids, query_cameras, gallery_cameras)
    settings = Settings(metric, protocol, ap, max_rank, junk_id, repeats, per_query)
    return evaluate_with_draws(distance_or_features, identities, settings, randint, progress)


def evaluate_with_draws(
    distance_or_features: Any,
    identities: Identities,
    settings: Settings,
    randint: Callable[[int, Any], Any],
    progress: Callable[[str, int, int], object] | None = None,
) -> RankingMetrics:
    """:func:`evaluate_ranking` with the caller's own random draws for the protocol of CUHK03.

    Args:
        distance_or_features: (Q, G) distances or a pair of features, as there.
        identities: tensors or arrays, as there.
        settings: as there.
        randint: called as ``randint(0, highs)``, gives one integer in [0, high) for each of
            ``highs``, like ``numpy.random.randint``.
        progress: as there.

    Returns:
        :class:`RankingMetrics`.

    Raises:
        TypeError, ValueError: as there.
    """
    _checks.one_of(_OP, "metric", settings.metric, ("euclidean", "cosine"))
    _checks.one_of(_OP, "protocol", settings.protocol, ("market", "cuhk03"))
    _checks.one_of(_OP, "ap", settings.ap, ("hits", "trapezoid"))
    settings = settings._replace(
        max_rank=_checks.integer(_OP, "max_rank", settings.max_rank, 1, _LONGEST_CMC),
        repeats=_checks.integer(_OP, "repeats", settings.repeats, 1),
    )
    pair = isinstance(distance_or_features, (tuple, list))
    given = list(distance_or_features) if pair else [distance_or_features]
    if pair and len(given) != 2:
        raise ValueError(f"{_OP}: features must be a pair, query and gallery (got {len(given)})")
    names = ("query", "gallery") if pair else ("distance",)
    tensors = _arrays.as_tensors(_OP, **dict(zip(names, given, strict=True)))
    distances: FeatureDistances | GivenDistances
    if pair:
        distances = FeatureDistances(tensors[0], tensors[1], settings.metric)
    else:
        distances = GivenDistances(tensors[0])
    with full_precision(distances.device):
        identities = without_junk(distances, identities, settings.junk_id)
        each, cmcs = _each_query(distances, identities, settings, randint, progress)
    result = _means(distances.shape, distances.device, each, cmcs, settings)
    metrics: RankingMetrics = _arrays.like(given[0], result)
    return metrics


def without_junk(
    distances: FeatureDistances | GivenDistances, given: Identities, junk_id: int | None
) -> Identities:
    """The checked identities as int64 tensors; junk is taken out of them and of the distances."""
    device = distances.device
    (queries, gallery), one_each = distances.shape, ("one per query", "one per gallery entry")
    query_ids = _ids("query_ids", given.query_ids, queries, one_each[0], device)
    gallery_ids = _ids("gallery_ids", given.gallery_ids, gallery, one_each[1], device)
    if (given.query_cameras is None) != (given.gallery_cameras is None):
        raise ValueError(f"{_OP}: give cameras for both query and gallery or for neither")
    kept = torch.arange(gallery, device=device)
    if junk_id is not None:
        junk_id = _checks.integer(_OP, "junk_id", junk_id, -(2**63))
        kept = kept[gallery_ids != junk_id]
    distances.keep(kept)
    if given.query_cameras is None:
        return Identities(query_ids, gallery_ids[kept])
    query_cameras = _ids("query_cameras", given.query_cameras, queries, one_each[0], device)
    cameras = _ids("gallery_cameras", given.gallery_cameras, gallery, one_each[1], device)
    return Identities(query_ids, gallery_ids[kept], query_cameras, cameras[kept])


def _each_query(
    distances: FeatureDistances | GivenDistances,
    identities: Identities,
    settings: Settings,
    randint: Callable[[int, Any], Any],
    progress: Callable[[str, int, int], object] | None,
) -> tuple[_PerQuery, list[Any]]:
    """Metrics of each query and, unless it is that of first matches, the terms of the CMC."""
    queries, gallery = distances.shape
    members, begin, offsets = matches(identities.query_ids, identities.gallery_ids)
    bounds = offsets.tolist()
    ranks: list[torch.Tensor] = []
    cmcs: list[Any] = []
    entries = _BLOCK_ENTRIES * (4 if distances.device.type == "cuda" else 1)
    step = max(entries // max(gallery, 1), 64)
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        block = distances.block(start, stop)
        cameras = None
        if identities.query_cameras is not None:
            cameras = identities.query_cameras[start:stop]
            if settings.separate_cameras:
                # Behind all right matches, which are seen by other cameras.
                same = cameras[:, None] == identities.gallery_cameras
                block = block.masked_fill(same, math.inf)
        part = offsets[start : stop + 1] - bounds[start]
        total = bounds[stop] - bounds[start]
        found = _match_ranks(
            block, members, begin[start:stop], part, total, cameras, identities.gallery_cameras
        )
        ranks.append(found)
        if settings.protocol == "cuhk03":
            here = identities._replace(
                query_ids=identities.query_ids[start:stop], query_cameras=cameras
            )
            cmcs += _single_shot_cmc(block, here, settings, randint)
        if progress is not None:
            progress("queries", stop, queries)
    ordered = _ordered(torch.cat(ranks) if ranks else members.new_empty(0), offsets)
    if settings.every_match:
        cmcs = [_cmc_of_every_match(ordered, settings.max_rank)]
    return _per_query(ordered, settings.ap), cmcs


def metrics_of_ranks(
    ranks: torch.Tensor, offsets: torch.Tensor, gallery: int, settings: Settings
) -> RankingMetrics:
    """Metrics from the ranks (T,) of all right matches, by query at ``offsets`` (Q + 1,).

    A rank counts from 1 and is 0 for a match that is removed; ``gallery`` is the number of entries.
    """
    each = _per_query(_ordered(ranks, offsets), settings.ap)
    return _means((len(offsets) - 1, gallery), ranks.device, each, [], settings)


def _means(
    shape: tuple[int, int],
    device: torch.device,
    each: _PerQuery,
    cmcs: list[Any],
    settings: Settings,
) -> RankingMetrics:
    """Metrics over the valid queries."""
    valid = each.first_match > 0
    num_valid = int(valid.sum())
    if num_valid == 0:
        queries, gallery = shape
        raise NoValidQuery(
            f"{_OP}: no query has a right match in the gallery once entries of its own camera and "
            f"junk are removed (got {queries} queries, {gallery} gallery entries)"
        )
    if cmcs:
        cmc = np.sum(cmcs, axis=0) / num_valid
    else:
        cmc = _cmc_of_first_matches(each.first_match, settings.max_rank)
    # fsum rounds once, whatever the order.
    return RankingMetrics(
        torch.from_numpy(cmc).to(device),
        math.fsum(each.average_precision[valid]) / num_valid,
        math.fsum(each.inverse_negative_penalty[valid]) / num_valid,
        num_valid,
        *(torch.from_numpy(a).to(device) if settings.per_query else None for a in each),
    )
