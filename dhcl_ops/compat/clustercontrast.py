"""Cluster Contrast (Dai et al., ACCV 2022; alibaba/cluster-contrast-reid).

``ClusterMemory`` is that of ``clustercontrast.models.cm``. The other names are SpCL's, under
``clustercontrast`` in place of ``spcl``.
"""

from __future__ import annotations

import torch
from torch import nn

from dhcl_ops.compat import _memory
from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, mean_ap, re_ranking

__all__ = ["ClusterMemory", "cmc", "compute_jaccard_distance", "mean_ap", "re_ranking"]


class ClusterMemory(nn.Module):
    """``ClusterMemory`` of Cluster Contrast (Dai et al., ACCV 2022): a row per cluster.

    ``memory(inputs, targets)`` normalises the inputs and returns their mean cross-entropy over
    ``f . c / temp``, c the rows of the bank. **Backward moves the bank**: the rows ``targets``
    towards the normalised inputs, one after another in batch order, or with ``use_hard`` each class
    once, towards the input that is least similar to its row (the first of equals). A forward whose
    backward is never called changes nothing.

    What differs from Cluster Contrast's: inputs are moved to the bank's device, which need not be
    a GPU; after several forwards and one backward the gradients belong to the bank that the logits
    were made with; normalisation, sums and loss are float32 for half-precision inputs and under
    autocast; a second derivative raises; an update whose mixed row is zero or not finite is left
    out; on the CPU inputs that are not finite and targets out of range, -100 too, are refused; two
    inputs of one class whose similarities are equal to rounding may swap places in the choice of
    ``use_hard``; ``torch.compile`` runs it eagerly.

    Args:
        num_features: d.
        num_samples: K, the number of clusters.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1]; a number or a tensor of one element.
        use_hard: update with the least similar input only.

    Attributes:
        features: (K, d) the bank; to be assigned, with rows of norm 1.
    """

    features: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.use_hard = use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.state = _memory.State()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            inputs: (B, d) float32, float16 or bfloat16.
            targets: (B,) signed integers, their clusters.

        Raises:
            TypeError, ValueError, IndexError: an argument or the bank of the wrong kind, dtype,
                shape, device or range.
        """
        inputs = _memory.beside_bank(self, inputs)
        return _memory.cluster_loss("ClusterMemory", self, inputs, targets, hard=self.use_hard)
