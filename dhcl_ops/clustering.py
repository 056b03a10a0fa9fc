"""Pseudo-labels: DBSCAN over the sparse Jaccard graph, and SpCL's self-paced choice of clusters."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import torch

from dhcl_ops import _arrays, _checks
from dhcl_ops._progress import Progress
from dhcl_ops._ties import warn_of_tie
from dhcl_ops.camera_neighbours import camera_neighbours
from dhcl_ops.dbscan import labels_of
from dhcl_ops.defaults import SPCL
from dhcl_ops.jaccard import Index, check_eps, inverted_index, join
from dhcl_ops.knn import Neighbours
from dhcl_ops.reciprocal import Convention, encode

__all__ = ["Clustering", "SelfPaced", "cluster", "self_paced_labels"]


# ---- self-paced choice --------------------------------------------------------------------------


class SelfPaced(NamedTuple):
    """What :func:`self_paced_labels` returns.

    ``labels`` (N,) int64: clusters that were kept, numbered anew without gaps in their old order;
    -1 for rows that were in none or were taken out. ``threshold``: the limit of independence, to be
    passed to later calls (None as long as there was no cluster of two rows or more).
    ``independence`` and ``compactness`` (N,) float32: the intersection over union of each row's
    cluster with its cluster of the loose and of the tight labels, 1 for unchanged.
    """

    labels: torch.Tensor
    threshold: float | None
    independence: torch.Tensor
    compactness: torch.Tensor


def _groups(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each row's label among those that occur, ascending, and rows by number.

    Both are as long as the labels, so that nothing has to be read back from a device.
    """
    ordered, order = labels.sort()
    numbers = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    number = torch.empty_like(labels).scatter_(0, order, numbers)
    return number, torch.zeros_like(labels).scatter_add_(0, number, torch.ones_like(labels))


def _overlap(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each row's two clusters, both given without -1."""
    (own, own_sizes), (other, other_sizes) = _groups(labels), _groups(others)
    pair, together = _groups(own * len(labels) + other)
    both = together[pair]
    overlap: torch.Tensor = both.float() / (own_sizes[own] + other_sizes[other] - both).float()
    return overlap


def _percentile(values: torch.Tensor, chosen: torch.Tensor) -> float | None:
    """Of K chosen values, ascending, the one at round(0.9 K), half to even, or the last."""
    ordered = torch.where(chosen, values, torch.inf).sort().values
    count = chosen.sum()
    place = torch.minimum((0.9 * count.double()).round().long(), count - 1).clamp(min=0)
    facts = torch.stack([count.double(), ordered.gather(0, place[None])[0].double()])
    number, value = facts.tolist()
    return float(value) if number else None


def _each_outlier_alone(labels: torch.Tensor) -> torch.Tensor:
    """Clusters by their numbers among those that occur; each outlier has a number of its own."""
    outlier = labels < 0
    number, _ = _groups(labels.clamp(min=-1))
    return torch.where(outlier, len(labels) + outlier.cumsum(0), number)


@_arrays.takes_arrays("labels", "tight", "loose")
@torch.no_grad()
def self_paced_labels(
    labels: torch.Tensor,
    tight: torch.Tensor,
    loose: torch.Tensor,
    threshold: float | None = None,
) -> SelfPaced:
    """Keep the clusters that are independent and, of these, the rows that are compact.

    SpCL's criterion (Ge et al., NeurIPS 2020, section 3.3, and its ``spcl_train_usl.py``), from
    DBSCAN at eps and at a slightly smaller and larger one. With an outlier a cluster of its own, a
    row's independence is the intersection over union of its cluster with its loose cluster, its
    compactness that with its tight one. A cluster counts by its most independent and its most
    compact row. A row stays in its cluster if 1 - independence of the cluster is at most the
    threshold, and its own compactness is the cluster's best; otherwise it becomes an outlier.

    The threshold is the 90th percentile of 1 - independence over the clusters of two rows or more
    (of K ascending values the one at round(0.9 K), half to even, or the last). SpCL sets it once,
    in the first epoch; pass the first result's on. Time and memory are O(N log N): overlaps are
    counted, not read off N x N matrices.

    Args:
        labels, tight, loose: (N,) int64 labels with -1 for outliers. Arrays give arrays back.
        threshold: limit of 1 - independence; by default computed here.

    Returns:
        :class:`SelfPaced`.
    """
    op = "self_paced_labels"
    for name, value in (("labels", labels), ("tight", tight), ("loose", loose)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 1)
        _checks.dtype(op, name, value, (torch.int64,))
        _checks.shape(op, name, value, tuple(labels.shape), "as labels")
    _checks.same_device(op, labels=labels, tight=tight, loose=loose)
    if threshold is not None:
        threshold = _checks.number(op, "threshold", threshold, 0.0, 1.0, rule="in [0, 1]")
    n = len(labels)
    if n == 0:
        nothing = torch.empty(0, device=labels.device)
        return SelfPaced(labels.clone(), threshold, nothing, nothing.clone())
    alone = _each_outlier_alone(labels)
    compactness = _overlap(alone, _each_outlier_alone(tight))
    independence = _overlap(alone, _each_outlier_alone(loose))
    # As distances, where 0 is a cluster that stays the same, and in float32 as SpCL has them, so
    # that thresholds agree. A cluster is judged by its best image, the smallest distance.
    apart, spread = 1.0 - independence, 1.0 - compactness
    own, sizes = _groups(alone)
    worst = torch.full((n,), torch.inf, device=labels.device)
    cluster_apart = worst.scatter_reduce(0, own, apart, "amin")
    cluster_spread = worst.scatter_reduce(0, own, spread, "amin")
    if threshold is None:
        threshold = _percentile(cluster_apart, sizes > 1)
    kept = labels >= 0
    if threshold is not None:
        kept &= (cluster_apart[own] <= threshold) & (spread <= cluster_spread[own])
    # Images of clusters that are left out become outliers; the other clusters keep their order and
    # are numbered anew without gaps, behind the outliers where there are any.
    number, _ = _groups(torch.where(kept, labels, -1))
    fresh = torch.where(kept, number - (~kept).any().long(), -1)
    return SelfPaced(fresh, threshold, independence, compactness)


# ---- all of it ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Clustering:
    """What :func:`cluster` returns.

    Attributes:
        labels: (N,) int64, -1 for outliers; an array if the features were one.
        num_clusters: number of clusters.
        num_outliers: number of rows labelled -1.
        seconds: wall time of each stage, in seconds; on CUDA that on the stream.
        sizes: ``pairs``, the entries of the eps-graph; ``set_entries``, those of all expanded sets;
            ``longest_column``, the most rows that share one element, and ``index_work``, the sum of
            the squares of that (a plain inverted index would take as many additions): watch both
            for hubs; ``uncertified_rows`` of the neighbour search.
        threshold: limit of independence, with ``self_paced`` only; pass it to the next call.
        graph: the graph of the pairs within eps, or within eps + eps_gap where ``loose_labels``
            are given, or within ``graph_eps``, for :func:`dhcl_ops.dbscan` at other, smaller eps.
        loose_labels: (N,) int64, the labels at eps + eps_gap with ``self_paced`` or ``loose``, of
            the kind of ``labels``; else None. For
            :func:`dhcl_ops.suspected_false_negatives`.
    """

    labels: Any
    num_clusters: int
    num_outliers: int
    seconds: dict[str, float]
    sizes: dict[str, int]
    threshold: float | None
    graph: torch.Tensor = dataclasses.field(repr=False)
    loose_labels: Any = None


class Stages:
    """Seconds between calls, by name; on CUDA by events on the stream, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._marks = [self._now()]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __call__(self, stage: str) -> None:
        self._names.append(stage)
        self._marks.append(self._now())

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage; on CUDA this waits for the last one."""
        if self._device.type != "cuda":
            lengths = [end - start for start, end in itertools.pairwise(self._marks)]
        else:
            self._marks[-1].synchronize()
            lengths = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self._marks)]
        total = dict.fromkeys(self._names, 0.0)
        for name, length in zip(self._names, lengths, strict=True):
            total[name] += length
        return total


def _counts(
    index: Index, labels: torch.Tensor, uncertified: torch.Tensor
) -> tuple[int, int, dict[str, int]]:
    """The numbers of clusters and outliers, and sizes, read back from the device at once."""
    names = ("longest_column", "index_work", "uncertified_rows")
    if len(labels) == 0:
        return 0, 0, dict.fromkeys(names, 0)
    lengths = index.list_offsets.diff()
    facts = [labels.max() + 1, (labels < 0).sum(), lengths.max(), (lengths * lengths).sum()]
    clusters, outliers, *sizes = torch.stack([*facts, uncertified]).tolist()
    return clusters, outliers, dict(zip(names, sizes, strict=True))


@torch.no_grad()
def cluster(
    features: torch.Tensor,
    *,
    k1: int = SPCL.k1,
    k2: int = SPCL.k2,
    eps: float = SPCL.eps,
    min_samples: int = SPCL.min_samples,
    convention: Convention = "spcl",
    ranks: Neighbours | torch.Tensor | None = None,
    cameras: torch.Tensor | None = None,
    k1_own: int = 0,
    self_paced: bool = False,
    loose: bool = False,
    eps_gap: float = SPCL.eps_gap,
    graph_eps: float | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """Neighbours, Jaccard graph and DBSCAN: from features to pseudo-labels.

    With ``self_paced`` DBSCAN runs at eps - eps_gap, eps and eps + eps_gap over one graph, and
    :func:`self_paced_labels` chooses among the clusters at eps. A training loop clusters once per
    epoch and passes the first epoch's ``threshold`` on::

        threshold = None
        for epoch in range(epochs):
            found = cluster(features, self_paced=True, threshold=threshold)
            threshold = found.threshold
            bank.set_labels(found.labels)
            suspects = suspected_false_negatives(bank, found.loose_labels)

    Args:
        features: (N, d) rows of norm 1; an array gives labels as an array of its kind.
        k1, k2, convention, ranks, progress: as in :func:`dhcl_ops.jaccard_graph`.
        eps: as there. For k2 = 6, 0.5 is the exact distance of many pairs, about which rounding
            then decides; 0.49 and 0.51 are not. So it is with each eps that is used.
        min_samples: as in :func:`dhcl_ops.dbscan`.
        cameras: (N,) int64, of which camera each row is, with ``k1_own``.
        k1_own: how many of the k1 neighbours are of the row's own camera, by
            :func:`dhcl_ops.camera_neighbours`, in place of ``ranks``; 0 looks at no camera.
        self_paced: leave out clusters and rows by SpCL's criterion.
        loose: give the labels at eps + eps_gap too, which ``self_paced`` gives in any case.
        eps_gap: distance of the tight and the loose eps from eps, >= 0; those that are used must
            lie in (0, 1).
        graph_eps: give the graph of the pairs within this eps, which is at least as large as those
            that DBSCAN runs at, in (0, 1): for :func:`dhcl_ops.graph_false_negatives`. The labels
            are the same.
        threshold: limit of independence from an earlier call, with ``self_paced`` only.

    Returns:
        :class:`Clustering`.

    Raises:
        TypeError, ValueError: as :func:`dhcl_ops.jaccard_graph`.
    """
    op = "cluster"
    given = features
    features, ranks, cameras = _arrays.as_tensors(
        op, features=features, ranks=ranks, cameras=cameras
    )
    check_together(op, k1_own, cameras, ranks, self_paced, threshold)
    radii = radii_of(op, eps, eps_gap, self_paced, loose)
    largest = graph_radius(op, radii, graph_eps)
    min_samples = _checks.integer(op, "min_samples", min_samples, 1)
    rows = _checks.unit_rows(op, "features", features)
    timer = Stages(rows.device)
    if cameras is not None and (own := min(k1_own, k1, len(rows))):
        there = cameras.to(rows.device)
        ranks = camera_neighbours(rows, there, min(k1, len(rows)), own, progress=progress)
    encoded = encode(op, rows, k1, k2, convention, ranks, progress, timer)
    for radius in radii:
        if radius is not None:
            warn_of_tie(op, radius, k2)
    index = inverted_index(encoded.rows, largest)
    timer("index")
    graph = join(encoded.rows, index, largest, progress)
    timer("pairs")
    parts = (graph.crow_indices(), graph.col_indices(), graph.values())
    several = [labels_of(*parts, r, min_samples) for r in radii if r is not None]
    labels = several[1 if self_paced else 0]
    loose_labels = None if radii.loose is None else several[-1]
    if self_paced:
        labels, threshold, *_ = self_paced_labels(labels, several[0], several[-1], threshold)
    timer("clusters")
    clusters, outliers, sizes = _counts(index, labels, encoded.uncertified)
    known = {"pairs": len(graph.values()), "set_entries": len(encoded.rows.columns)}
    return Clustering(
        labels=_arrays.like(given, labels),
        num_clusters=clusters,
        num_outliers=outliers,
        seconds=timer.seconds,
        sizes=known | sizes,
        threshold=threshold,
        graph=graph,
        loose_labels=_arrays.like(given, loose_labels),
    )


def check_together(
    op: str,
    k1_own: int,
    cameras: torch.Tensor | None,
    ranks: Neighbours | torch.Tensor | None,
    self_paced: bool,
    threshold: float | None,
) -> None:
    """Raise ValueError for arguments of :func:`cluster` that do not go together."""
    if _checks.integer(op, "k1_own", k1_own, 0) and (cameras is None or ranks is not None):
        raise ValueError(f"{op}: k1_own goes with cameras and without ranks (got k1_own {k1_own})")
    if threshold is not None and not self_paced:
        raise ValueError(f"{op}: threshold goes with self_paced=True (got {threshold})")


class Radii(NamedTuple):
    """The eps at which DBSCAN runs over one graph, ascending; None for those not asked for."""

    tight: float | None
    eps: float
    loose: float | None

    @property
    def largest(self) -> float:
        """The eps that the graph is made for."""
        return self.eps if self.loose is None else self.loose


def graph_radius(op: str, radii: Radii, graph_eps: float | None) -> float:
    """The eps that the graph is made for: the largest of DBSCAN's, or a larger one if given."""
    if graph_eps is None:
        return radii.largest
    if (eps := check_eps(op, graph_eps)) < radii.largest:
        raise ValueError(
            f"{op}: graph_eps must be at least {radii.largest:g}, the largest eps of DBSCAN "
            f"(got {graph_eps})"
        )
    return eps


def radii_of(op: str, eps: float, gap: float, self_paced: bool, loose: bool) -> Radii:
    eps = check_eps(op, eps)
    if not (self_paced or loose):
        return Radii(None, eps, None)
    gap = _checks.number(op, "eps_gap", gap, 0.0, rule="finite and >= 0")
    if self_paced and not (eps - gap > 0.0 and eps + gap < 1.0):
        raise ValueError(f"{op}: eps -/+ eps_gap must be in (0, 1) (got {eps} -/+ {gap})")
    if eps + gap >= 1.0:
        raise ValueError(f"{op}: eps + eps_gap must be in (0, 1) (got {eps} + {gap})")
    return Radii(eps - gap if self_paced else None, eps, eps + gap)
