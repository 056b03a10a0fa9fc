"""DBSCAN over own lines of a sharded graph: the labels of :func:`dhcl_ops.dbscan` on the whole."""

from __future__ import annotations

import torch

from dhcl_ops import _csr
from dhcl_ops._csr import Rows
from dhcl_ops.dbscan import labels_of
from dhcl_ops.sharded.shards import Shards

# Edges that are joined at once.
_EDGES = 1 << 18


def _smallest_reached(ids: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each id (ascending) the smallest id that pairs (a, b) of ids connect it to."""
    count = len(ids)
    a, b = (torch.searchsorted(ids, side.contiguous()) for side in (a, b))
    own = torch.arange(count, device=ids.device)
    # Connected components are DBSCAN's clusters where every row is core.
    keys = torch.cat([a * count + b, b * count + a, own * (count + 1)])
    del a, b
    keys = keys.unique()
    column = keys % max(count, 1)
    lines = _csr.offsets_of(keys // max(count, 1), count)
    component = labels_of(lines, column, torch.zeros(len(column), device=ids.device), 1.0, 1)
    least = ids.new_full((count,), torch.iinfo(ids.dtype).max).scatter_reduce(
        0, component, ids, "amin"
    )
    return least[component]


def dbscan(graph: Rows, eps: float, min_samples: int, shards: Shards) -> torch.Tensor:
    """Labels (n,) int64 of own rows.

    Each rank sends a forest over the core rows that it sees, at most one pair of numbers per own
    row and per row of another that is near one; every rank joins all forests. The clusters are
    then numbered by their smallest core row, which its owner counts.
    """
    device = graph.offsets.device
    near = graph.values <= torch.tensor(eps, dtype=torch.float32, device=device)
    # 32 bits are enough for the number of a row, and there are many pairs.
    row, column = _csr.row_ids(graph.offsets).int()[near], graph.columns.int()[near]
    del near
    core = torch.bincount(row, minlength=shards.rows) >= min_samples
    marks = shards.marked(column)
    ids = marks.nonzero().squeeze(1)
    (is_core,) = shards.fetch(ids, core)
    marks[ids] = is_core
    to_core = marks[column]
    del marks, ids
    row, column = row[to_core], column[to_core]
    inner = core[row]
    own = torch.arange(shards.begin, shards.end, device=device)
    # Of a pair the rank of the lower row makes an edge: the other one has it the other way round.
    edges = (inner & (column > row + shards.begin)).nonzero().squeeze(1)
    root = _roots(own, row[edges] + shards.begin, column[edges], core, shards)
    del edges
    is_root = core & (root == own)
    counts = shards.gather(is_root.sum()[None])
    number = is_root.cumsum(0) - 1 + counts[: shards.rank].sum()
    wanted = root[core].unique()
    (numbers,) = shards.fetch(wanted, number)
    labels = torch.full((shards.rows,), -1, device=device)
    labels[core] = numbers[torch.searchsorted(wanted, root[core])]
    # A border row goes to the lowest cluster it touches.
    row, column = row[~inner].long(), column[~inner]
    ids = column.unique()
    (theirs,) = shards.fetch(ids, labels)
    touched = theirs[torch.searchsorted(ids, column)]
    lowest = torch.full_like(labels, shards.total).scatter_reduce(0, row, touched, "amin")
    return torch.where(lowest < shards.total, lowest, labels)


def _roots(
    own: torch.Tensor, a: torch.Tensor, b: torch.Tensor, core: torch.Tensor, shards: Shards
) -> torch.Tensor:
    """The smallest core row that each own core row is connected to, by the edges of all ranks."""
    seen = shards.marked(own[core], b).nonzero().squeeze(1)
    root = seen
    # Some edges at a time, with the forest of those before.
    for some in torch.arange(len(a), device=a.device).split(_EDGES):
        tree = seen[root != seen]
        one, other = torch.cat([tree, a[some]]), torch.cat([root[root != seen], b[some]])
        root = _smallest_reached(seen, one, other)
    beside = root != seen
    forest = torch.stack([seen[beside], root[beside]], 1).int()
    every = shards.gather(forest).long()
    joined = every.reshape(-1).unique()
    final = _smallest_reached(joined, every[:, 0], every[:, 1])
    result = own.clone()
    if len(joined):
        place = torch.searchsorted(joined, own).clamp(max=len(joined) - 1)
        result = torch.where(joined[place] == own, final[place], own)
    return result
