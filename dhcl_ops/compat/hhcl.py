"""HHCL (Hu et al., 2021; bupt-ai-cz/HHCL-ReID).

``ClusterMemory`` is that of ``hhcl.models.cm`` in its modes ``"CM"`` and ``"CMhard"``; the other
names are SpCL's, under ``hhcl`` in place of ``spcl``.
"""

from __future__ import annotations

import torch
from torch import nn

from dhcl_ops.compat import _memory
from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, mean_ap, re_ranking

__all__ = ["ClusterMemory", "cmc", "compute_jaccard_distance", "mean_ap", "re_ranking"]

_MODES = ("CM", "CMhard")
_SHARE = 0.1  # of the smoothed targets, whatever smooth is


class ClusterMemory(nn.Module):
    """``ClusterMemory`` of HHCL: a row per cluster, with label smoothing.

    It is Cluster Contrast's, see :class:`dhcl_ops.compat.clustercontrast.ClusterMemory`, except
    that inputs are **not normalised**: HHCL's model gives them norm 1, and the bank moves towards
    them as they are. With ``smooth`` > 0, whatever its value, a tenth of the target goes to the
    K // 50 classes of largest logit, or to all classes where that is fewer than 2.

    Args:
        num_features: d.
        num_samples: K, the number of clusters.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1].
        mode: ``"CM"``, or ``"CMhard"`` to update each class with its least similar input. The two
            banks of ``"CMhybrid"`` and ``"CMhybrid_v2"`` are refused.
        hard_weight, num_instances: of those modes; kept, and not used.
        smooth: > 0 for smoothed targets.

    Attributes:
        features: (K, d) the bank; to be assigned, with rows of norm 1.

    Raises:
        ValueError: another mode.
    """

    features: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        mode: str = "CM",
        hard_weight: float = 0.5,
        smooth: float = 0.0,
        num_instances: int = 1,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(
                f"ClusterMemory: mode must be 'CM' or 'CMhard', which have one row per cluster; "
                f"the hybrid banks stay HHCL's own (got {mode!r})"
            )
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.cm_type = mode
        self.hard_weight = hard_weight
        self.smooth = smooth
        self.num_instances = num_instances
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.state = _memory.State()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            inputs: (B, d) float32, float16 or bfloat16, of norm 1.
            targets: (B,) signed integers, their clusters.

        Raises:
            TypeError, ValueError, IndexError: an argument or the bank of the wrong kind, dtype,
                shape, device or range.
        """
        return _memory.cluster_loss(
            "ClusterMemory",
            self,
            inputs,
            targets,
            hard=self.cm_type == "CMhard",
            normalise=False,
            smooth=_SHARE if self.smooth > 0 else 0.0,
        )
