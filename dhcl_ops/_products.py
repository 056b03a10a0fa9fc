"""Tiles of a matrix product, and a bound on what they can be off.

Exact search and exact distances take their candidates from products of the machine's own precision
and order of summation. The bound says how far such a product can lie from the score in the fixed
order of summation, so that what it cannot rule out is scored.

Where products have to be as exact as fp32 ones themselves, :class:`SplitProducts` makes them of
fp16 numbers, which a GPU multiplies ten times as fast: three products take a third of the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dhcl_ops import _checks, _sums
from dhcl_ops._knn_kernels import halves
from dhcl_ops._precision import ieee_products

# Norms above this could overflow fp32 in a product of two rows.
_LARGEST_NORM = 1e18
# Unit roundoff of fp32, and twice that for hardware which cuts sums off instead of rounding them.
_UNIT = 2.0**-24
_UNIT_TENSOR_CORE = 2.0**-23

# Rows of fp16 and fp32 operands that are a multiple of this long start at 16-byte addresses.
_ALIGN = 8


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bf16 inside fp32 products: the bound assumes their precision."""
    with ieee_products(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of that many terms in any order (Higham, section 3.1)."""
    return terms * unit / (1.0 - terms * unit)


def upper_norms(op: str, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Upper bounds (n,) in float64 of the rows' norms; raises naming the first unusable row."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    usable = norms < _LARGEST_NORM
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        if not bool(rows[row].isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite (got a value that is not in row {row})")
        raise ValueError(
            f"{op}: norms of {name} must be below {_LARGEST_NORM:g}, or products would overflow "
            f"(got a larger one in row {row})"
        )
    dim = rows.shape[1]
    # A computed norm can be too small by its rounding, and by squares that fp32 flushes to zero.
    upper: torch.Tensor = (
        norms.double() * (1.0 + _gamma(dim + 8, _UNIT)) + max(dim, 1) ** 0.5 * 2.0**-62
    )
    return upper


def fp32_sums(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The product of fp16 matrices with fp32 sums; where it may, in the memory of ``out``."""
    if not left.is_cuda:
        # The products of two fp16 numbers are exact in fp32.
        return torch.mm(left.float(), right.float())
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


class Products:
    """Tiles of queries @ features.T, and a bound per query on their distance from the scores.

    ``half`` multiplies in fp16 with fp32 sums: rows are scaled by a power of two (2^8 for unit
    rows), so that no element of weight falls among fp16's subnormal numbers. The rounding errors
    delta_i = |x_i - x~_i| are computed, and by Cauchy-Schwarz
    |x~_i.x~_j - x_i.x_j| <= delta_i |x_j| + (|x_i| + delta_i) delta_j.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        query_norms: torch.Tensor,
        norms: torch.Tensor,
        *,
        half: bool,
    ) -> None:
        dim = features.shape[1]
        self.half = half
        self.scale = 1.0
        largest = norms.max() if len(norms) else norms.new_zeros(())
        fixed = _gamma(-(-dim // _sums.COLUMNS) + 8, _UNIT)
        # What single products lose where they are too small for fp32; it is absolute, not relative.
        tiny = 4 * max(dim, 1) * 2.0**-126
        if not half:
            self.queries, self.features = queries, features
            self.bound = (_gamma(dim + 8, _UNIT) + fixed) * query_norms * largest + tiny
            return
        top = float(largest)
        if queries is not features and len(query_norms):
            top = max(top, float(query_norms.max()))
        exponent = round(torch.tensor(max(top, 1e-18)).log2().item())
        self.scale = 2.0 ** (8 - exponent)
        self.features, deltas = self._rounded(features)
        if queries is features:
            self.queries, query_deltas = self.features, deltas
        else:
            self.queries, query_deltas = self._rounded(queries)
        delta = deltas.max() if len(deltas) else deltas.new_zeros(())
        operand_norms = query_norms + query_deltas
        self.bound = (
            query_deltas * largest
            + operand_norms * delta
            + _gamma(dim + 8, _UNIT_TENSOR_CORE) * operand_norms * (largest + delta)
            + fixed * query_norms * largest
            + tiny
        )

    def _rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows times the scale in fp16, and upper bounds (n,) in float64 of what that is off by.

        The operand has more columns, of zeros, up to a multiple of 8, and at least 8 more rows than
        there are: :meth:`tile` then has rows of 16 bytes or a multiple everywhere, without which
        cuBLAS has to take kernels a third as fast.
        """
        n, dim = rows.shape
        operand, squares = halves(rows, self.scale, n + _ALIGN + -n % _ALIGN, dim + -dim % _ALIGN)
        slack = (1.0 + _gamma(dim + 8, _UNIT)) / self.scale
        return operand, squares.double().sqrt() * slack + max(dim, 1) ** 0.5 * 2.0**-62

    def tile(
        self, rows: slice | torch.Tensor, cols: slice, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Products (m, n) times scale^2, in fp32.

        With ``half`` they are the left part of a wider matrix. ``out`` is memory to use for it,
        (at least m * (n + 7),) fp32.
        """
        left, width = self.queries[rows], cols.stop - cols.start
        if self.half:
            padded = width + -width % _ALIGN
            right = self.features[cols.start : cols.start + padded].t()
            target = None if out is None else out[: len(left) * padded].view(len(left), padded)
            return fp32_sums(left, right, target)[:, :width]
        right = self.features[cols].t()
        if out is None:
            return torch.mm(left, right)
        return torch.mm(left, right, out=out[: len(left) * width].view(len(left), width))


# ---- fp32 products of fp16 numbers --------------------------------------------------------------

# Fewest rows, and multiplications in all, from which splitting the operands pays for itself; the
# same in csrc/contrastive_split.h.
_SPLIT_ROWS = 128
_SPLIT_WORK = 1 << 30
# A row's largest element is scaled to just below 2^14, a quarter of the largest fp16 number.
_SPLIT_EXPONENT = 14
# Which piece of the left and which of the right factor each term multiplies, the small ones first,
# by how many pieces they have.
HIGH, LOW = 0, 1
TERMS = {
    (2, 2): ((HIGH, LOW, HIGH), (LOW, HIGH, HIGH)),
    (2, 1): ((LOW, HIGH), (HIGH, HIGH)),
    (1, 2): ((HIGH, HIGH), (LOW, HIGH)),
    (1, 1): ((HIGH,), (HIGH,)),
}


def pays_to_split(queries: torch.Tensor, features: torch.Tensor) -> bool:
    """Whether this product is made sooner by :class:`SplitProducts` than as it is."""
    work = len(queries) * features.numel()
    wide = torch.float64 in (queries.dtype, features.dtype)
    return queries.is_cuda and not wide and len(queries) >= _SPLIT_ROWS and work >= _SPLIT_WORK


def pieces_of(dtype: torch.dtype) -> int:
    """How many fp16 numbers make one of this dtype: 16-bit ones are exact after scaling."""
    return 1 if dtype in (torch.float16, torch.bfloat16) else 2


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^e in fp32 for int32 exponents in [-126, 127]; exact, as a device's pow need not be."""
    return (exponents + 127).bitwise_left_shift(23).view(torch.float32)


class Split(NamedTuple):
    """Rows as sums of fp16 numbers: row i is units[i] * (pieces[0][i] + pieces[1][i])."""

    pieces: tuple[torch.Tensor, ...]  # (n, d) float16 each, the rounded rows and what that left
    units: torch.Tensor  # (n,) float32, powers of two


def split_rows(rows: torch.Tensor, pieces: int = 2) -> Split:
    """Split fp32 rows (n, d), each by a scale of its own, so that lengths may differ.

    With X the largest element of a row, 2^13 <= X / unit < 2^14, and an element x is off by at most
    2^-23 |x| + 2^-38 X: each piece has 11 bits and the second one a sign of its own; the absolute
    term is half of fp16's smallest number. (X below 2^-100 counts as that.)
    """
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    # The number's own bits say its exponent. What is not finite leaves pieces that are not either.
    exponents = (largest.view(torch.int32) >> 23) - 126
    exponents = exponents.clamp(-100, 128) - _SPLIT_EXPONENT
    rest = rows * power_of_two(-exponents)[:, None]
    found = []
    for _ in range(pieces):
        found.append(rest.to(torch.float16))
        rest = rest - found[-1].float()
    return Split(tuple(found), power_of_two(exponents))


def split_operand(
    rows: torch.Tensor, pieces: int, terms: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pieces that t terms take of rows (n, d), side by side (n, t d), and the units (n,)."""
    operand = rows.new_empty(len(rows), len(terms), rows.shape[1], dtype=torch.float16)
    units = rows.new_empty(len(rows), dtype=torch.float32)
    step = max((1 << 24) // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        split = split_rows(rows[block].float(), pieces)
        units[block] = split.units
        for place, term in enumerate(terms):
            operand[block, place] = split.pieces[term]
    return operand.flatten(1), units


class SplitProducts:
    """Products of fp32 rows, made on tensor cores of fp16 numbers with fp32 sums.

    With rows split into high and low pieces, x.y is taken as high.low + low.high + high.high, one
    product over three times the width. The pieces are off by 2^-23 of each factor and low.low, at
    most 2^-22 |x| |y|, is left out, so that for d <= 2^16 and sums in any order

        ``|product - x.y| <= (1.01 * 2^-21 + 1.01 * gamma(3 d)) |x| |y|``,

    gamma(n) = n u / (1 - n u) and u = 2^-23 where hardware cuts sums off. The sum of an fp32
    product is bounded by gamma(d) with u = 2^-24 or, on such hardware, 2^-23; two thirds of the
    terms here are 2^-11 of the others and come first, where they round at their own size.

    Memory: 6 bytes for each element of either factor, 2 where it has one piece.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        query_pieces: int = 2,
        feature_pieces: int = 2,
    ) -> None:
        left, right = TERMS[query_pieces, feature_pieces]
        self.queries, self.query_units = split_operand(queries, query_pieces, left)
        self.features, self.feature_units = split_operand(features, feature_pieces, right)

    def tile(self, rows: slice) -> torch.Tensor:
        """Products (m, N) of some queries with all features, in fp32."""
        products = fp32_sums(self.queries[rows], self.features.t())
        return products.mul_(self.feature_units).mul_(self.query_units[rows, None])


def split_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (m, k) @ right (k, n) by :class:`SplitProducts`, with its bound."""
    return SplitProducts(left, right.t()).tile(slice(0, len(left)))


def split_where_it_pays(
    queries: torch.Tensor, features: torch.Tensor, query_pieces: int = 2, feature_pieces: int = 2
) -> SplitProducts | None:
    """:class:`SplitProducts` where they are made sooner and there is room for the pieces."""
    if not pays_to_split(queries, features):
        return None
    needed = 6 * (queries.numel() + features.numel())
    free = _checks.available_bytes(queries.device)
    if free is not None and needed > free // 2:
        return None
    return SplitProducts(queries, features, query_pieces, feature_pieces)
