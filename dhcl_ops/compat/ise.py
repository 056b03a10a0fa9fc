"""ISE (Zhang et al., CVPR 2022; zhangxinyu-xyz/ISE-ReID), whose package is ``clustercontrast``.

``ClusterMemory`` is that of its ``clustercontrast.models.cm``, ``mean_ap`` that of its
``clustercontrast.evaluation_metrics``; the other names are SpCL's. The trainer that generates
support samples reads ``memory.features`` and stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from dhcl_ops import ranking
from dhcl_ops.compat import _memory, clustercontrast
from dhcl_ops.compat.openreid import evaluated
from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, re_ranking

__all__ = ["ClusterMemory", "cmc", "compute_jaccard_distance", "mean_ap", "re_ranking"]


class ClusterMemory(clustercontrast.ClusterMemory):
    """``ClusterMemory`` of ISE: Cluster Contrast's, with the update named by ``sample_type``.

    See :class:`dhcl_ops.compat.clustercontrast.ClusterMemory` for what it computes and what
    differs.

    Args:
        num_features: d.
        num_samples: K, the number of clusters.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1].
        use_hard: kept, and not used, as in ISE.
        sample_type: ``"hard"``, the default, updates each class with its least similar input;
            anything else with every input.
    """

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
        sample_type: str = "hard",
    ) -> None:
        super().__init__(num_features, num_samples, temp, momentum, use_hard)
        self.sample_type = sample_type

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch: arguments and errors as in Cluster Contrast's."""
        inputs = _memory.beside_bank(self, inputs)
        hard = self.sample_type == "hard"
        return _memory.cluster_loss("ClusterMemory", self, inputs, targets, hard=hard)


def mean_ap(
    distmat: Any,
    query_ids: Any = None,
    gallery_ids: Any = None,
    query_cams: Any = None,
    gallery_cams: Any = None,
    draw_image: bool = False,
) -> float | list[float]:
    """``mean_ap`` of ISE: open-reid's, or with ``draw_image`` what it is the mean of.

    See :func:`dhcl_ops.compat.openreid.mean_ap`.

    Returns:
        The mean average precision; with ``draw_image`` a list of the average precision of each
        query that has a right match.
    """
    ids, cameras = (query_ids, gallery_ids), (query_cams, gallery_cams)
    settings = ranking.Settings(per_query=draw_image)
    result = evaluated("mean_ap", distmat, ids, cameras, settings)
    if result.average_precision is None:
        return result.mAP
    each = result.average_precision
    return [float(value) for value in each[~each.isnan()]]
