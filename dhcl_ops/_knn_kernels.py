"""The ops of the neighbour search: schemas, references and samples; ``csrc/knn.h`` states them."""

from __future__ import annotations

from typing import Any

import torch

from dhcl_ops import _sums
from dhcl_ops._ops import define

# As in csrc/knn.h.
MAX_CAPACITY = 2048


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
    # A row with fewer than `keep` candidates has dropped none, so anything may still enter it.
    full = counts[rows] == keep
    thresholds[rows] = top[:, -1].masked_fill(~full, -torch.inf)


def _select_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    # Sorted and fewer than are kept, since implementations may store more candidates in any order
    # and are compared to the bit here.
    tile = torch.randn(5, 3, generator=generator).sort(dim=1, descending=True).values
    return (*new_state(5, 8, device), tile.to(device), 0, 7, 4, False, True)


def new_state(rows: int, capacity: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows without candidates: values, indices, counts and thresholds (``csrc/knn.h``)."""
    return (
        torch.full((rows, capacity), -torch.inf, device=device),
        torch.full((rows, capacity), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.full((rows,), -torch.inf, device=device),
    )


select = define(
    "knn_select_(Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts, "
    "Tensor(d!) thresholds, Tensor tile, int row_start, int col_start, int keep, bool mirror, "
    "bool self_search) -> ()",
    family="knn",
    reference=_select_reference,
    fake=lambda *args: None,
    sample=_select_sample,
)


def _select_both_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    thresholds: torch.Tensor,
    tile: torch.Tensor,
    row_start: int,
    col_start: int,
    keep: int,
) -> None:
    state = (values, indices, counts, thresholds)
    _select_reference(*state, tile, row_start, col_start, keep, False, True)
    first = min(max(row_start + tile.shape[0] - col_start, 0), tile.shape[1])
    _select_reference(*state, tile[:, first:], row_start, col_start + first, keep, True, True)


def _select_both_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    # Sorted along both sides and fewer than are kept, as for `knn_select_`.
    tile = torch.randn(3, 5, generator=generator).sort(dim=1, descending=True).values
    tile = tile.sort(dim=0, descending=True).values
    return (*new_state(8, 9, device), tile.to(device), 0, 3, 6)


select_both = define(
    "knn_select_both_(Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts, "
    "Tensor(d!) thresholds, Tensor tile, int row_start, int col_start, int keep) -> ()",
    family="knn",
    reference=_select_both_reference,
    fake=lambda *args: None,
    sample=_select_both_sample,
)


def _scores_reference(
    queries: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    scores = torch.full(candidates.shape, -torch.inf, device=queries.device)
    # A few thousand pairs at a time, as each takes a row of products.
    for pairs in (candidates >= 0).nonzero().split(4096):
        row, position = pairs.unbind(1)
        products = queries[row] * features[candidates[row, position]]
        scores[row, position] = _sums.sum_elements(products)
    return scores


def _scores_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 150, generator=generator).to(device)
    return rows[:2], rows, torch.tensor([[0, 5, -1], [3, 3, 1]], device=device)


scores = define(
    "knn_scores(Tensor queries, Tensor features, Tensor candidates) -> Tensor",
    family="knn",
    reference=_scores_reference,
    fake=lambda queries, features, candidates: queries.new_empty(candidates.shape),
    sample=_scores_sample,
)


def _rank_reference(
    similarities: torch.Tensor,
    neighbours: torch.Tensor,
    certified: torch.Tensor,
    queries: torch.Tensor,
    features: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    bound: torch.Tensor,
    floor: torch.Tensor | None,
    row_start: int,
    keep: int,
    unscale: float,
    self_search: bool,
    complete: bool,
) -> None:
    others = similarities.shape[1] - self_search
    for start in range(0, len(queries), 4096):
        rows = slice(start, min(start + 4096, len(queries)))
        top, where = values[rows].topk(keep, dim=1)
        products = top.double() * unscale
        # The k-th largest product less the bound is a floor of the k-th score: a product more than
        # twice the bound below it is out.
        reach = products[:, others - 1] - 2 * bound[rows]
        if floor is not None:
            reach = reach.maximum(floor[rows].double() - bound[rows])
        within = products >= reach.unsqueeze(1)
        width = max(int(within.sum(1).max()), others)
        candidates = indices[rows].gather(1, where).to(torch.int64).masked_fill(~within, -1)
        candidates, _ = candidates[:, :width].sort(dim=1)
        found = _scores_reference(queries[rows], features, candidates)
        ordered, order = found.sort(dim=1, descending=True, stable=True)
        similarities[rows, self_search:] = ordered[:, :others]
        neighbours[rows, self_search:] = candidates.gather(1, order[:, :others])
        last = ordered[:, others - 1].double()
        if floor is not None:
            last = last.maximum(floor[rows].double())
        certified[rows] = True if complete else last > products[:, -1] + bound[rows]
        if self_search:
            own = torch.arange(rows.start, rows.stop, device=queries.device).unsqueeze(1)
            similarities[rows, :1] = _scores_reference(queries[rows], queries, own)
            neighbours[rows, :1] = own + row_start


def _rank_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 150, generator=generator)
    values, indices = (features[:2] @ features.T).fill_diagonal_(-torch.inf).topk(5, dim=1)
    state = (values, indices.to(torch.int32), torch.full((2,), 5, dtype=torch.int32))
    out = (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).bool())
    bound = torch.full((2,), 1e-3, dtype=torch.float64)
    tensors = [t.to(device) for t in (*out, features[:2], features, *state, bound)]
    return (*tensors, None, 0, 4, 1.0, True, False)


rank = define(
    "knn_rank_(Tensor(a!) similarities, Tensor(b!) neighbours, Tensor(c!) certified, "
    "Tensor queries, Tensor features, Tensor values, Tensor indices, Tensor counts, Tensor bound, "
    "Tensor? floor, int row_start, int keep, float unscale, bool self_search, bool complete) -> ()",
    family="knn",
    reference=_rank_reference,
    fake=lambda *args: None,
    sample=_rank_sample,
)


def _halves_reference(
    rows: torch.Tensor, scale: float, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    operand = torch.zeros(height, width, dtype=torch.float16, device=rows.device)
    squares = torch.empty(len(rows), device=rows.device)
    for start in range(0, len(rows), 8192):
        block = rows[start : start + 8192] * scale
        rounded = block.to(torch.float16)
        operand[start : start + len(block), : rows.shape[1]] = rounded
        lost = block - rounded.float()
        squares[start : start + 8192] = _sums.sum_elements(lost * lost)
    return operand, squares


def _halves_sample(device: torch.device) -> tuple[Any, ...]:
    rows = torch.randn(3, 150, generator=torch.Generator().manual_seed(0))
    return rows.to(device), 4.0, 16, 152


halves = define(
    "knn_halves(Tensor rows, float scale, int height, int width) -> (Tensor, Tensor)",
    family="knn",
    reference=_halves_reference,
    fake=lambda rows, scale, height, width: (
        rows.new_empty(height, width, dtype=torch.float16),
        rows.new_empty(rows.shape[0]),
    ),
    sample=_halves_sample,
)
