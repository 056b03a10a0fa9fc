"""Pseudo-labels of an epoch: which images are taken for one person.

Mathematics: method.md in docs, sections "k-reciprocal Jaccard distance" and "DBSCAN and the
self-paced choice".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from dhcl.config import EPS_GAP, LabelOptions
from dhcl.data.tracks import Tracklets
from dhcl_ops import (
    Clustering,
    FalseNegatives,
    cluster,
    constrained_dbscan,
    graph_false_negatives,
    self_paced_labels,
    sharded,
)

__all__ = ["PseudoLabels", "pseudo_labels", "sharded_pseudo_labels"]


class PseudoLabels(NamedTuple):
    """What clustering says of N training images.

    Attributes:
        labels: (N,) int64 on the CPU, clusters from 0, -1 for outliers.
        loose: (N,) the same at a larger eps, or None where it was not asked for.
        threshold: limit of independence of the self-paced criterion, for the epochs to come.
        seconds: wall time by stage: neighbours, dbscan, and jaccard for all between them.
        false_negatives: classes near each image that this process clusters, on the CPU, where they
            were asked for.
    """

    labels: torch.Tensor
    loose: torch.Tensor | None
    threshold: float | None
    seconds: dict[str, float]
    false_negatives: FalseNegatives | None = None


def pseudo_labels(
    features: torch.Tensor,
    cameras: torch.Tensor,
    options: LabelOptions,
    *,
    loose: bool,
    threshold: float | None,
    progress: Callable[[str, int, int], None],
    tracklets: Tracklets | None = None,
    graph_eps: float | None = None,
) -> PseudoLabels:
    """Cluster features by Jaccard distance and DBSCAN.

    Args:
        features: (N, d) float32 rows of length 1.
        cameras: (N,) int64, for ``k1_own`` neighbours of the own camera; not looked at without.
        options: how to cluster.
        loose: give labels at an eps that is larger by :data:`dhcl.config.EPS_GAP` too.
        threshold: of an earlier epoch's :class:`PseudoLabels`.
        progress: told stage, rows done and rows in all, again and again.
        tracklets: which images belong together. Then tracklets are clustered, by their pooled
            features; those seen at once never share a cluster, and images of one tracklet always
            do, those of a tracklet in no cluster too unless outliers are dropped.
        graph_eps: tell from the pairs within this eps which classes may be an image's own identity;
            of images that belong to no tracklets.
    """
    if tracklets is not None:
        features, cameras = tracklets.pool(features), torch.from_numpy(tracklets.cameras)
    found = cluster(
        features,
        k1=options.k1,
        k2=options.k2,
        eps=options.eps,
        min_samples=options.min_samples,
        cameras=cameras,
        k1_own=options.k1_own,
        self_paced=options.self_paced,
        loose=loose,
        eps_gap=EPS_GAP,
        graph_eps=graph_eps,
        threshold=threshold,
        progress=progress,
    )
    labels, at_larger_eps, limit = found.labels, found.loose_labels, found.threshold
    clustered = time.perf_counter()
    if tracklets is not None and len(tracklets.apart):
        labels, at_larger_eps, limit = _apart(found, tracklets, options, threshold)
    if tracklets is not None:
        alone = options.outliers == "keep"
        labels = tracklets.spread(labels, alone=alone)
        if at_larger_eps is not None:
            at_larger_eps = tracklets.spread(at_larger_eps, alone=alone)
    apart = time.perf_counter() - clustered
    likely = None
    if graph_eps is not None:
        found_out = graph_false_negatives(labels, found.graph)
        likely = FalseNegatives(*(part.cpu() for part in found_out))
    stages = _stages(found.seconds, apart)
    stages["jaccard"] += time.perf_counter() - clustered - apart
    at_larger_eps = at_larger_eps.cpu() if loose else None
    return PseudoLabels(labels.cpu(), at_larger_eps, limit, stages, likely)


def sharded_pseudo_labels(
    features: torch.Tensor,
    cameras: torch.Tensor,
    options: LabelOptions,
    gather: Callable[[torch.Tensor, int], torch.Tensor],
    count: int,
    *,
    loose: bool,
    threshold: float | None,
    progress: Callable[[str, int, int], None],
    graph_eps: float | None = None,
) -> PseudoLabels:
    """:func:`pseudo_labels` where each process has the features of its own images; all call it.

    Args:
        features: (n, d) float32 rows of length 1, of this process's images.
        cameras: (n,) int64 of the same.
        gather: makes labels (N,) of all images from those of each process.
        count: N.
        options, loose, threshold, progress: as there.
        graph_eps: as there; the lists are those of this process's images.
    """
    found = sharded.cluster(
        features,
        k1=options.k1,
        k2=options.k2,
        eps=options.eps,
        min_samples=options.min_samples,
        cameras=cameras.to(features.device),
        k1_own=options.k1_own,
        self_paced=options.self_paced,
        loose=loose,
        eps_gap=EPS_GAP,
        graph_eps=graph_eps,
        threshold=threshold,
        progress=progress,
    )
    clustered, likely = time.perf_counter(), None
    if graph_eps is not None:
        lists = sharded.graph_false_negatives(found.labels, found.graph)
        likely = FalseNegatives(*(part.cpu() for part in lists))
    stages = _stages(found.seconds)
    stages["jaccard"] += time.perf_counter() - clustered
    labels = gather(found.labels, count).cpu()
    larger = None if found.loose_labels is None else gather(found.loose_labels, count).cpu()
    return PseudoLabels(labels, larger, found.threshold, stages, likely)


def _stages(seconds: Mapping[str, float], apart: float = 0.0) -> dict[str, float]:
    """The times of a clustering as a run logs them, with those of what came after it."""
    left = dict(seconds)
    stages = {"neighbours": left.pop("neighbours"), "dbscan": left.pop("clusters") + apart}
    return {**stages, "jaccard": sum(left.values())}


def _apart(
    found: Clustering, tracklets: Tracklets, options: LabelOptions, threshold: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Labels, looser labels and threshold of a clustering, with those seen at once kept apart."""

    def at(eps: float) -> torch.Tensor:
        return constrained_dbscan(found.graph, tracklets.apart, eps, options.min_samples)

    labels, limit = at(options.eps), None
    larger = None if found.loose_labels is None else at(options.eps + EPS_GAP)
    if options.self_paced and larger is not None:
        labels, limit, *_ = self_paced_labels(labels, at(options.eps - EPS_GAP), larger, threshold)
    return labels, larger, limit
