"""k-reciprocal encoding: from features to weighted sets of mutual neighbours.

The sets and weights of Zhong et al. (CVPR 2017, "Re-ranking person re-identification with
k-reciprocal encoding"), in the form of their code or in that of SpCL (Ge et al., NeurIPS 2020),
which most unsupervised re-identification code shares. Both build N x N matrices; here rows stay
sparse throughout.

The stages, one op each: mutual neighbours, their expansion, similarities within the sets, weights,
query expansion. ``csrc/reciprocal.h`` states the orders of summation which make the result equal to
a dense computation, to the bit, given the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from dhcl_ops import _arrays, _checks, _csr, _sums
from dhcl_ops._csr import Rows
from dhcl_ops._ops import define
from dhcl_ops._products import full_precision
from dhcl_ops._progress import Progress, rows_at_once, slices
from dhcl_ops.knn import Neighbours, knn

Convention = Literal["spcl", "zhong"]
CONVENTIONS = ("spcl", "zhong")


# ---- mutual neighbours --------------------------------------------------------------------------


def _reciprocal_positions_reference(ranks: torch.Tensor) -> torch.Tensor:
    n, width = ranks.shape
    out = torch.full((n, width), -1, dtype=torch.int16, device=ranks.device)
    if out.numel() == 0:
        return out
    for start in range(0, n, max(1, _csr.CHUNK // (width * width))):
        block = ranks[start : start + max(1, _csr.CHUNK // (width * width))].long()
        own = torch.arange(start, start + len(block), device=ranks.device)
        same = ranks[block] == own[:, None, None]
        position = torch.where(same, torch.arange(width, device=ranks.device), -1).amax(2)
        out[start : start + len(block)] = position.to(torch.int16)
    return out


def _k_reciprocal_reference(
    ranks: torch.Tensor, positions: torch.Tensor, k: int, half: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(ranks)
    keys = []
    block = max(1, _csr.CHUNK // max(1, k * half * k))
    near = torch.where((positions >= 0) & (positions < half), ranks, -1)[:, :half].long()
    for start in range(begin, end, block):
        stop = min(start + block, end)
        rows = torch.arange(start, stop, device=ranks.device)
        mutual = (positions[start:stop, :k] >= 0) & (positions[start:stop, :k] < k)
        members = torch.where(mutual, ranks[start:stop, :k].long(), -1)
        # (rows, k, half): the close mutual neighbours of each mutual neighbour.
        candidates = near[members.clamp(min=0)]
        exists = (candidates >= 0) & mutual[:, :, None]
        inside = (candidates[:, :, :, None] == members[:, None, None, :]).any(3) & exists
        taken = 3 * inside.sum(2) > 2 * exists.sum(2)
        added = exists & taken[:, :, None]
        row_of = rows[:, None, None].expand_as(candidates)
        keys.append((rows[:, None] * n + members)[mutual])
        keys.append((row_of * n + candidates)[added])
    distinct = torch.cat(keys).unique() if keys else ranks.new_empty(0, dtype=torch.int64)
    offsets = _csr.offsets_of(distinct // max(n, 1) - begin, end - begin)
    return offsets, (distinct % max(n, 1)).int()


def _sample_ranks(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, generator=generator).repeat_interleave(5, 0)
    features = nn.functional.normalize(features + 0.2 * torch.randn(15, 20, generator=generator))
    similarities, ranks = (features @ features.T).topk(6, dim=1)
    return features.to(device), ranks.int().to(device), similarities.to(device)


def _sample_csr(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    _, ranks, _ = _sample_ranks(device)
    return _k_reciprocal_reference(ranks, _reciprocal_positions_reference(ranks), 6, 4, 0, 15)


def sample_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small CSR matrix of weights, for the samples of ops that take one."""
    offsets, columns = _sample_csr(device)
    generator = torch.Generator().manual_seed(1)
    logits = -torch.rand(len(columns), generator=generator).to(device)
    return offsets, columns, _softmax_rows_reference(offsets, logits)


_reciprocal_positions = define(
    "reciprocal_positions(Tensor ranks) -> Tensor",
    family="reciprocal",
    reference=_reciprocal_positions_reference,
    fake=lambda ranks: torch.empty_like(ranks, dtype=torch.int16),
    sample=lambda device: (_sample_ranks(device)[1],),
)


k_reciprocal = define(
    "k_reciprocal(Tensor ranks, Tensor positions, int k, int half, int begin, int end) "
    "-> (Tensor, Tensor)",
    family="reciprocal",
    reference=_k_reciprocal_reference,
    fake=lambda ranks, positions, k, half, begin, end: _csr.fake_rows(ranks, end - begin)[:2],
    sample=lambda device: (
        _sample_ranks(device)[1],
        _reciprocal_positions_reference(_sample_ranks(device)[1]),
        6,
        4,
        2,
        15,
    ),
)


# ---- weights ------------------------------------------------------------------------------------


def _pair_dots_reference(
    features: torch.Tensor,
    ranks: torch.Tensor,
    similarities: torch.Tensor | None,
    offsets: torch.Tensor,
    columns: torch.Tensor,
    begin: int,
) -> torch.Tensor:
    rows = _csr.row_ids(offsets) + begin
    out = features.new_empty(len(columns))
    block = max(1, _csr.CHUNK // max(features.shape[1], _sums.COLUMNS))
    for start in range(0, len(columns), block):
        row, column = rows[start : start + block], columns[start : start + block].long()
        dots = _sums.sum_elements(features[row] * features[column])
        if similarities is not None and ranks.shape[1]:
            known = ranks[row] == column[:, None]
            place = torch.where(known, torch.arange(ranks.shape[1], device=row.device), -1).amax(1)
            stored = similarities[row].gather(1, place.clamp(min=0)[:, None]).squeeze(1)
            dots = torch.where(place >= 0, stored, dots)
        out[start : start + block] = dots
    return out


_pair_dots = define(
    "pair_dots(Tensor features, Tensor ranks, Tensor? similarities, Tensor offsets, "
    "Tensor columns, int begin) -> Tensor",
    family="reciprocal",
    reference=_pair_dots_reference,
    fake=lambda features, ranks, similarities, offsets, columns, begin: features.new_empty(
        columns.shape[0]
    ),
    sample=lambda device: (*_sample_ranks(device), *_sample_csr(device), 0),
)


def _softmax_rows_reference(offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    rows = _csr.row_ids(offsets)
    count = len(offsets) - 1
    wide = logits.double()
    top = wide.new_full((count,), -torch.inf).scatter_reduce(0, rows, wide, "amax")
    exps = (wide - top[rows]).exp()
    sums = wide.new_zeros(count).index_add(0, rows, exps)
    return (exps / sums[rows]).float()


softmax_rows = define(
    "softmax_rows(Tensor offsets, Tensor logits) -> Tensor",
    family="reciprocal",
    reference=_softmax_rows_reference,
    fake=lambda offsets, logits: torch.empty_like(logits),
    sample=lambda device: (sample_weights(device)[0], -sample_weights(device)[2]),
)


# ---- query expansion ----------------------------------------------------------------------------


def _query_expand_reference(
    ranks: torch.Tensor,
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    k2: int,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = len(offsets) - 1
    sizes = offsets.diff()
    near = ranks[begin:end, :k2].long()
    all_keys, all_values = [], []
    for start, stop in _csr.chunks(sizes[near].sum(1)):
        lists = near[start:stop].reshape(-1)
        rows = torch.arange(start, stop, device=ranks.device).repeat_interleave(k2)
        owner, place = _csr.places(sizes[lists])
        entry = offsets[lists[owner]] + place
        # A stable sort keeps the entries of one column in the order of the neighbour list, which is
        # the stated order of their sum.
        keys, order = (rows[owner] * n + columns[entry]).sort(stable=True)
        keys, sums = _csr.sums_in_order(values[entry[order]], keys)
        all_keys.append(keys)
        all_values.append(sums / torch.tensor(float(k2), device=sums.device))
    keys = torch.cat(all_keys) if all_keys else offsets.new_empty(0)
    sums = torch.cat(all_values) if all_values else values.new_empty(0)
    return _csr.offsets_of(keys // max(n, 1), end - begin), (keys % max(n, 1)).int(), sums


query_expand = define(
    "query_expand(Tensor ranks, Tensor offsets, Tensor columns, Tensor values, int k2, int begin, "
    "int end) -> (Tensor, Tensor, Tensor)",
    family="reciprocal",
    reference=_query_expand_reference,
    fake=lambda ranks, offsets, columns, values, k2, begin, end: _csr.fake_rows(ranks, end - begin),
    sample=lambda device: (_sample_ranks(device)[1], *sample_weights(device), 3, 1, 14),
)


# ---- the stages together ------------------------------------------------------------------------


class Lists(NamedTuple):
    """The neighbour lists as the stages take them."""

    ranks: torch.Tensor  # (N, width) int32
    k: int  # neighbours that count, the row itself included
    half: int  # neighbours of a neighbour that count
    k2: int


def list_width(op: str, n: int, k1: int, k2: int, convention: str) -> tuple[int, int, int]:
    """Check k1 and k2; return the width of the lists, of the halves, and k2, clamped to N rows."""
    k1 = _checks.integer(op, "k1", k1, 1)
    k2 = _checks.integer(op, "k2", k2, 1)
    _checks.one_of(op, "convention", convention, CONVENTIONS)
    if k2 > k1:
        raise ValueError(f"{op}: k2 must be at most k1 (got k1={k1}, k2={k2})")
    # SpCL's search returns k1 neighbours, the row itself among them; Zhong et al. count k1 others.
    k = min(k1 + (convention == "zhong"), n)
    # round() goes half to even, as NumPy's around in both Python codes: 25 -> 12, 15 -> 8. The
    # Matlab code of Zhong et al. takes round((k1 + 1) / 2) in all: 13 for 25 too, but 8 for 15.
    return k, min(round(k1 / 2) + 1, k), min(k2, n)


def _ranges(lists: Lists, stage: str, progress: Progress | None) -> Iterator[tuple[int, int]]:
    return slices(len(lists.ranks), stage, progress, rows_at_once(lists.ranks.device))


def _parts_of_sets(
    lists: Lists, progress: Progress | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ranks, k, half, _ = lists
    positions = _reciprocal_positions(ranks)
    return [
        k_reciprocal(ranks, positions, k, half, begin, end)
        for begin, end in _ranges(lists, "mutual neighbours", progress)
    ]


def _joined(
    parts: list[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return cast("tuple[torch.Tensor, torch.Tensor]", _csr.joined(parts, like)[:2])


def expanded_sets(lists: Lists, progress: Progress | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded mutual neighbours of every row: offsets and columns."""
    return _joined(_parts_of_sets(lists, progress), lists.ranks)


def first_sets(lists: Lists, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and columns of the expanded sets of the first rows alone."""
    positions = _reciprocal_positions(lists.ranks)
    sets = k_reciprocal(lists.ranks, positions, lists.k, lists.half, 0, count)
    return cast("tuple[torch.Tensor, torch.Tensor]", sets)


def expanded_weights(lists: Lists, weights: Rows, progress: Progress | None) -> Rows:
    """The mean of the rows of each row's first k2 neighbours."""
    if lists.k2 <= 1:
        return weights
    parts = [
        query_expand(lists.ranks, *weights, lists.k2, begin, end)
        for begin, end in _ranges(lists, "query expansion", progress)
    ]
    return Rows(*_csr.joined(parts, lists.ranks))


def lower_by_products(
    left: torch.Tensor, right: torch.Tensor, least: torch.Tensor, others: torch.Tensor
) -> None:
    """Lower the smallest products of both sides' rows, in place, by those of the two sides."""
    for start in range(0, len(right), 8192):
        stop = min(start + 8192, len(right))
        products = left @ right[start:stop].T
        torch.minimum(least, products.amin(1), out=least)
        torch.minimum(others[start:stop], products.amin(0), out=others[start:stop])


def largest_squares(features: torch.Tensor, progress: Progress | None) -> torch.Tensor:
    """Of each row (n, d) of norm 1, the largest squared distance (n,) to any row.

    On the CPU by one pass over half of all pairs, as exact as its matrix product, whose bits may
    depend on the number of threads; on CUDA by :func:`largest_squares_by_search`.
    """
    if features.is_cuda:
        return largest_squares_by_search(features, progress)
    n = len(features)
    least = features.new_full((n,), torch.inf)
    with full_precision(features.device):
        for begin, end in slices(n, "largest distances", progress, 1024):
            lower_by_products(
                features[begin:end], features[begin:], least[begin:end], least[begin:]
            )
    return 2.0 - 2.0 * least


def largest_squares_by_search(features: torch.Tensor, progress: Progress | None) -> torch.Tensor:
    """The same, exact in the stated order of summation: the row opposite to x is nearest to -x.

    So it is found among 16-bit products, with a certificate. Memory: another copy of the features.
    """
    if len(features) == 0:
        return features.new_empty(0)

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress("largest distances", done, total)

    opposite = knn(features, 1, queries=features.neg(), progress=report)
    return 2.0 + 2.0 * opposite.similarities.squeeze(1)


def feature_weights(
    features: torch.Tensor,
    lists: Lists,
    similarities: torch.Tensor | None,
    scale: torch.Tensor | None,
    progress: Progress | None,
) -> Rows:
    """Expanded sets with their weights: softmax(-d2), of d2 / scale where a scale (N,) is given."""
    parts = _parts_of_sets(lists, progress)
    dots = [
        _pair_dots(features, lists.ranks, similarities, *part, begin)
        for (begin, _), part in zip(_ranges(lists, "weights", progress), parts, strict=True)
    ]
    offsets, columns = _joined(parts, lists.ranks)
    squares = 2.0 - 2.0 * (torch.cat(dots) if dots else features.new_empty(0))
    if scale is not None:
        sizes, total = offsets.diff(), len(columns)
        squares = squares / scale.repeat_interleave(sizes, output_size=total)
    return Rows(offsets, columns, softmax_rows(offsets, -squares))


def neighbour_lists(
    op: str,
    features: torch.Tensor,
    width: int,
    ranks: Neighbours | torch.Tensor | None,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ranks (N, width) int32, their similarities where known, and how many are not certified."""
    n = len(features)
    if ranks is None:
        found = knn(features, width, progress=progress)
        return found.indices.int(), found.similarities, found.uncertified
    similarities, uncertified = None, torch.zeros((), dtype=torch.int64, device=features.device)
    if isinstance(ranks, tuple):
        pair: list[torch.Tensor] = _arrays.as_tensors(op, similarities=ranks[0], indices=ranks[1])
        similarities, ranks = pair
        _checks.tensor(op, "ranks.similarities", similarities)
    _checks.tensor(op, "ranks", ranks)
    _checks.rank(op, "ranks", ranks, 2)
    _checks.dtype(op, "ranks", ranks, (torch.int64, torch.int32))
    _checks.same_device(op, features=features, ranks=ranks)
    if ranks.shape[0] != n or ranks.shape[1] < width:
        raise ValueError(
            f"{op}: ranks must have {n} rows and at least {width} columns "
            f"(got shape {tuple(ranks.shape)})"
        )
    if similarities is not None:
        _checks.shape(op, "ranks.similarities", similarities, tuple(ranks.shape), "as its indices")
        _checks.dtype(op, "ranks.similarities", similarities, _checks.ALL_FLOATS)
        similarities = similarities[:, :width].float().contiguous()
        if not bool(similarities.isfinite().all()):
            row = int((~similarities.isfinite()).nonzero()[0, 0])
            raise ValueError(
                f"{op}: ranks.similarities must be finite (got one that is not in row {row})"
            )
    ranks = ranks[:, :width]
    if ranks.numel():
        low, high = torch.stack(torch.aminmax(ranks)).tolist()
        if low < 0 or high >= n:
            raise ValueError(f"{op}: ranks must be in [0, {n}) (got {low if low < 0 else high})")
    return ranks.int().contiguous(), similarities, uncertified


class Encoded(NamedTuple):
    """Rows after the query expansion, and what is known of the way there."""

    rows: Rows
    uncertified: torch.Tensor


def encode(
    op: str,
    features: torch.Tensor,
    k1: int,
    k2: int,
    convention: str,
    ranks: Neighbours | torch.Tensor | None,
    progress: Progress | None,
    timer: Callable[[str], object] = lambda stage: None,
) -> Encoded:
    """Features (N, d), already checked, to the weighted sets whose overlap is the distance."""
    k, half, k2 = list_width(op, len(features), k1, k2, convention)
    found, similarities, uncertified = neighbour_lists(op, features, k, ranks, progress)
    lists = Lists(found, k, half, k2)
    timer("neighbours")
    scale = None
    if convention == "zhong":
        scale = largest_squares(features, progress).clamp(min=torch.finfo(torch.float32).tiny)
        timer("largest distances")
    weights = feature_weights(features, lists, similarities, scale, progress)
    timer("sets and weights")
    rows = expanded_weights(lists, weights, progress)
    timer("query expansion")
    return Encoded(rows, uncertified)
