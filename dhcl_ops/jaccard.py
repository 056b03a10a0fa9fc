"""The k-reciprocal Jaccard distance, sparse and exact.

The distance is that of Zhong et al. (CVPR 2017) and SpCL (Ge et al., NeurIPS 2020) between the
weighted sets of :mod:`dhcl_ops.reciprocal`: one minus the sum of minima over the sum of maxima.
Their code builds two N x N matrices; here rows stay sparse, and pairs further apart than ``eps``
are never summed up.

The stages, one op each: an inverted index, a join over it, the other half of the symmetric matrix.
``csrc/jaccard.h`` states the order of summation which makes the result equal to a dense
computation, to the bit. The join prunes with the prefix filter of set-similarity search (Bayardo,
Ma, Srikant, WWW 2007), here for sums of minima.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from dhcl_ops import _arrays, _checks, _csr
from dhcl_ops._csr import Rows
from dhcl_ops._ops import define
from dhcl_ops._progress import Progress, rows_at_once, slices
from dhcl_ops._ties import warn_of_tie
from dhcl_ops.defaults import SPCL
from dhcl_ops.knn import Neighbours
from dhcl_ops.reciprocal import Convention, encode, sample_weights

__all__ = ["jaccard_distance", "jaccard_graph"]

# As in csrc/jaccard.h.
_FIXED_POINT = 2.0**40


def _needed_weight(eps: float, longest: int) -> float:
    """The weight two rows must share for J <= eps, less a margin for rounding."""
    eps = torch.tensor(eps, dtype=torch.float32).item()
    return 2.0 * (1.0 - eps) / (2.0 - eps) - (1e-6 + longest * 6.0 / 16777216.0)


# ---- inverted index and join --------------------------------------------------------------------


class Index(NamedTuple):
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
    rows = _csr.row_ids(offsets)
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
    sample=lambda device: (*sample_weights(device), 0.6),
)


def _distance(shared: torch.Tensor) -> torch.Tensor:
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
    for start, stop in _csr.chunks(work[begin:end]):
        first, last = int(offsets[begin + start]), int(offsets[begin + stop])
        lists = columns[first:last].long()
        owner, inner = _csr.places(lengths[lists])
        place = list_offsets[lists[owner]] + inner
        row = _csr.row_ids(offsets[begin + start : begin + stop + 1] - first)[owner] + begin + start
        other = list_rows[place].long()
        least = torch.minimum(values[first:last][owner], list_values[place])
        if upper:
            keep = other >= row
            row, other, least = row[keep], other[keep], least[keep]
        # Columns ascend within a row, and the sort keeps that order among equal pairs.
        keys, order = (row * n + other).sort(stable=True)
        keys, shared = _csr.sums_in_order(least[order], keys)
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
        distance = _distance(shared)
        keep = distance <= limit
        rows.append(row[keep])
        others.append(other[keep])
        distances.append(distance[keep])
    lines = _csr.offsets_of(torch.cat(rows) - begin, end - begin)
    return lines, torch.cat(others).int(), torch.cat(distances)


def _sample_index(device: torch.device) -> tuple[Any, ...]:
    weights = sample_weights(device)
    return (*weights, *_inverted_index_reference(*weights, 0.6))


jaccard_join = define(
    "jaccard_join(Tensor offsets, Tensor columns, Tensor values, Tensor order, Tensor prefix, "
    "Tensor list_offsets, Tensor list_split, Tensor list_rows, Tensor list_values, float eps, "
    "int begin, int end) -> (Tensor, Tensor, Tensor)",
    family="jaccard",
    reference=_jaccard_join_reference,
    fake=lambda offsets, columns, values, order, prefix, lo, ls, lr, lv, eps, begin, end: (
        _csr.fake_rows(columns, end - begin)
    ),
    sample=lambda device: (*_sample_index(device), 0.6, 1, 15),
)


def _mirror_csr_reference(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, wide = _csr.row_ids(offsets), columns.long()
    beside = wide != rows
    n = max(len(offsets) - 1, 1)
    keys = torch.cat([rows * n + wide, wide[beside] * n + rows[beside]])
    keys, order = keys.sort()
    lines = _csr.offsets_of(keys // n, len(offsets) - 1)
    return lines, keys % n, torch.cat([values, values[beside]])[order]


def _mirror_csr_fake(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = _csr.dynamic_size()
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
    return _distance(shared)


_jaccard_rows = define(
    "jaccard_rows(Tensor offsets, Tensor columns, Tensor values, Tensor list_offsets, "
    "Tensor list_rows, Tensor list_values, int begin, int end) -> Tensor",
    family="jaccard",
    reference=_jaccard_rows_reference,
    fake=lambda offsets, columns, values, lo, lr, lv, begin, end: values.new_empty(
        end - begin, offsets.shape[0] - 1
    ),
    sample=lambda device: (
        *sample_weights(device),
        *(_sample_index(device)[3:][i] for i in (2, 4, 5)),
        2,
        9,
    ),
)


# ---- the stages together ------------------------------------------------------------------------


def inverted_index(rows: Rows, eps: float) -> Index:
    """The rows of each column, laid out for a join within eps."""
    return Index(*_inverted_index(*rows, eps))


def join(rows: Rows, index: Index, eps: float, progress: Progress | None) -> torch.Tensor:
    """All pairs within eps as a sparse CSR tensor."""
    count = len(rows.offsets) - 1
    parts = [
        jaccard_join(*rows, *index, eps, begin, end)
        for begin, end in slices(count, "pairs", progress, rows_at_once(rows.columns.device))
    ]
    return _csr.sparse_tensor(*_mirror_csr(*_csr.joined(parts, rows.columns)))


def check_eps(op: str, eps: float) -> float:
    """Return eps as a float in (0, 1); raise naming the rule otherwise."""
    eps = _checks.number(op, "eps", eps, 0.0, 1.0, rule="in (0, 1)")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"{op}: eps must be in (0, 1) (got {eps!r})")
    return eps


@torch.no_grad()
def jaccard_graph(
    features: torch.Tensor,
    k1: int = SPCL.k1,
    k2: int = SPCL.k2,
    eps: float = SPCL.eps,
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
        k1: neighbours of a row, >= 1. Half of them are rounded as in the Python code of both; the
            Matlab code of Zhong et al. takes one neighbour less for k1 = 3, 7, 11 and so on.
        k2: neighbours in the query expansion, in [1, k1]; 1 leaves it out.
        eps: largest distance, in (0, 1); compared in float32, as scikit-learn does. Two rows that
            share m of the k2 neighbours they are expanded with, and nothing else, lie exactly
            1 - m / (2 k2 - m) apart: for k2 = 6 that is 2/7, 1/2, 2/3, 4/5 or 10/11. At such an eps
            rounding decides about many pairs, and a warning says so: take 0.49 or 0.51, not 0.5.
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
    features, ranks = _arrays.as_tensors(op, features=features, ranks=ranks)
    eps = check_eps(op, eps)
    rows = _checks.unit_rows(op, "features", features)
    encoded = encode(op, rows, k1, k2, convention, ranks, progress)
    warn_of_tie(op, eps, k2)
    index = inverted_index(encoded.rows, eps)
    return join(encoded.rows, index, eps, progress)


def dense_rows(
    rows: Rows, progress: Progress | None, *, stop: int | None = None, size: int = 1024
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Dense rows of the distance matrix, a block (begin, end, distances) at a time."""
    # Every distance is wanted, so no pair may be pruned: eps = 1 prunes none.
    index = inverted_index(rows, 1.0)
    count = len(rows.offsets) - 1 if stop is None else stop
    for begin, end in slices(count, "distances", progress, size):
        lists = (index.list_offsets, index.list_rows, index.list_values)
        yield begin, end, _jaccard_rows(*rows, *lists, begin, end)


@torch.no_grad()
def jaccard_distance(
    features: torch.Tensor,
    k1: int = SPCL.k1,
    k2: int = SPCL.k2,
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
    features, ranks = _arrays.as_tensors(op, features=features, ranks=ranks)
    rows = _checks.unit_rows(op, "features", features)
    n = len(rows)
    instead = "jaccard_graph gives the pairs within eps without it"
    _checks.fits_in_memory(op, (n, n), rows.device, instead)
    encoded = encode(op, rows, k1, k2, convention, ranks, progress)
    out = torch.empty(n, n, device=rows.device)
    for begin, end, distances in dense_rows(encoded.rows, progress):
        out[begin:end] = distances
    return cast("torch.Tensor", _arrays.like(given, out))
