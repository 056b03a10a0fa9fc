"""Exact nearest neighbours by inner product, without the N x N matrix.

Blocks of products come from ``torch.mm``; of each row the largest few more than k are kept, scored
again in a fixed order of summation, and certified: a bound on what the product can be off says that
no neighbour was lost. Rows that cannot be certified are searched again for everything within the
bound. So the answer does not depend on the matrix product's block sizes, threads or precision.

The order of summation is stated in ``csrc/knn.h``; :func:`_scores_reference` is its PyTorch form.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from dhcl_ops import _arrays, _checks
from dhcl_ops._ops import OPS, define

__all__ = ["Neighbours", "camera_neighbours", "knn"]

Progress = Callable[[str, int, int], object]

# As in csrc/knn.h.
_DOT_COLUMNS = 128
_MAX_CAPACITY = 2048

_FLOATS = (*_checks.FLOATS, torch.float64)
# Rows and columns of a tile of products: large enough for the product to run at full speed.
_TILES = {"cpu": (1024, 8192), "cuda": (4096, 16384)}
# Norms above this could overflow fp32 in a product of two rows.
_LARGEST_NORM = 1e18
# Unit roundoff of fp32, and twice that for hardware which cuts sums off instead of rounding them.
_UNIT = 2.0**-24
_UNIT_TENSOR_CORE = 2.0**-23


class Neighbours(NamedTuple):
    """What :func:`knn` returns.

    ``similarities`` (Q, k) float32 and ``indices`` (Q, k) int64, best first. ``uncertified`` is the
    number of rows (int64, 0-d) that had to be searched again since the bound did not certify them,
    -1 where ``precision="fast"`` did not look.
    """

    similarities: torch.Tensor
    indices: torch.Tensor
    uncertified: torch.Tensor


# ---- ops ----------------------------------------------------------------------------------------


def _select_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    thresholds: torch.Tensor,
    tile: torch.Tensor,
    row_start: int,
    col_start: int,
    keep: int,
    mirror: bool,
    self_search: bool,
) -> None:
    if mirror:
        tile, row_start, col_start = tile.t(), col_start, row_start
    if tile.numel() == 0:
        return
    rows = slice(row_start, row_start + tile.shape[0])
    ids = torch.arange(col_start, col_start + tile.shape[1], device=tile.device)
    if self_search:
        own = torch.arange(row_start, row_start + tile.shape[0], device=tile.device)
        tile = tile.masked_fill(ids == own.unsqueeze(1), -torch.inf)
    all_values = torch.cat([values[rows], tile], dim=1)
    all_indices = torch.cat([indices[rows], ids.to(torch.int32).expand(tile.shape)], dim=1)
    top, where = all_values.topk(min(keep, all_values.shape[1]), dim=1)
    found = top > -torch.inf
    values[rows] = -torch.inf
    indices[rows] = -1
    values[rows, : top.shape[1]] = top
    indices[rows, : top.shape[1]] = all_indices.gather(1, where).masked_fill(~found, -1)
    counts[rows] = found.sum(1, dtype=torch.int32)
    # With fewer than `keep` candidates nothing has been dropped.
    full = counts[rows] == keep
    thresholds[rows] = top[:, -1].masked_fill(~full, -torch.inf)


def _select_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    # In order and fewer than are kept: beyond that, where candidates lie in a row is left open.
    tile = torch.randn(5, 3, generator=generator).sort(dim=1, descending=True).values
    return (*_new_state(5, 8, device), tile.to(device), 0, 7, 4, False, True)


def _new_state(rows: int, capacity: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return (
        torch.full((rows, capacity), -torch.inf, device=device),
        torch.full((rows, capacity), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.full((rows,), -torch.inf, device=device),
    )


_select = define(
    "knn_select_(Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts, "
    "Tensor(d!) thresholds, Tensor tile, int row_start, int col_start, int keep, bool mirror, "
    "bool self_search) -> ()",
    family="knn",
    reference=_select_reference,
    fake=lambda *args: None,
    sample=_select_sample,
)


def _scores_reference(
    queries: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    scores = torch.full(candidates.shape, -torch.inf, device=queries.device)
    missing = -features.shape[1] % _DOT_COLUMNS if features.shape[1] else _DOT_COLUMNS
    # A few thousand pairs at a time, as each takes a row of products.
    for pairs in (candidates >= 0).nonzero().split(4096):
        row, position = pairs.unbind(1)
        products = queries[row] * features[candidates[row, position]]
        products = nn.functional.pad(products, (0, missing))
        columns = products.new_zeros(len(products), _DOT_COLUMNS)
        for block in products.split(_DOT_COLUMNS, dim=1):
            columns = columns + block
        while columns.shape[1] > 1:
            half = columns.shape[1] // 2
            columns = columns[:, :half] + columns[:, half:]
        scores[row, position] = columns.squeeze(1)
    return scores


def _scores_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 150, generator=generator).to(device)
    return rows[:2], rows, torch.tensor([[0, 5, -1], [3, 3, 1]], device=device)


_scores = define(
    "knn_scores(Tensor queries, Tensor features, Tensor candidates) -> Tensor",
    family="knn",
    reference=_scores_reference,
    fake=lambda queries, features, candidates: queries.new_empty(candidates.shape),
    sample=_scores_sample,
)


# ---- products and what they can be off ----------------------------------------------------------


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bf16 inside fp32 products: the bound assumes their precision."""
    # Not set_float32_matmul_precision: that raises where a backend was set on its own.
    libraries: Any = torch.backends
    backends = (libraries.cuda.matmul, libraries.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
    # Rounding, and squares too small for fp32.
    upper: torch.Tensor = (
        norms.double() * (1.0 + _gamma(dim + 8, _UNIT)) + max(dim, 1) ** 0.5 * 2.0**-62
    )
    return upper


class _Products:
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
        fixed = _gamma(-(-dim // _DOT_COLUMNS) + 8, _UNIT)
        # Underflow of single products.
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


# ---- search -------------------------------------------------------------------------------------


class _Search:
    """One call of :func:`knn`: others to find per row, besides the row itself in a self search."""

    def __init__(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        products: _Products,
        k: int,
        *,
        self_search: bool,
        certify: bool,
        progress: Progress | None,
        least: torch.Tensor | None = None,
    ) -> None:
        self.queries, self.features, self.products = queries, features, products
        self.least = least
        self.self_search, self.certify, self.progress = self_search, certify, progress
        self.others = k - 1 if self_search else k
        self.available = len(features) - 1 if self_search else len(features)
        self.keep = min(self.others + max(16, self.others // 2), self.available)
        device = queries.device
        self.device = device
        self.similarities = torch.empty(len(queries), k, device=device)
        self.indices = torch.empty(len(queries), k, dtype=torch.int64, device=device)
        self.certified = torch.ones(len(queries), dtype=torch.bool, device=device)
        self.tile_rows, self.tile_cols = _TILES.get(device.type, _TILES["cpu"])

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    # -- candidates --

    def capacity(self) -> int:
        # Room for as many again, so that a row is cut down only now and then.
        return max(2 * self.keep + 32, 64)

    def select(self, state: tuple[torch.Tensor, ...], *args: Any) -> None:
        if self.device.type == "cuda" and state[0].shape[1] > _MAX_CAPACITY:
            OPS["knn_select_"].reference(*state, *args)
        else:
            _select(*state, *args)

    def search_torch(self) -> None:
        out = None
        if not self.products.half:
            out = torch.empty(self.tile_rows * self.tile_cols, device=self.device)
        if self.self_search:
            self._search_itself(out)
        else:
            self._search_blocks(out)

    def _search_itself(self, out: torch.Tensor | None) -> None:
        """S = S^T: each pair of rows is multiplied once, and both take what they find."""
        n = len(self.features)
        state = _new_state(n, self.capacity(), self.device)

        def visit(rows: slice, cols: slice, *, mirror: bool) -> None:
            tile = self.products.tile(rows, cols, out)
            starts = (tile, rows.start, cols.start, self.keep)
            for part, dim in ((rows, 1), (cols, 0)) if mirror else ((rows, 1),):
                self.select(state, *starts, dim == 0, True)
                if self.least is not None:
                    torch.minimum(self.least[part], tile.amin(dim), out=self.least[part])

        def visit_diagonal(start: int, stop: int) -> None:
            # The halves of a square on the diagonal waste half as much as the square.
            if stop - start <= max(self.tile_rows // 2, 1):
                visit(slice(start, stop), slice(start, stop), mirror=False)
                return
            middle = (start + stop) // 2
            visit_diagonal(start, middle)
            visit_diagonal(middle, stop)
            visit(slice(start, middle), slice(middle, stop), mirror=True)

        for start in range(0, n, self.tile_rows):
            stop = min(start + self.tile_rows, n)
            visit_diagonal(start, stop)
            for col in range(stop, n, self.tile_cols):
                cols = slice(col, min(col + self.tile_cols, n))
                visit(slice(start, stop), cols, mirror=True)
            # Of a triangle: what is done is what lies in full rows above.
            rest = n - stop
            self.report("products", n - rest * rest // max(n, 1), n)
        values, indices, _, _ = state
        for start in range(0, n, 4096):
            rows = slice(start, min(start + 4096, n))
            self.finish(rows, *self.largest(values[rows], indices[rows]))
            self.report("scores", rows.stop, n)

    def _search_blocks(self, out: torch.Tensor | None) -> None:
        total = len(self.queries)
        for start in range(0, total, self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, total))
            state = _new_state(rows.stop - start, self.capacity(), self.device)
            for col in range(0, len(self.features), self.tile_cols):
                cols = slice(col, min(col + self.tile_cols, len(self.features)))
                tile = self.products.tile(rows, cols, out)
                self.select(state, tile, 0, col, self.keep, False, False)
            self.finish(rows, *self.largest(state[0], state[1]))
            self.report("products", rows.stop, total)

    def largest(
        self, values: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The `keep` largest products of each row, and the bound on all that is not among them."""
        top, where = values.topk(self.keep, dim=1)
        lowest = top[:, -1] if self.keep < self.available else None
        return top, indices.gather(1, where).to(torch.int64), lowest

    def search_faiss(self) -> None:
        faiss = _import_faiss()
        index = faiss.IndexFlatIP(self.features.shape[1])
        if self.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(resources, self.device.index or 0, index)
        index.add(self.features.numpy(force=True))
        total = len(self.queries)
        count = min(self.keep + self.self_search, len(self.features))
        for start in range(0, total, self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, total))
            found = index.search(self.queries[rows].numpy(force=True), count)
            top, indices = (torch.as_tensor(x).to(self.device) for x in found)
            top, indices = top.to(torch.float32), indices.to(torch.int64)
            lowest = top[:, -1] if count < len(self.features) else None
            if self.self_search:
                own = torch.arange(rows.start, rows.stop, device=self.device).unsqueeze(1)
                top = top.masked_fill(indices == own, -torch.inf)
            top, where = top.sort(dim=1, descending=True)
            indices = indices.gather(1, where).masked_fill(top == -torch.inf, -1)
            self.finish(rows, top, indices, lowest)
            self.report("products", rows.stop, total)

    # -- scores --

    def finish(
        self,
        rows: slice,
        top: torch.Tensor,
        candidates: torch.Tensor,
        lowest: torch.Tensor | None,
    ) -> None:
        """Score the candidates of some rows, whose products are in ``top``, largest first."""
        unscale = self.products.scale**-2
        bound = self.products.bound[rows]
        # The k-th largest product less the bound is a floor of the k-th score: a product more than
        # twice the bound below it is out.
        reach = top[:, self.others - 1].double() * unscale - 2 * bound
        within = top.double() * unscale >= reach.unsqueeze(1)
        width = max(int(within.sum(1).max()), self.others)
        candidates = candidates.masked_fill(~within, -1)[:, :width]
        scores = self.write(rows, candidates)
        if self.certify and lowest is not None:
            self.certified[rows] = scores > lowest.double() * unscale + bound

    def write(self, rows: slice | torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Store the best candidates of some rows; returns the score (float64) of the last."""
        candidates, _ = candidates.sort(dim=1)
        scores: torch.Tensor = _scores(self.queries[rows], self.features, candidates)
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        first = 1 if self.self_search else 0
        self.similarities[rows, first:] = ordered[:, : self.others]
        self.indices[rows, first:] = candidates.gather(1, order[:, : self.others])
        return ordered[:, self.others - 1].double()

    def search_again(self) -> int:
        """Find all that the bound cannot rule out for the rows that are not certified."""
        uncertain = (~self.certified).nonzero().squeeze(1)
        total, n = len(uncertain), len(self.features)
        # As candidates may be many, rows are taken few at a time.
        step = max(min((1 << 24) // max(n, 1), 256), 1)
        for start in range(0, total, step):
            rows = uncertain[start : start + step]
            floor = self.similarities[rows, -1].double() - self.products.bound[rows]
            floor = (floor * self.products.scale**2).to(torch.float32)
            floor = torch.nextafter(floor, torch.full_like(floor, -torch.inf)).unsqueeze(1)
            found = []
            for col in range(0, n, self.tile_cols):
                tile = self.products.tile(rows, slice(col, min(col + self.tile_cols, n)))
                pairs = (tile >= floor).nonzero()
                pairs[:, 1] += col
                found.append(pairs)
            pairs = torch.cat(found)
            if self.self_search:
                pairs = pairs[rows[pairs[:, 0]] != pairs[:, 1]]
            row, order = pairs[:, 0].sort(stable=True)
            position = torch.arange(len(row), device=self.device) - torch.searchsorted(row, row)
            candidates = pairs.new_full((len(rows), int(position.max()) + 1), -1)
            candidates[row, position] = pairs[order, 1]
            self.write(rows, candidates)
            self.report("uncertified rows", min(start + step, total), total)
        return total

    def run(self, backend: str) -> Neighbours:
        if self.self_search and self.similarities.shape[1]:
            every_row = torch.arange(len(self.queries), device=self.device)
            own = _scores(self.queries, self.features, every_row.unsqueeze(1))
            self.similarities[:, :1] = own
            self.indices[:, 0] = every_row
        uncertified = 0 if self.certify else -1
        if self.others > 0 and len(self.queries):
            self.search_faiss() if backend == "faiss" else self.search_torch()
            if self.certify:
                uncertified = self.search_again()
        count = torch.tensor(uncertified, device=self.device)
        return Neighbours(self.similarities, self.indices, count)


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            'knn: backend="faiss" needs the package faiss (pip install faiss-cpu); '
            'backend="torch" needs nothing and gives the same result'
        ) from error


@_arrays.takes_arrays("features", "queries")
def knn(
    features: torch.Tensor,
    k: int,
    *,
    queries: torch.Tensor | None = None,
    backend: Literal["auto", "torch", "faiss"] = "auto",
    precision: Literal["exact", "fast"] = "exact",
    progress: Progress | None = None,
) -> Neighbours:
    """Find the k features of largest inner product with each query.

    Without queries the features are searched for themselves: each row comes first in its own list
    (also where other rows equal it, or are longer), then the others. Order is by similarity, the
    largest first, and by index where similarities are equal. The similarity is the fp32 inner
    product in a fixed order of summation (``csrc/knn.h``), so that the result has the same bits for
    any backend, number of threads and device. Rows need not be normalised: ranks are by inner
    product as it is. A row of zeros has similarity 0 to all.

    Memory beyond features and result is O(N k); the N x N matrix never exists. On CUDA products are
    taken in fp16 with fp32 sums.

    Args:
        features: (N, d) float32; float16 and bfloat16 are widened, float64 is rounded. No gradient
            flows through. A NumPy or CuPy array gives arrays back.
        k: neighbours per row, the row itself included, in [0, N].
        queries: (Q, d) rows to search for; by default the features themselves.
        backend: ``"torch"`` or ``"faiss"``, where candidates come from; ``"auto"`` is ``"torch"``.
        precision: ``"exact"`` certifies each row and repeats those it cannot. ``"fast"`` leaves
            that out: a neighbour closer to the next than the products' rounding may be missed, and
            bits may depend on device and threads.
        progress: called as ``progress(stage, rows_done, rows_total)``.

    Returns:
        :class:`Neighbours`: similarities (Q, k) float32, indices (Q, k) int64, and the number of
        rows that were not certified at first.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; a
            feature that is not finite (the message names its row); k > N.
        ImportError: ``backend="faiss"`` without faiss.
    """
    op = "knn"
    named = (
        {"features": features} if queries is None else {"features": features, "queries": queries}
    )
    for name, value in named.items():
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
        _checks.dtype(op, name, value, _FLOATS)
    _checks.same_device(op, **named)
    if queries is not None and queries.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: queries must have the features' width {features.shape[1]} "
            f"(got {queries.shape[1]})"
        )
    k = _checks.integer(op, "k", k, 0)
    if k > len(features):
        raise ValueError(
            f"{op}: k must be at most the number of features (got k={k}, N={len(features)})"
        )
    if len(features) > 2**31 - 1:
        raise ValueError(f"{op}: at most 2147483647 features (got {len(features)})")
    _checks.one_of(op, "backend", backend, ("auto", "torch", "faiss"))
    _checks.one_of(op, "precision", precision, ("exact", "fast"))
    return _knn(features, k, queries, backend, precision, progress)


def _knn(
    features: torch.Tensor,
    k: int,
    queries: torch.Tensor | None,
    backend: str,
    precision: str,
    progress: Progress | None,
    least: torch.Tensor | None = None,
) -> Neighbours:
    """The search itself; ``least`` (N,) takes the smallest products of a self search in fp32."""
    op = "knn"
    with full_precision(features.device):
        self_search = queries is None
        features = features.detach().to(torch.float32).contiguous()
        norms = upper_norms(op, "features", features)
        if queries is None:
            queries, query_norms = features, norms
        else:
            queries = queries.detach().to(torch.float32).contiguous()
            query_norms = upper_norms(op, "queries", queries)
        half = features.is_cuda and backend != "faiss"
        search = _Search(
            queries,
            features,
            _Products(queries, features, query_norms, norms, half=half),
            k,
            self_search=self_search,
            certify=precision == "exact",
            progress=progress,
            least=least,
        )
        return search.run(backend)


def knn_and_least(
    features: torch.Tensor, k: int, progress: Progress | None
) -> tuple[Neighbours, torch.Tensor | None]:
    """``knn`` of float32 rows among themselves, and of each row its smallest product with any row.

    The products are those of the search, so on CUDA, where they are in fp16, there is None.
    """
    least = None
    if not features.is_cuda and k > 1:
        least = features.new_full((len(features),), torch.inf)
    return _knn(features, k, None, "torch", "exact", progress, least), least


# ---- neighbours by camera -----------------------------------------------------------------------


@_arrays.takes_arrays("features", "cameras")
def camera_neighbours(
    features: torch.Tensor,
    cameras: torch.Tensor,
    k: int,
    own: int,
    *,
    progress: Progress | None = None,
) -> Neighbours:
    """Neighbour lists with a fixed share from a row's own camera.

    Where cameras differ much, the nearest rows are mostly of the row's own camera and clusters
    form by camera. Here each list has the ``own`` nearest rows of the same camera, the row itself
    first, and the k - own nearest of all other cameras, evenly mixed. Given to
    :func:`dhcl_ops.jaccard_graph` or :func:`dhcl_ops.cluster` as ``ranks``, mutual neighbours are
    those within and across cameras apart, as in Chen et al. (CVPR 2023, "CA-Jaccard").

    A row whose camera, or whose other cameras, have too few rows gets more of the other kind.

    Args:
        features: (N, d), as in :func:`knn`.
        cameras: (N,) int64, any numbers.
        k: length of a list, the row itself included, in [1, N].
        own: how many of them are of the row's own camera, itself included, in [1, k].
        progress: as in :func:`knn`.

    Returns:
        :class:`Neighbours`; the similarities of a list do not descend.

    Raises:
        TypeError, ValueError: as :func:`knn`; cameras of another shape, dtype or device.
    """
    op = "camera_neighbours"
    _checks.tensor(op, "features", features)
    _checks.rank(op, "features", features, 2)
    _checks.tensor(op, "cameras", cameras)
    _checks.dtype(op, "cameras", cameras, (torch.int64,))
    _checks.shape(op, "cameras", cameras, (len(features),), "one per feature")
    _checks.same_device(op, features=features, cameras=cameras)
    k = _checks.integer(op, "k", k, 1)
    own = _checks.integer(op, "own", own, 1)
    if not own <= k <= len(features):
        raise ValueError(
            f"{op}: own, k and the number of features must not descend "
            f"(got own={own}, k={k}, N={len(features)})"
        )
    n = len(features)
    similarities = torch.empty(n, k, device=features.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=features.device)
    uncertified = torch.zeros((), dtype=torch.int64, device=features.device)
    for camera in cameras.unique().tolist():
        inside = (cameras == camera).nonzero().squeeze(1)
        outside = (cameras != camera).nonzero().squeeze(1)
        here = max(min(own, len(inside)), k - len(outside))
        near = knn(features[inside], here, progress=progress)
        far = knn(features[outside], k - here, queries=features[inside], progress=progress)
        # The i-th of a lists goes to i / a of the way, so that any beginning has the same shares.
        way = torch.cat([torch.arange(here) / here, (torch.arange(k - here) + 0.5) / (k - here)])
        order = way.argsort(stable=True).to(features.device)
        indices[inside] = torch.cat([inside[near.indices], outside[far.indices]], 1)[:, order]
        similarities[inside] = torch.cat([near.similarities, far.similarities], 1)[:, order]
        uncertified += near.uncertified + far.uncertified
    return Neighbours(similarities, indices, uncertified)
