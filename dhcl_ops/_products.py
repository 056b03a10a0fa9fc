"""Tiles of a matrix product, and a bound on what they can be off.

Exact search and exact distances take their candidates from products of the machine's own precision
and order of summation. The bound says how far such a product can lie from the score in the fixed
order of summation, so that what it cannot rule out is scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dhcl_ops import _sums
from dhcl_ops._precision import ieee_products

# Norms above this could overflow fp32 in a product of two rows.
_LARGEST_NORM = 1e18
# Unit roundoff of fp32, and twice that for hardware which cuts sums off instead of rounding them.
_UNIT = 2.0**-24
_UNIT_TENSOR_CORE = 2.0**-23


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
        top = max(float(largest), float(query_norms.max()) if len(query_norms) else 0.0)
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
        operand = torch.empty(rows.shape, dtype=torch.float16, device=rows.device)
        deltas = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), 8192):
            block = rows[start : start + 8192] * self.scale
            rounded = block.to(torch.float16)
            operand[start : start + 8192] = rounded
            errors = torch.linalg.vector_norm(block - rounded.float(), dim=1)
            deltas[start : start + 8192] = errors
        slack = 1.0 + _gamma(rows.shape[1] + 8, _UNIT)
        return operand, deltas * (slack / self.scale) + max(rows.shape[1], 1) ** 0.5 * 2.0**-62

    def tile(
        self, rows: slice | torch.Tensor, cols: slice, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Products (m, n) times scale^2, in fp32."""
        left, right = self.queries[rows], self.features[cols].t()
        if self.half:
            if left.is_cuda:
                return torch.mm(left, right, out_dtype=torch.float32)
            # The products of two fp16 numbers are exact in fp32.
            return torch.mm(left.float(), right.float())
        if out is None:
            return torch.mm(left, right)
        target = out[: left.shape[0] * right.shape[1]].view(left.shape[0], right.shape[1])
        return torch.mm(left, right, out=target)
