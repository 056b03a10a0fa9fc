"""DBSCAN under constraints: rows that are known to be different never share a cluster."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from dhcl_ops import _arrays, _checks, _csr
from dhcl_ops.dbscan import checked_graph, dbscan
from dhcl_ops.defaults import SPCL

__all__ = ["constrained_dbscan"]


@torch.no_grad()
def constrained_dbscan(
    graph: torch.Tensor,
    apart: torch.Tensor | Any,
    eps: float,
    min_samples: int = SPCL.min_samples,
) -> torch.Tensor:
    """Cluster the rows of a sparse distance matrix so that pairs known to differ stay apart.

    A pair that is apart is at an infinite distance, whatever the graph says: it makes neither row a
    core. That alone does not keep it apart, because a chain of other rows may join the two. So the
    clusters of :func:`dhcl_ops.dbscan` that hold such a pair are grown anew: the edges between
    their core rows are taken from the shortest on (equal ones by row), and one joins two parts
    unless that would bring a pair together. Then each of their border rows goes to the nearest core
    row whose cluster holds nothing it is apart from, or becomes an outlier. Clusters are numbered
    by their smallest core row, as DBSCAN's are.

    Without pairs, and for every cluster that holds none, labels are DBSCAN's own. The rule is that
    of C-DBSCAN (Ruiz, Spiliopoulou, Menasalvas, RSFDGrC 2007), which merges the nearest clusters
    first and never against a cannot-link constraint. Its must-link constraints need no algorithm
    here: what is known to be the same is given as one row, as tracklets are.

    Args:
        graph, eps, min_samples: as of :func:`dhcl_ops.dbscan`, with one eps.
        apart: (P, 2) int64 pairs of different rows, in any order, on any device.

    Returns:
        (N,) int64 labels on the graph's device, -1 for outliers.

    Raises:
        TypeError, ValueError, IndexError: as :func:`dhcl_ops.dbscan`; pairs of another kind or
            shape, of a row with itself, or out of range.
    """
    op = "constrained_dbscan"
    [apart] = _arrays.as_tensors(op, apart=apart)
    _checks.tensor(op, "apart", apart)
    _checks.dtype(op, "apart", apart, (torch.int64,))
    if apart.dim() != 2 or apart.shape[1] != 2:
        raise ValueError(f"{op}: apart must be (P, 2) (got shape {tuple(apart.shape)})")
    offsets, columns, values = checked_graph(op, graph)
    if len(apart):
        _check_pairs(op, apart, graph.shape[0])
        graph = _without(offsets, columns, values, apart)
    eps = _checks.number(op, "eps", eps, 0.0, rule="finite and >= 0")
    labels: torch.Tensor = dbscan(graph, eps, min_samples)
    pairs = apart.cpu()
    found = labels.cpu()
    together = (found[pairs[:, 0]] == found[pairs[:, 1]]) & (found[pairs[:, 0]] >= 0)
    if not together.any():
        return labels
    edges = _Edges(graph, eps, min_samples)
    broken = torch.isin(found, found[pairs[together, 0]])
    return _grown(edges, found, broken, pairs).to(labels.device)


def _check_pairs(op: str, apart: torch.Tensor, n: int) -> None:
    low, high = int(apart.min()), int(apart.max())
    if low < 0 or high >= n:
        raise IndexError(f"{op}: apart must be in [0, {n}) (got {low if low < 0 else high})")
    same = (apart[:, 0] == apart[:, 1]).nonzero()
    if len(same):
        row = int(apart[int(same[0]), 0])
        raise ValueError(f"{op}: apart must be pairs of two rows (got row {row} with itself)")


def _without(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, apart: torch.Tensor
) -> torch.Tensor:
    """The graph without the edges of these pairs."""
    n = len(offsets) - 1
    there = apart.to(columns.device)
    keys = torch.cat([there[:, 0] * n + there[:, 1], there[:, 1] * n + there[:, 0]])
    kept = ~torch.isin(_csr.row_ids(offsets) * n + columns, keys)
    before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    return _csr.sparse_tensor(before[offsets], columns[kept], values[kept])


class _Edges:
    """The pairs of rows within eps, on the CPU, and which rows are core."""

    def __init__(self, graph: torch.Tensor, eps: float, min_samples: int) -> None:
        offsets = graph.crow_indices().long().cpu()
        rows, columns = _csr.row_ids(offsets), graph.col_indices().long().cpu()
        values = graph.values().cpu()
        near = values <= torch.tensor(eps, dtype=torch.float32)
        degree = torch.zeros_like(offsets[:-1]).index_add(0, rows, near.long())
        self.core = degree >= min_samples
        self.rows, self.columns, self.values = rows[near], columns[near], values[near]

    def between(self, chosen: torch.Tensor) -> list[tuple[int, int]]:
        """The chosen edges as pairs, the shortest first, equal ones by row and column."""
        order = self.values[chosen].argsort(stable=True)
        ends = (self.rows[chosen][order].tolist(), self.columns[chosen][order].tolist())
        return list(zip(*ends, strict=True))


def _grown(
    edges: _Edges, labels: torch.Tensor, broken: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Labels (N,) in which the rows of broken clusters have been put together anew."""
    core, foes = edges.core, defaultdict(set)
    for one, other in pairs.tolist():
        foes[one].add(other)
        foes[other].add(one)
    part = torch.where(labels >= 0, len(labels) + labels, -1)
    inner = broken & core
    inside = inner[edges.rows] & inner[edges.columns] & (edges.rows < edges.columns)
    roots = _joined(inner.nonzero()[:, 0].tolist(), edges.between(inside), foes)
    border = broken & ~core
    part[border] = -1
    parts: list[int] = part.tolist()
    for row, root in roots.items():
        parts[row] = root
    for row, to in edges.between(border[edges.rows] & core[edges.columns]):
        if parts[row] == -1 and not any(parts[foe] == parts[to] for foe in foes[row]):
            parts[row] = parts[to]
    numbers: dict[int, int] = {-1: -1}
    for row in core.nonzero()[:, 0].tolist():
        numbers.setdefault(parts[row], len(numbers) - 1)
    return torch.tensor([numbers[each] for each in parts], dtype=torch.int64)


def _joined(
    rows: list[int], edges: list[tuple[int, int]], foes: dict[int, set[int]]
) -> dict[int, int]:
    """The smallest row of each row's part, joined along the edges unless foes would meet."""
    parent = {row: row for row in rows}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    # Parts that must not meet, by their roots; what is joined inherits.
    hostile = {row: {foe for foe in foes[row] if foe in parent} for row in rows}
    for row, column in edges:
        low, high = sorted((root(row), root(column)))
        if low == high or high in hostile[low]:
            continue
        parent[high] = low
        for other in hostile.pop(high):
            hostile[other].discard(high)
            hostile[other].add(low)
            hostile[low].add(other)
    return {row: root(row) for row in rows}
