"""False negatives that the Jaccard graph tells: how likely a class is the identity of an image.

Mathematics: method.md in docs, section "Loss". Two images of one person that lie in two clusters
are still near each other in the graph at a looser eps than the clusters were made with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dhcl_ops import _checks, _csr
from dhcl_ops._csr import Rows
from dhcl_ops.dbscan import checked_graph

__all__ = ["FalseNegatives", "graph_false_negatives"]


class FalseNegatives(NamedTuple):
    """Of each image the classes that may be its own identity, in CSR form.

    Image i has the classes from ``offsets[i]`` up to ``offsets[i + 1]``, ascending; of those that
    are not listed the probability is 0. Class numbers are those of
    :meth:`dhcl_ops.MemoryBank.set_labels` with the same labels.
    """

    offsets: torch.Tensor  # (N + 1,) int64
    classes: torch.Tensor  # (E,) int64
    logs: torch.Tensor  # (E,) float32, log(1 - probability)


@torch.no_grad()
def graph_false_negatives(
    labels: torch.Tensor, graph: torch.Tensor, scale: float = 0.1
) -> FalseNegatives:
    """How likely the classes near an image are its own identity.

    For image i and a class k that is not its own,
    ``probability = min(1, mean over the members j of k of (1 - J(i, j)) / scale)``, where a pair
    that is not in the graph adds nothing.

    Args:
        labels: (N,) int64 clusters, -1 for un-clustered images, each of which is a class of its
            own, as :meth:`dhcl_ops.MemoryBank.set_labels` takes them.
        graph: (N, N) sparse CSR tensor of Jaccard distances, such as ``Clustering.graph`` with
            ``graph_eps``.
        scale: the mean similarity from which a class is certainly the image's own, > 0.

    Returns:
        :class:`FalseNegatives` on the graph's device. Sums are in the graph's order, so the same
        bits every time.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range.
    """
    op = "graph_false_negatives"
    lines = Rows(*checked_graph(op, graph))
    count = graph.shape[0]
    labels = _checks.integers(op, "labels", labels, count, "one per row of the graph")
    _checks.same_device(op, labels=labels, graph=graph)
    scale = check_numbers(op, labels, count, scale)
    outlier = labels < 0
    highest = labels.max() if count else labels.new_tensor(-1)
    return lists_of(lines, 0, torch.where(outlier, highest + outlier.cumsum(0), labels), scale)


def check_numbers(op: str, labels: torch.Tensor, count: int, scale: float) -> float:
    """Raise ValueError for labels that ``count`` images can't have; returns the checked scale."""
    scale = _checks.number(op, "scale", scale, 0.0, rule="finite and > 0")
    if scale == 0.0:
        raise ValueError(f"{op}: scale must be finite and > 0 (got 0.0)")
    if len(labels):
        lowest, highest = (int(bound) for bound in torch.aminmax(labels))
        if lowest < -1 or highest >= count:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(f"{op}: labels must be in [-1, {count}) (got {wrong})")
    return scale


def lists_of(lines: Rows, first: int, classes: torch.Tensor, scale: float) -> FalseNegatives:
    """The lists of consecutive images, of which ``first`` is the first, from their graph's lines.

    ``classes`` (N,) are those of all images.
    """
    rows, near = _csr.row_ids(lines.offsets), classes[lines.columns]
    count = len(lines.offsets) - 1
    other = near != classes[first : first + count][rows]
    sizes = torch.bincount(classes)
    number = max(len(sizes), 1)
    keys, order = (rows[other] * number + near[other]).sort(stable=True)
    similar = (1.0 - lines.values[other]).clamp(0.0, 1.0)
    keys, total = _csr.sums_in_order(similar[order], keys)
    row, found = keys // number, keys % number
    likely = (total / sizes[found] / scale).clamp(max=1.0)
    return FalseNegatives(_csr.offsets_of(row, count), found, torch.log1p(-likely))
