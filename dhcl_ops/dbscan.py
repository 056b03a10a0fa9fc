"""DBSCAN over a sparse distance matrix.

DBSCAN is that of Ester et al. (KDD 1996) with the numbering of scikit-learn, label for label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dhcl_ops import _checks, _csr
from dhcl_ops._ops import define
from dhcl_ops.defaults import SPCL

__all__ = ["dbscan"]


def _dbscan_reference(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    eps: float,
    min_samples: int,
) -> torch.Tensor:
    n = len(offsets) - 1
    limit = torch.tensor(eps, dtype=torch.float32, device=values.device)
    rows = _csr.row_ids(offsets)
    near = values <= limit
    core = torch.zeros_like(offsets[:-1]).index_add(0, rows, near.long()) >= min_samples
    near = near & core[columns]
    # Each core row takes the smallest core row it can reach: neighbours' roots, then their roots.
    inner = near & core[rows]
    root = torch.arange(n, device=offsets.device)
    while True:
        lower = root.scatter_reduce(0, rows[inner], root[columns[inner]], "amin")
        # Where a root has found a smaller one, all rows below it move there too.
        lower = lower.scatter_reduce(0, root[core], lower[core], "amin")
        lower = lower[lower]
        if torch.equal(lower, root):
            break
        root = lower
    is_root = core & (root == torch.arange(n, device=offsets.device))
    number = is_root.long().cumsum(0) - 1
    labels = torch.where(core, number[root], -1)
    border = near & ~core[rows]
    lowest = torch.full_like(labels, n).scatter_reduce(
        0, rows[border], labels[columns[border]], "amin"
    )
    return torch.where(lowest < n, lowest, labels)


def _dbscan_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(2)
    distances = torch.rand(24, 24, generator=generator)
    distances = torch.minimum(distances, distances.T).fill_diagonal_(0.0)
    near = distances <= 0.1
    offsets = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
    columns = near.nonzero()[:, 1]
    return offsets.to(device), columns.to(device), distances[near].to(device), 0.07, 3


labels_of = define(
    "dbscan(Tensor offsets, Tensor columns, Tensor values, float eps, int min_samples) -> Tensor",
    family="dbscan",
    reference=_dbscan_reference,
    fake=lambda offsets, columns, values, eps, min_samples: offsets.new_empty(offsets.shape[0] - 1),
    sample=_dbscan_sample,
)


@torch.no_grad()
def dbscan(
    graph: torch.Tensor, eps: float | Sequence[float], min_samples: int = SPCL.min_samples
) -> torch.Tensor:
    """Cluster the rows of a sparse distance matrix; pairs it does not hold are too far apart.

    Labels equal those of ``sklearn.cluster.DBSCAN(eps, min_samples=min_samples,
    metric="precomputed")`` on the dense matrix: a row is core if at least ``min_samples`` entries
    of its line, its own included where that is at most eps, are at most eps (in float32); clusters
    are numbered by their smallest core row; a border row belongs to the lowest-numbered cluster it
    touches; -1 is for rows of none.

    Args:
        graph: (N, N) sparse CSR tensor, symmetric, columns ascending: what
            :func:`dhcl_ops.jaccard_graph` returns, made with at least the largest eps.
        eps: largest distance of neighbours, >= 0; or several of them. Not 0.5 for Jaccard distances
            with k2 = 6, which many pairs have exactly: see :func:`dhcl_ops.jaccard_graph`.
        min_samples: neighbours that make a row core, >= 1.

    Returns:
        (N,) int64 labels; (E, N) for a sequence of E eps.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, layout, dtype, shape or range.
    """
    op = "dbscan"
    parts = checked_graph(op, graph)
    min_samples = _checks.integer(op, "min_samples", min_samples, 1)
    several = isinstance(eps, Sequence)
    wanted = [
        _checks.number(op, "eps", e, 0.0, rule="finite and >= 0")
        for e in (eps if isinstance(eps, Sequence) else [eps])
    ]
    labels: list[torch.Tensor] = [labels_of(*parts, e, min_samples) for e in wanted]
    if not several:
        return labels[0]
    return torch.stack(labels) if labels else parts[0].new_empty(0, graph.shape[0])


def checked_graph(op: str, graph: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets, columns (int64) and distances of a graph; raises naming what is wrong with it."""
    _checks.tensor(op, "graph", graph, torch.sparse_csr)
    if graph.dim() != 2 or graph.shape[0] != graph.shape[1]:
        raise ValueError(f"{op}: graph must be square (got shape {tuple(graph.shape)})")
    return checked_lines(op, graph)


def checked_lines(op: str, graph: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of some lines (n, N) of a graph."""
    _checks.tensor(op, "graph", graph, torch.sparse_csr)
    _checks.rank(op, "graph", graph, 2)
    _checks.dtype(op, "graph", graph, (torch.float32,))
    parts = (graph.crow_indices().long(), graph.col_indices().long(), graph.values())
    _check_entries(op, *parts, graph.shape[1])
    _check_ascending(op, parts[0], parts[1])
    return parts


def _check_entries(
    op: str, offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int
) -> None:
    """Refuse what torch lets pass in a CSR tensor that was made without its checks, and NaN."""
    if columns.dim() != 1 or values.shape != columns.shape or int(offsets[-1]) != len(columns):
        raise ValueError(
            f"{op}: graph must have one value per column (got columns {tuple(columns.shape)}, "
            f"values {tuple(values.shape)} and rows that end at {int(offsets[-1])})"
        )
    if len(columns) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(columns))
    if low < 0 or high >= width:
        raise ValueError(f"{op}: columns must be in [0, {width}) (got {low if low < 0 else high})")
    if bool(values.isnan().any()):
        entry = values.isnan().nonzero()[0]
        row = int(torch.searchsorted(offsets, entry, right=True)) - 1
        raise ValueError(f"{op}: distances must not be NaN (got one in row {row})")


def _check_ascending(op: str, offsets: torch.Tensor, columns: torch.Tensor) -> None:
    """Refuse a graph whose columns do not ascend: edges would be missed without a word."""
    if len(columns) == 0:
        return
    # One place more than entries, for rows that begin behind the last.
    falls = torch.nn.functional.pad(columns[1:] <= columns[:-1], (1, 1))
    falls.index_fill_(0, offsets[:-1], 0)
    if bool(falls.any()):
        entry = falls.nonzero()[0]
        row = int(torch.searchsorted(offsets, entry, right=True)) - 1
        raise ValueError(f"{op}: columns must ascend within each row (got others in row {row})")
