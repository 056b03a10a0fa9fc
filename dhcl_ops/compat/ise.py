"""ISE (Zhang et al., CVPR 2022; zhangxinyu-xyz/ISE-ReID), whose package is ``clustercontrast``.

``ClusterMemory`` is that of its ``clustercontrast.models.cm``; the other names are SpCL's. The
trainer that generates support samples, and its loss, read ``memory.features`` and stay as they are.
"""

from __future__ import annotations

import torch

from dhcl_ops.compat import _memory, clustercontrast
from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, mean_ap, re_ranking

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
