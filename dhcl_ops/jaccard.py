"""The k-reciprocal Jaccard distance, sparse and exact.

The distance is that of Zhong et al. (CVPR 2017, "Re-ranking person re-identification with
k-reciprocal encoding"), in the form of their code or in that of SpCL (Ge et al., NeurIPS 2020),
which most unsupervised re-identification code shares. Both build two N x N matrices; here rows stay
sparse throughout, and pairs further apart than ``eps`` are never summed up.

The stages, one op each: mutual neighbours, their expansion, weights, query expansion, an inverted
index, and a join over it. ``csrc/jaccard.h`` states the orders of summation which make the result
equal to a dense computation, to the bit, given the same weights. The join prunes with the prefix
filter of set-similarity search (Bayardo, Ma, Srikant, WWW 2007), here for sums of minima.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from dhcl_ops import _arrays, _checks
from dhcl_ops._ops import define
from dhcl_ops.knn import Neighbours, full_precision, knn

__all__ = ["jaccard_distance", "jaccard_graph"]

Progress = Callable[[str, int, int], object]
Convention = Literal["spcl", "zhong"]

_FLOATS = (*_checks.FLOATS, torch.float64)
CONVENTIONS = ("spcl", "zhong")

# As in csrc/jaccard.h.
_DOT_COLUMNS = 128
_FIXED_POINT = 2.0**40

# Rows per call of a stage: short enough to stop for Ctrl-C, long enough to cost nothing.
_ROWS = 16384
# Elements that the references below hold in one temporary.
_CHUNK = 1 << 21


def _needed_weight(eps: float, longest: int) -> float:
    """The weight two rows must share for J <= eps, less a margin for rounding."""
    eps = torch.tensor(eps, dtype=torch.float32).item()
    return 2.0 * (1.0 - eps) / (2.0 - eps) - (1e-6 + longest * 6.0 / 16777216.0)


def _dynamic() -> Any:
    return torch.library.get_ctx().new_dynamic_size()


def _chunks(sizes: torch.Tensor, limit: int = _CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose sizes add up to at most the limit (one row at least)."""
    ends = sizes.cumsum(0)
    start = 0
    while start < len(sizes):
        done = int(ends[start - 1]) if start else 0
        stop = int(torch.searchsorted(ends, done + limit, right=True))
        stop = max(stop, start + 1)
        yield start, stop
        start = stop


def _row_ids(offsets: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff())


def _offsets_of(rows: torch.Tensor, count: int) -> torch.Tensor:
    """CSR offsets from the ascending row of every entry."""
    return torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))


def _sums_in_order(x: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct keys (ascending; given ascending), and the sum of each one's x in order."""
    distinct, counts = torch.unique_consecutive(keys, return_counts=True)
    starts = counts.cumsum(0) - counts
    total = x.new_zeros(len(distinct))
    for place in range(int(counts.max()) if len(counts) else 0):
        live = (counts > place).nonzero().squeeze(1)
        total[live] = total[live] + x[starts[live] + place]
    return distinct, total


# ---- mutual neighbours --------------------------------------------------------------------------


def _reciprocal_positions_reference(ranks: torch.Tensor) -> torch.Tensor:
    n, width = ranks.shape
    out = torch.full((n, width), -1, dtype=torch.int16, device=ranks.device)
    if out.numel() == 0:
        return out
    for start in range(0, n, max(1, _CHUNK // (width * width))):
        block = ranks[start : start + max(1, _CHUNK // (width * width))].long()
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
    block = max(1, _CHUNK // max(1, k * half * k))
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
    offsets = _offsets_of(distinct // max(n, 1) - begin, end - begin)
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


def _sample_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets, columns = _sample_csr(device)
    generator = torch.Generator().manual_seed(1)
    logits = -torch.rand(len(columns), generator=generator).to(device)
    return offsets, columns, _softmax_rows_reference(offsets, logits)


_reciprocal_positions = define(
    "reciprocal_positions(Tensor ranks) -> Tensor",
    family="jaccard",
    reference=_reciprocal_positions_reference,
    fake=lambda ranks: torch.empty_like(ranks, dtype=torch.int16),
    sample=lambda device: (_sample_ranks(device)[1],),
)


def _fake_lines(like: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = _dynamic()
    return (
        like.new_empty(rows + 1, dtype=torch.int64),
        like.new_empty(size, dtype=torch.int32),
        like.new_empty(size, dtype=torch.float32),
    )


_k_reciprocal = define(
    "k_reciprocal(Tensor ranks, Tensor positions, int k, int half, int begin, int end) "
    "-> (Tensor, Tensor)",
    family="jaccard",
    reference=_k_reciprocal_reference,
    fake=lambda ranks, positions, k, half, begin, end: _fake_lines(ranks, end - begin)[:2],
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
    rows = _row_ids(offsets) + begin
    out = features.new_empty(len(columns))
    missing = -features.shape[1] % _DOT_COLUMNS
    block = max(1, _CHUNK // max(1, features.shape[1] + missing))
    for start in range(0, len(columns), block):
        row, column = rows[start : start + block], columns[start : start + block].long()
        products = nn.functional.pad(features[row] * features[column], (0, missing))
        parts = products.new_zeros(len(products), _DOT_COLUMNS)
        for part in products.split(_DOT_COLUMNS, dim=1):
            parts = parts + part
        while parts.shape[1] > 1:
            half = parts.shape[1] // 2
            parts = parts[:, :half] + parts[:, half:]
        dots = parts.squeeze(1)
        if similarities is not None:
            known = ranks[row] == column[:, None]
            place = torch.where(known, torch.arange(ranks.shape[1], device=row.device), -1).amax(1)
            stored = similarities[row].gather(1, place.clamp(min=0)[:, None]).squeeze(1)
            dots = torch.where(place >= 0, stored, dots)
        out[start : start + block] = dots
    return out


_pair_dots = define(
    "pair_dots(Tensor features, Tensor ranks, Tensor? similarities, Tensor offsets, "
    "Tensor columns, int begin) -> Tensor",
    family="jaccard",
    reference=_pair_dots_reference,
    fake=lambda features, ranks, similarities, offsets, columns, begin: features.new_empty(
        columns.shape[0]
    ),
    sample=lambda device: (*_sample_ranks(device), *_sample_csr(device), 0),
)


def _softmax_rows_reference(offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    rows = _row_ids(offsets)
    count = len(offsets) - 1
    wide = logits.double()
    top = wide.new_full((count,), -torch.inf).scatter_reduce(0, rows, wide, "amax")
    exps = (wide - top[rows]).exp()
    sums = wide.new_zeros(count).index_add(0, rows, exps)
    return (exps / sums[rows]).float()


_softmax_rows = define(
    "softmax_rows(Tensor offsets, Tensor logits) -> Tensor",
    family="jaccard",
    reference=_softmax_rows_reference,
    fake=lambda offsets, logits: torch.empty_like(logits),
    sample=lambda device: (_sample_weights(device)[0], -_sample_weights(device)[2]),
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
    for start, stop in _chunks(sizes[near].sum(1)):
        lists = near[start:stop].reshape(-1)
        rows = torch.arange(start, stop, device=ranks.device).repeat_interleave(k2)
        lengths = sizes[lists]
        owner = torch.arange(len(lists), device=ranks.device).repeat_interleave(lengths)
        inner = torch.arange(len(owner), device=ranks.device)
        inner = inner - (lengths.cumsum(0) - lengths)[owner]
        entry = offsets[lists[owner]] + inner
        # Stable: of one column the entries stay in the order of the neighbour list.
        keys, order = (rows[owner] * n + columns[entry]).sort(stable=True)
        keys, sums = _sums_in_order(values[entry[order]], keys)
        all_keys.append(keys)
        all_values.append(sums / torch.tensor(float(k2), device=sums.device))
    keys = torch.cat(all_keys) if all_keys else offsets.new_empty(0)
    sums = torch.cat(all_values) if all_values else values.new_empty(0)
    return _offsets_of(keys // max(n, 1), end - begin), (keys % max(n, 1)).int(), sums


_query_expand = define(
    "query_expand(Tensor ranks, Tensor offsets, Tensor columns, Tensor values, int k2, int begin, "
    "int end) -> (Tensor, Tensor, Tensor)",
    family="jaccard",
    reference=_query_expand_reference,
    fake=lambda ranks, offsets, columns, values, k2, begin, end: _fake_lines(ranks, end - begin),
    sample=lambda device: (_sample_ranks(device)[1], *_sample_weights(device), 3, 1, 14),
)


# ---- inverted index and join --------------------------------------------------------------------


class _Index(NamedTuple):
    """What ``dhcl::inverted_index`` returns; ``csrc/jaccard.cpp`` says what the parts mean."""

    order: torch.Tensor
    prefix: torch.Tensor
    list_offsets: torch.Tensor
    list_split: torch.Tensor
    list_rows: torch.Tensor
    list_values: torch.Tensor


def _inverted_index_reference(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    n = len(offsets) - 1
    wide = columns.long()
    rows = _row_ids(offsets)
    frequency = torch.bincount(wide, minlength=n)
    list_offsets = nn.functional.pad(frequency.cumsum(0), (1, 0))
    by_frequency = frequency[wide].argsort(stable=True)
    by_row = by_frequency[rows[by_frequency].argsort(stable=True)]
    order = by_row - offsets[rows]
    # Fixed point: the remaining weight does not depend on the order of the sum.
    weight = (values.double() * _FIXED_POINT).long()[by_row]
    before = weight.cumsum(0) - weight
    total = weight.new_zeros(n).index_add(0, rows, weight)
    first = before[offsets[:-1].clamp(max=max(len(before) - 1, 0))] if len(before) else before
    rest = total[rows] - (before - first[rows]) if len(before) else before
    sizes = offsets.diff()
    needed = int(_needed_weight(eps, int(sizes.max()) if n else 0) * _FIXED_POINT)
    in_prefix = rest >= needed
    prefix = torch.zeros_like(sizes).index_add(0, rows, in_prefix.long())
    flag = torch.empty_like(in_prefix)
    flag[by_row] = in_prefix
    by_list = (~flag).long().argsort(stable=True)
    by_list = by_list[wide[by_list].argsort(stable=True)]
    list_split = list_offsets[:-1] + torch.zeros_like(sizes).index_add(0, wide, flag.long())
    lists = rows[by_list].int(), values[by_list]
    return order.int(), prefix.int(), list_offsets, list_split, *lists


_inverted_index = define(
    "inverted_index(Tensor offsets, Tensor columns, Tensor values, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="jaccard",
    reference=_inverted_index_reference,
    fake=lambda offsets, columns, values, eps: (
        torch.empty_like(columns),
        columns.new_empty(offsets.shape[0] - 1),
        torch.empty_like(offsets),
        offsets.new_empty(offsets.shape[0] - 1),
        torch.empty_like(columns),
        torch.empty_like(values),
    ),
    sample=lambda device: (*_sample_weights(device), 0.6),
)


def _jaccard_of(shared: torch.Tensor) -> torch.Tensor:
    return (1.0 - shared / (2.0 - shared)).clamp(min=0.0)


def _shared_weights(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    list_offsets: torch.Tensor,
    list_rows: torch.Tensor,
    list_values: torch.Tensor,
    begin: int,
    end: int,
    upper: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Pairs (row, other row, shared weight) with a column in common, chunk after chunk."""
    n = len(offsets) - 1
    lengths = list_offsets.diff()
    work = lengths[columns.long()].cumsum(0)
    work = nn.functional.pad(work, (1, 0))[offsets].diff()
    for start, stop in _chunks(work[begin:end]):
        first, last = int(offsets[begin + start]), int(offsets[begin + stop])
        lists = columns[first:last].long()
        count = lengths[lists]
        owner = torch.arange(len(lists), device=lists.device).repeat_interleave(count)
        inner = torch.arange(len(owner), device=lists.device) - (count.cumsum(0) - count)[owner]
        place = list_offsets[lists[owner]] + inner
        row = _row_ids(offsets[begin + start : begin + stop + 1] - first)[owner] + begin + start
        other = list_rows[place].long()
        least = torch.minimum(values[first:last][owner], list_values[place])
        if upper:
            keep = other >= row
            row, other, least = row[keep], other[keep], least[keep]
        # Columns ascend within a row, and the sort keeps that order among equal pairs.
        keys, order = (row * n + other).sort(stable=True)
        keys, shared = _sums_in_order(least[order], keys)
        yield keys // n, keys % n, shared


def _jaccard_join_reference(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    prefix: torch.Tensor,
    list_offsets: torch.Tensor,
    list_split: torch.Tensor,
    list_rows: torch.Tensor,
    list_values: torch.Tensor,
    eps: float,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    limit = torch.tensor(eps, dtype=torch.float32, device=values.device)
    rows, others = [offsets.new_empty(0)], [offsets.new_empty(0)]
    distances = [values.new_empty(0)]
    lists = (list_offsets, list_rows, list_values)
    pairs = _shared_weights(offsets, columns, values, *lists, begin, end, upper=True)
    for row, other, shared in pairs:
        distance = _jaccard_of(shared)
        keep = distance <= limit
        rows.append(row[keep])
        others.append(other[keep])
        distances.append(distance[keep])
    lines = _offsets_of(torch.cat(rows) - begin, end - begin)
    return lines, torch.cat(others).int(), torch.cat(distances)


def _sample_index(device: torch.device) -> tuple[Any, ...]:
    weights = _sample_weights(device)
    return (*weights, *_inverted_index_reference(*weights, 0.6))


_jaccard_join = define(
    "jaccard_join(Tensor offsets, Tensor columns, Tensor values, Tensor order, Tensor prefix, "
    "Tensor list_offsets, Tensor list_split, Tensor list_rows, Tensor list_values, float eps, "
    "int begin, int end) -> (Tensor, Tensor, Tensor)",
    family="jaccard",
    reference=_jaccard_join_reference,
    fake=lambda offsets, columns, values, order, prefix, lo, ls, lr, lv, eps, begin, end: (
        _fake_lines(columns, end - begin)
    ),
    sample=lambda device: (*_sample_index(device), 0.6, 1, 15),
)


def _mirror_csr_reference(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, wide = _row_ids(offsets), columns.long()
    beside = wide != rows
    n = max(len(offsets) - 1, 1)
    keys = torch.cat([rows * n + wide, wide[beside] * n + rows[beside]])
    keys, order = keys.sort()
    lines = _offsets_of(keys // n, len(offsets) - 1)
    return lines, keys % n, torch.cat([values, values[beside]])[order]


def _mirror_csr_fake(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = _dynamic()
    return torch.empty_like(offsets), offsets.new_empty(size), values.new_empty(size)


_mirror_csr = define(
    "mirror_csr(Tensor offsets, Tensor columns, Tensor values) -> (Tensor, Tensor, Tensor)",
    family="jaccard",
    reference=_mirror_csr_reference,
    fake=_mirror_csr_fake,
    sample=lambda device: _jaccard_join_reference(*(*_sample_index(device), 0.6, 0, 15)),
)


def _jaccard_rows_reference(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    list_offsets: torch.Tensor,
    list_rows: torch.Tensor,
    list_values: torch.Tensor,
    begin: int,
    end: int,
) -> torch.Tensor:
    lists = (list_offsets, list_rows, list_values)
    shared = values.new_zeros(end - begin, len(offsets) - 1)
    for row, other, weight in _shared_weights(
        offsets, columns, values, *lists, begin, end, upper=False
    ):
        shared[row - begin, other] = weight
    return _jaccard_of(shared)


_jaccard_rows = define(
    "jaccard_rows(Tensor offsets, Tensor columns, Tensor values, Tensor list_offsets, "
    "Tensor list_rows, Tensor list_values, int begin, int end) -> Tensor",
    family="jaccard",
    reference=_jaccard_rows_reference,
    fake=lambda offsets, columns, values, lo, lr, lv, begin, end: values.new_empty(
        end - begin, offsets.shape[0] - 1
    ),
    sample=lambda device: (
        *_sample_weights(device),
        *(_sample_index(device)[3:][i] for i in (2, 4, 5)),
        2,
        9,
    ),
)


# ---- the stages together ------------------------------------------------------------------------


def slices(
    rows: int, stage: str, progress: Progress | None, size: int = _ROWS
) -> Iterator[tuple[int, int]]:
    """Ranges of rows; progress is reported after each."""
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield begin, end
        if progress is not None:
            progress(stage, end, rows)


class Rows(NamedTuple):
    """A CSR matrix: offsets (N+1) int64, columns int32 ascending in each row, values float32."""

    offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def _join_lines(parts: list[tuple[torch.Tensor, ...]], like: torch.Tensor) -> tuple[Any, ...]:
    """One CSR matrix from those of consecutive ranges of rows."""
    if not parts:
        empty = like.new_empty(0)
        return torch.zeros(1, dtype=torch.int64, device=like.device), empty.int(), empty.float()
    if len(parts) == 1:
        return parts[0]
    offsets, done = [parts[0][0][:1]], 0
    for part in parts:
        offsets.append(part[0][1:] + done)
        done += len(part[1])
    return torch.cat(offsets), *(torch.cat(column) for column in list(zip(*parts, strict=True))[1:])


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
    # round() goes half to even, as NumPy's around in both codes: 25 -> 12, 15 -> 8.
    return k, min(round(k1 / 2) + 1, k), min(k2, n)


def expanded_sets(lists: Lists, progress: Progress | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded mutual neighbours of every row: offsets and columns."""
    ranks, k, half, _ = lists
    positions = _reciprocal_positions(ranks)
    parts = [
        _k_reciprocal(ranks, positions, k, half, begin, end)
        for begin, end in slices(len(ranks), "mutual neighbours", progress)
    ]
    return cast("tuple[torch.Tensor, torch.Tensor]", _join_lines(parts, ranks)[:2])


def expanded_weights(lists: Lists, weights: Rows, progress: Progress | None) -> Rows:
    """The mean of the rows of each row's first k2 neighbours."""
    if lists.k2 <= 1:
        return weights
    parts = [
        _query_expand(lists.ranks, *weights, lists.k2, begin, end)
        for begin, end in slices(len(lists.ranks), "query expansion", progress)
    ]
    return Rows(*_join_lines(parts, lists.ranks))


def _largest_squares(features: torch.Tensor, progress: Progress | None) -> torch.Tensor:
    """Of each row, the largest squared distance to any row: one pass over half of all pairs."""
    n = len(features)
    least = features.new_full((n,), torch.inf)
    with full_precision(features.device):
        for begin, end in slices(n, "largest distances", progress, 1024):
            for start in range(begin, n, 8192):
                stop = min(start + 8192, n)
                products = features[begin:end] @ features[start:stop].T
                least[begin:end] = torch.minimum(least[begin:end], products.amin(1))
                least[start:stop] = torch.minimum(least[start:stop], products.amin(0))
    return 2.0 - 2.0 * least


def feature_weights(
    features: torch.Tensor,
    lists: Lists,
    similarities: torch.Tensor | None,
    scale: torch.Tensor | None,
    progress: Progress | None,
) -> Rows:
    """Expanded sets with their weights: softmax(-d2), of d2 / scale where a scale (N,) is given."""
    offsets, columns = expanded_sets(lists, progress)
    dots = []
    for begin, end in slices(len(features), "weights", progress):
        lines = offsets[begin : end + 1]
        own = columns[int(lines[0]) : int(lines[-1])]
        dots.append(_pair_dots(features, lists.ranks, similarities, lines - lines[0], own, begin))
    squares = 2.0 - 2.0 * (torch.cat(dots) if dots else features.new_empty(0))
    if scale is not None:
        squares = squares / scale.repeat_interleave(offsets.diff())
    return Rows(offsets, columns, _softmax_rows(offsets, -squares))


def check_features(op: str, name: str, features: torch.Tensor) -> torch.Tensor:
    """Check features (N, d) of unit rows and return them in float32."""
    _checks.tensor(op, name, features)
    _checks.rank(op, name, features, 2)
    _checks.dtype(op, name, features, _FLOATS)
    if len(features) > 2**31 - 1:
        raise ValueError(f"{op}: {name} must have at most 2147483647 rows (got {len(features)})")
    rows = features.detach().float().contiguous()
    norms = rows.norm(dim=1)
    wrong = ~((norms - 1.0).abs() <= 1e-2)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        norm = float(norms[row])
        rule = "must have rows of norm 1, see torch.nn.functional.normalize"
        if not bool(rows[row].isfinite().all()):
            rule, norm = "must be finite", float(rows[row][~rows[row].isfinite()][0])
        raise ValueError(f"{op}: {name} {rule} (got {norm:g} in row {row})")
    return rows


def neighbour_lists(
    op: str,
    features: torch.Tensor,
    width: int,
    ranks: Neighbours | torch.Tensor | None,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Ranks (N, width) int32, their similarities where known, and the uncertified rows."""
    n = len(features)
    if ranks is None:
        found = knn(features, width, progress=progress)
        return found.indices.int(), found.similarities, int(found.uncertified)
    similarities, uncertified = None, 0
    if isinstance(ranks, tuple):
        pair: list[torch.Tensor] = as_tensors(op, similarities=ranks[0], indices=ranks[1])
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
        similarities = similarities[:, :width].float().contiguous()
    ranks = ranks[:, :width]
    if ranks.numel():
        low, high = int(ranks.min()), int(ranks.max())
        if low < 0 or high >= n:
            raise ValueError(f"{op}: ranks must be in [0, {n}) (got {low if low < 0 else high})")
    return ranks.int().contiguous(), similarities, uncertified


class Encoded(NamedTuple):
    """Rows after the query expansion, and what is known of the way there."""

    rows: Rows
    uncertified: int


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
        scale = _largest_squares(features, progress).clamp(min=torch.finfo(torch.float32).tiny)
        timer("largest distances")
    weights = feature_weights(features, lists, similarities, scale, progress)
    timer("sets and weights")
    rows = expanded_weights(lists, weights, progress)
    timer("query expansion")
    return Encoded(rows, uncertified)


def join(rows: Rows, index: _Index, eps: float, progress: Progress | None) -> torch.Tensor:
    """All pairs within eps as a sparse CSR tensor."""
    count = len(rows.offsets) - 1
    parts = [
        _jaccard_join(*rows, *index, eps, begin, end)
        for begin, end in slices(count, "pairs", progress)
    ]
    return csr_tensor(*_mirror_csr(*_join_lines(parts, rows.columns)))


def csr_tensor(offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A square sparse CSR tensor, without torch's notices that these are young and unchecked."""
    import warnings

    size = len(offsets) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse (CSR|invariant).*")
        return torch.sparse_csr_tensor(
            offsets, columns, values, (size, size), check_invariants=False
        )


def check_eps(op: str, eps: float) -> float:
    """Return eps as a float in (0, 1); raise naming the rule otherwise."""
    eps = _checks.number(op, "eps", eps, 0.0, 1.0, rule="in (0, 1)")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"{op}: eps must be in (0, 1) (got {eps!r})")
    return eps


def as_tensors(op: str, **values: Any) -> list[Any]:
    """The values, with arrays as tensors."""
    return [
        _arrays.to_tensor(op, name, value) if _arrays.is_array(value) else value
        for name, value in values.items()
    ]


@torch.no_grad()
def jaccard_graph(
    features: torch.Tensor,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    *,
    convention: Convention = "spcl",
    ranks: Neighbours | torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """All pairs of rows whose k-reciprocal Jaccard distance is at most eps, as a sparse matrix.

    The distances are those of :func:`jaccard_distance`, to the bit. Memory is O(N c), where c is
    the mean size of a row's expanded set (35 to 100 for k1=30, k2=6), and never N x N.

    ``convention="spcl"`` is SpCL's ``compute_jaccard_distance``: k1 neighbours, the row itself
    included; weights softmax(-d2), d2 = 2 - 2 <x, y>. ``"zhong"`` is the code of Zhong et al.:
    k1 neighbours and the row itself; weights exp(-d2 / max d2) / sum, with the largest d2 of the
    row. It takes one more pass over all pairs for these. In both, a distance below zero by rounding
    is zero. k1 and k2 count at most N neighbours.

    Args:
        features: (N, d) float32 rows of norm 1 (to 1 %); other floats are converted. A NumPy or
            CuPy array is taken too.
        k1: neighbours of a row, >= 1.
        k2: neighbours in the query expansion, in [1, k1]; 1 leaves it out.
        eps: largest distance, in (0, 1); compared in float32, as scikit-learn does.
        convention: ``"spcl"`` or ``"zhong"``.
        ranks: neighbour lists to use: what :func:`dhcl_ops.knn` returned, or (N, >= k) int64
            indices, best first, with k = k1 (spcl) or k1 + 1 (zhong). By default they are computed.
        progress: called as ``progress(stage, rows_done, rows_total)``. An exception raised in it,
            or Ctrl-C, ends the call after the range of rows at work.

    Returns:
        (N, N) sparse CSR tensor: float32 distances, int64 indices ascending in each row, symmetric.
        The diagonal is there where J(i, i) <= eps: always, except that with more than k1 exact
        duplicates and ``ranks`` without the row itself a row can lose itself.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or range; a row that is
            not finite or not of norm 1 (the message names it).
    """
    op = "jaccard_graph"
    features, ranks = as_tensors(op, features=features, ranks=ranks)
    eps = check_eps(op, eps)
    rows = check_features(op, "features", features)
    encoded = encode(op, rows, k1, k2, convention, ranks, progress)
    index = _Index(*_inverted_index(*encoded.rows, eps))
    return join(encoded.rows, index, eps, progress)


def _available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            lines = file.read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return None


def dense_rows(
    rows: Rows, progress: Progress | None, *, stop: int | None = None, size: int = 1024
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Dense rows of the distance matrix, a block (begin, end, distances) at a time."""
    # eps = 1 asks for nothing to be pruned; only the lists are used.
    index = _Index(*_inverted_index(*rows, 1.0))
    count = len(rows.offsets) - 1 if stop is None else stop
    for begin, end in slices(count, "distances", progress, size):
        lists = (index.list_offsets, index.list_rows, index.list_values)
        yield begin, end, _jaccard_rows(*rows, *lists, begin, end)


@torch.no_grad()
def jaccard_distance(
    features: torch.Tensor,
    k1: int = 30,
    k2: int = 6,
    *,
    convention: Convention = "spcl",
    ranks: Neighbours | torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return the dense matrix (N, N) float32 of k-reciprocal Jaccard distances.

    For those who need it; :func:`jaccard_graph`, whose arguments these are, gives the pairs within
    some eps in a small part of the memory, and :func:`dhcl_ops.cluster` labels. An array gives an
    array back.

    Raises:
        MemoryError: the matrix does not fit into the free memory; the message says how many GiB it
            needs.
        TypeError, ValueError: as :func:`jaccard_graph`.
    """
    op = "jaccard_distance"
    given = features
    features, ranks = as_tensors(op, features=features, ranks=ranks)
    rows = check_features(op, "features", features)
    n = len(rows)
    free = _available_bytes(rows.device)
    if free is not None and 4 * n * n > free:
        raise MemoryError(
            f"{op}: a dense matrix of {n} x {n} needs {4 * n * n / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; jaccard_graph gives the pairs within eps without it"
        )
    encoded = encode(op, rows, k1, k2, convention, ranks, progress)
    out = torch.empty(n, n, device=rows.device)
    for begin, end, distances in dense_rows(encoded.rows, progress):
        out[begin:end] = distances
    return cast("torch.Tensor", _arrays.like(given, out))
