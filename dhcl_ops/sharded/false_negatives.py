"""False negatives that the Jaccard graph tells, from the lines of it that each rank has."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops._csr import Rows
from dhcl_ops.dbscan import checked_lines
from dhcl_ops.false_negatives import FalseNegatives, check_numbers, lists_of
from dhcl_ops.sharded.classes import classes_of_all, clusters_and_outliers
from dhcl_ops.sharded.shards import Shards

__all__ = ["graph_false_negatives"]


@torch.no_grad()
def graph_false_negatives(
    labels: torch.Tensor,
    graph: torch.Tensor,
    scale: float = 0.1,
    *,
    group: dist.ProcessGroup | None = None,
    traffic: dict[str, int] | None = None,
) -> FalseNegatives:
    """:func:`dhcl_ops.graph_false_negatives` of own images, to the bit.

    Only labels are sent: each rank has 4 bytes for each of the N images while it works.

    Args:
        labels: (n,) int64 clusters of this rank's images, -1 for un-clustered ones, as
            :meth:`MemoryBank.set_labels` takes them.
        graph: (n, N) sparse CSR tensor, own lines of the graph, such as ``Clustering.graph`` of
            :func:`cluster` with ``graph_eps``.
        scale: as in :func:`dhcl_ops.graph_false_negatives`, equal on all ranks.
        group, traffic: as in :func:`knn`.

    Returns:
        :class:`dhcl_ops.FalseNegatives` of own images; classes are numbered as those of all ranks.

    Raises:
        TypeError, ValueError: as :func:`dhcl_ops.graph_false_negatives`, on all ranks, also where
            one rank's arguments are wrong or do not agree with another's.
        RuntimeError: without an initialised process group.
        PeerError: another rank was lost or did not answer in the group's time.
    """
    op = "sharded.graph_false_negatives"
    lines: Rows

    def check() -> torch.Tensor:
        nonlocal lines
        lines = Rows(*checked_lines(op, graph))
        own = _checks.integers(op, "labels", labels, graph.shape[0], "one per line of the graph")
        _checks.same_device(op, labels=own, graph=graph)
        check_numbers(op, own, graph.shape[1], scale)
        return own

    width = tuple(graph.shape[1:]) if isinstance(graph, torch.Tensor) else None
    shards = Shards(op, group, check, {"scale": scale, "the graph's width": width}, traffic)
    if graph.shape[1] != shards.total:
        raise ValueError(
            f"{op}: graph must have a column for each image of all ranks (got {graph.shape[1]} for "
            f"{shards.total} images)"
        )
    clusters, before = clusters_and_outliers(shards, shards.own)
    lengths = [end - begin for begin, end in itertools.pairwise(shards.starts)]
    classes = classes_of_all(shards, shards.own, clusters, before, lengths)
    return lists_of(lines, shards.begin, classes, float(scale))
