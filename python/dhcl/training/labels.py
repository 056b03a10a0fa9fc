"""Pseudo-labels of an epoch: which images are taken for one person.

Mathematics: method.md in docs, sections "k-reciprocal Jaccard distance" and "DBSCAN and the
self-paced choice".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dhcl.config import EPS_GAP, LabelOptions
from dhcl_ops import cluster

__all__ = ["PseudoLabels", "pseudo_labels"]


class PseudoLabels(NamedTuple):
    """What clustering says of N training images.

    Attributes:
        labels: (N,) int64 on the CPU, clusters from 0, -1 for outliers.
        loose: (N,) the same at a larger eps, or None where it was not asked for.
        threshold: limit of independence of the self-paced criterion, for the epochs to come.
        seconds: wall time by stage: neighbours, dbscan, and jaccard for all between them.
    """

    labels: torch.Tensor
    loose: torch.Tensor | None
    threshold: float | None
    seconds: dict[str, float]


def pseudo_labels(
    features: torch.Tensor,
    cameras: torch.Tensor,
    options: LabelOptions,
    *,
    loose: bool,
    threshold: float | None,
    progress: Callable[[str, int, int], None],
) -> PseudoLabels:
    """Cluster features by Jaccard distance and DBSCAN.

    Args:
        features: (N, d) float32 rows of length 1.
        cameras: (N,) int64, for ``k1_own`` neighbours of the own camera; not looked at without.
        options: how to cluster.
        loose: give labels at an eps that is larger by :data:`dhcl.config.EPS_GAP` too.
        threshold: of an earlier epoch's :class:`PseudoLabels`.
        progress: told stage, rows done and rows in all, again and again.
    """
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
        threshold=threshold,
        progress=progress,
    )
    seconds = dict(found.seconds)
    stages = {"neighbours": seconds.pop("neighbours"), "dbscan": seconds.pop("clusters")}
    stages["jaccard"] = sum(seconds.values())
    at_larger_eps = found.loose_labels.cpu() if loose else None
    return PseudoLabels(found.labels.cpu(), at_larger_eps, found.threshold, stages)
