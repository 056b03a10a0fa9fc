"""Exact nearest neighbours by inner product, without the N x N matrix.

Blocks of products come from ``torch.mm``; of each row the largest few more than k are kept, scored
again in a fixed order of summation, and certified: a bound on what the product can be off says that
no neighbour was lost. Rows that cannot be certified are searched again for everything within the
bound. So the answer does not depend on the matrix product's block sizes, threads or precision.

The order of summation is stated in ``csrc/knn.h``; :func:`_scores_reference` is its PyTorch form.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from dhcl_ops import _arrays, _checks
from dhcl_ops._knn_kernels import MAX_CAPACITY
from dhcl_ops._knn_kernels import new_state as _new_state
from dhcl_ops._knn_kernels import rank as _rank
from dhcl_ops._knn_kernels import scores as _scores
from dhcl_ops._knn_kernels import select as _select
from dhcl_ops._knn_kernels import select_both as _select_both
from dhcl_ops._ops import OPS
from dhcl_ops._products import Products, full_precision, upper_norms
from dhcl_ops._progress import Progress

__all__ = ["Neighbours", "knn"]

# Rows and columns of a tile of products: large enough for the product to run at full speed.
_TILES = {"cpu": (1024, 8192), "cuda": (4096, 16384)}
# Where a self search goes by strips; elsewhere it goes by blocks of a triangle.
_BY_STRIPS = ("cuda",)
# Rows that are ranked between two reports of progress.
_RANKED = {"cpu": 4096, "cuda": 65536}


class Neighbours(NamedTuple):
    """What :func:`knn` returns.

    ``similarities`` (Q, k) float32 and ``indices`` (Q, k) int64, best first. ``uncertified`` is the
    number of rows (int64, 0-d) that had to be searched again since the bound did not certify them,
    -1 where ``precision="fast"`` did not look.
    """

    similarities: torch.Tensor
    indices: torch.Tensor
    uncertified: torch.Tensor


def pair_scores(
    queries: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The similarities (M,) of pairs: a query, in ascending order, and a feature, both (M,)."""
    if len(rows) == 0:
        return queries.new_empty(0)
    distinct, line, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[line]
    candidates = rows.new_full((len(distinct), int(counts.max())), -1)
    candidates[line, place] = columns.to(rows.dtype)
    scores: torch.Tensor = _scores(queries[distinct], features, candidates)
    return scores[line, place]


# ---- search -------------------------------------------------------------------------------------


class _Search:
    """One call of :func:`knn`: others to find per row, besides the row itself in a self search."""

    def __init__(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        products: Products,
        k: int,
        *,
        self_search: bool,
        certify: bool,
        progress: Progress | None,
        least: torch.Tensor | None = None,
        floor: torch.Tensor | None = None,
    ) -> None:
        self.queries, self.features, self.products = queries, features, products
        self.least = least
        # Scores (Q,) float32 below which a caller needs no neighbours.
        self.floor = floor
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
        # Room for as many again, so that a row is cut down only now and then.
        self.capacity = max(2 * self.keep + 32, 64)
        self.kernels = device.type != "cuda" or self.capacity <= MAX_CAPACITY
        self.by_strips = self_search and self.kernels and device.type in _BY_STRIPS
        if self.by_strips:
            # What a tile brings comes all at once.
            self.capacity = min(max(4 * self.keep, 128), MAX_CAPACITY)

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    # -- candidates --

    def select(self, state: tuple[torch.Tensor, ...], *args: Any) -> None:
        op = _select if self.kernels else OPS["knn_select_"].reference
        op(*state, *args)

    def state_above_floor(self) -> tuple[torch.Tensor, ...]:
        """No candidates yet, and only those taken whose products let them reach the floor.

        A row with a floor begins with empty places for all that ranking stores of it, as if these
        were candidates: what it gets may be less.
        """
        assert self.floor is not None
        state = _new_state(len(self.queries), self.capacity, self.device)
        _, _, counts, thresholds = state
        known = self.floor > -torch.inf
        counts.masked_fill_(known, self.others)
        least = ((self.floor.double() - self.products.bound) * self.products.scale**2).float()
        # What is dropped lies at or below the threshold, and what reaches the floor must not.
        least = torch.nextafter(least, torch.full_like(least, -torch.inf))
        thresholds.copy_(torch.where(known, least, thresholds))
        return state

    def search_torch(self) -> None:
        if self.by_strips:
            self._search_strips()
        elif self.self_search:
            self._search_itself(self.workspace())
        else:
            self._search_blocks(self.workspace())

    def workspace(self) -> torch.Tensor:
        """Memory for one tile: without it the last one would still be there beside the next."""
        rows, cols = min(self.tile_rows, len(self.queries)), min(self.tile_cols, len(self.features))
        return torch.empty(rows * (cols + 8), device=self.device)

    def _search_strips(self) -> None:
        """S = S^T, on CUDA: rows and columns of a tile take what they find in one reading."""
        n = len(self.features)
        state = _new_state(n, self.capacity, self.device)
        tiles = list(_strips(n, self.keep, self.tile_rows, self.tile_cols))
        sizes = [(r.stop - r.start) * (c.stop - c.start + 8) for r, c, _ in tiles]
        out, done, total = torch.empty(max(sizes), device=self.device), 0, sum(sizes)
        for (rows, cols, both), size in zip(tiles, sizes, strict=True):
            tile = self.products.tile(rows, cols, out)
            if both:
                _select_both(*state, tile, rows.start, cols.start, self.keep)
            else:
                _select(*state, tile, rows.start, cols.start, self.keep, False, True)
            done += size
            self.report("products", n * done // total, n)
        del out, tile
        self.rank_all(state)

    def _search_itself(self, out: torch.Tensor) -> None:
        """S = S^T: each pair of rows is multiplied once, and both take what they find."""
        n = len(self.features)
        state = _new_state(n, self.capacity, self.device)
        for start in range(0, n, self.tile_rows):
            stop = min(start + self.tile_rows, n)
            for rows, cols, mirror in _triangle(start, stop, self.tile_rows // 2):
                self._visit(state, rows, cols, out, mirror=mirror)
            for col in range(stop, n, self.tile_cols):
                cols = slice(col, min(col + self.tile_cols, n))
                self._visit(state, slice(start, stop), cols, out, mirror=True)
            # The work is a triangle: n^2 pairs less the (n - stop)^2 that later rows still have.
            rest = n - stop
            self.report("products", n - rest * rest // max(n, 1), n)
        self.rank_all(state)

    def _visit(
        self,
        state: tuple[torch.Tensor, ...],
        rows: slice,
        cols: slice,
        out: torch.Tensor,
        *,
        mirror: bool,
    ) -> None:
        tile = self.products.tile(rows, cols, out)
        for part, dim in ((rows, 1), (cols, 0)) if mirror else ((rows, 1),):
            self.select(state, tile, rows.start, cols.start, self.keep, dim == 0, True)
            if self.least is not None:
                torch.minimum(self.least[part], tile.amin(dim), out=self.least[part])

    def _search_blocks(self, out: torch.Tensor) -> None:
        total = len(self.queries)
        for start in range(0, total, self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, total))
            state = _new_state(rows.stop - start, self.capacity, self.device)
            for col in range(0, len(self.features), self.tile_cols):
                cols = slice(col, min(col + self.tile_cols, len(self.features)))
                tile = self.products.tile(rows, cols, out)
                self.select(state, tile, 0, col, self.keep, False, False)
            self.rank(rows, state)
            self.report("products", rows.stop, total)

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
            if self.self_search:
                own = torch.arange(rows.start, rows.stop, device=self.device).unsqueeze(1)
                top = top.masked_fill(indices == own, -torch.inf)
            top, where = top.sort(dim=1, descending=True)
            found = (top > -torch.inf).sum(1, dtype=torch.int32)
            self.rank(rows, (top, indices.gather(1, where).to(torch.int32), found))
            self.report("products", rows.stop, total)

    # -- scores --

    def rank_all(self, state: tuple[torch.Tensor, ...]) -> None:
        n = len(self.queries)
        step = _RANKED.get(self.device.type, _RANKED["cpu"])
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            self.rank(rows, tuple(part[rows] for part in state))
            self.report("scores", rows.stop, n)

    def rank(self, rows: slice, state: tuple[torch.Tensor, ...]) -> None:
        """Score the candidates of some rows, store the best, and say which rows are certified."""
        op = _rank if self.kernels else OPS["knn_rank_"].reference
        op(
            *(self.similarities[rows], self.indices[rows], self.certified[rows]),
            *(self.queries[rows], self.features, *state[:3], self.products.bound[rows]),
            None if self.floor is None else self.floor[rows],
            *(rows.start, self.keep, self.products.scale**-2),
            *(self.self_search, self.keep == self.available),
        )

    def write(self, rows: torch.Tensor, candidates: torch.Tensor) -> None:
        """Store the best of all the candidates of some rows."""
        candidates, _ = candidates.sort(dim=1)
        scores = _scores(self.queries[rows], self.features, candidates)
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        first = 1 if self.self_search else 0
        self.similarities[rows, first:] = ordered[:, : self.others]
        self.indices[rows, first:] = candidates.gather(1, order[:, : self.others])

    def search_again(self) -> int:
        """Find all that the bound cannot rule out for the rows that are not certified."""
        uncertain = (~self.certified).nonzero().squeeze(1)
        total, n = len(uncertain), len(self.features)
        # As candidates may be many, rows are taken few at a time.
        step = max(min((1 << 24) // max(n, 1), 256), 1)
        for start in range(0, total, step):
            rows = uncertain[start : start + step]
            floor = self.similarities[rows, -1].double()
            if self.floor is not None:
                floor = floor.maximum(self.floor[rows].double())
            floor = ((floor - self.products.bound[rows]) * self.products.scale**2).to(torch.float32)
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
            longest = int(position.max()) + 1 if len(position) else 0
            candidates = pairs.new_full((len(rows), max(longest, self.others)), -1)
            candidates[row, position] = pairs[order, 1]
            self.write(rows, candidates)
            self.report("uncertified rows", min(start + step, total), total)
        return total

    def run(self, backend: str) -> Neighbours:
        uncertified = 0 if self.certify else -1
        if self.others > 0 and len(self.queries):
            self.search_faiss() if backend == "faiss" else self.search_torch()
            if self.certify:
                uncertified = self.search_again()
        elif self.similarities.numel():
            # A self search for the row itself, which ranking stores beside the others.
            every_row = torch.arange(len(self.queries), device=self.device).unsqueeze(1)
            self.similarities.copy_(_scores(self.queries, self.features, every_row))
            self.indices.copy_(every_row)
        count = torch.tensor(uncertified, device=self.device)
        return Neighbours(self.similarities, self.indices, count)


def _triangle(start: int, stop: int, smallest: int) -> Iterator[tuple[slice, slice, bool]]:
    """Tiles of a square on the diagonal: rows, columns, whether the columns take entries too.

    The square would compute every pair twice. Cut into its two halves and the square between them,
    only what is left on the diagonal does.
    """
    if stop - start <= max(smallest, 1):
        yield slice(start, stop), slice(start, stop), False
        return
    middle = (start + stop) // 2
    yield from _triangle(start, middle, smallest)
    yield from _triangle(middle, stop, smallest)
    yield slice(start, middle), slice(middle, stop), True


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    size = max(size, 1)
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _strips(
    n: int, keep: int, tile_rows: int, tile_cols: int
) -> Iterator[tuple[slice, slice, bool]]:
    """Tiles of a self search on CUDA: rows, columns, whether the columns take entries too.

    A strip of rows is multiplied with all rows from its own on. What a column takes of it must be
    little, or its list overflows and is read again: after m random features about keep * h / m of
    the next h exceed the keep-th largest. So all rows first see a seed of a few hundred features,
    and strips are no higher than what has been seen. The seed costs its share of products twice,
    and a strip half of the square on its diagonal; its height is a compromise between that and the
    number of launches.
    """
    area = tile_rows * tile_cols
    seed = max(tile_rows // 8, 2 * keep)
    if n < 2 * seed:
        seed = n
    yield from ((rows, slice(0, seed), False) for rows in _blocks(0, n, area // seed))
    yield from ((slice(0, seed), cols, False) for cols in _blocks(seed, n, area // seed))
    highest = min(max(tile_rows // 4, 1 << (n // 12).bit_length() >> 1), tile_rows)
    start = seed
    while start < n:
        stop = min(start + min(start, max(highest, 1)), n)
        for cols in _blocks(start, n, area // (stop - start)):
            yield slice(start, stop), cols, True
        start = stop


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
        _checks.dtype(op, name, value, _checks.ALL_FLOATS)
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
            Products(queries, features, query_norms, norms, half=half),
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


def meet(
    queries: torch.Tensor,
    features: torch.Tensor,
    k: int,
    floors: tuple[torch.Tensor, torch.Tensor],
) -> tuple[Neighbours, Neighbours]:
    """The nearest features of each query, and the nearest queries of each feature, at once.

    Each product serves both sides. Rows are float32 and contiguous. ``floors`` (Q,) and (N,)
    float32 are scores below which neighbours are not needed; of those at or above it the first k
    are there, as :func:`knn` would give them, and behind them anything: similarities of -inf where
    a place is empty.
    """
    op = "knn"
    with full_precision(queries.device):
        norms = upper_norms(op, "queries", queries), upper_norms(op, "features", features)
        sides = []
        for place, (own, others) in enumerate(((queries, features), (features, queries))):
            half = queries.is_cuda
            products = Products(own, others, norms[place], norms[1 - place], half=half)
            search = _Search(
                own, others, products, min(k, len(others)), self_search=False, certify=True,
                progress=None, floor=floors[place],
            )  # fmt: skip
            sides.append((search, search.state_above_floor()))
        (one, state), (other, other_state) = sides
        if one.others > 0 and other.others > 0:
            out = one.workspace()
            for start in range(0, len(queries), one.tile_rows):
                rows = slice(start, min(start + one.tile_rows, len(queries)))
                for col in range(0, len(features), one.tile_cols):
                    cols = slice(col, min(col + one.tile_cols, len(features)))
                    tile = one.products.tile(rows, cols, out)
                    one.select(state, tile, start, col, one.keep, False, False)
                    other.select(other_state, tile, start, col, other.keep, True, False)
            for search, found in sides:
                search.rank_all(found)
        one_again, other_again = (torch.tensor(search.search_again()) for search, _ in sides)
        return (
            Neighbours(one.similarities, one.indices, one_again),
            Neighbours(other.similarities, other.indices, other_again),
        )
