"""SpCL (Ge et al., NeurIPS 2020; yxgeee/SpCL).

``HybridMemory`` is that of ``spcl.models.hm``, ``compute_jaccard_distance`` that of
``spcl.utils.faiss_rerank``, ``re_ranking`` that of ``spcl.utils.rerank``, and ``cmc`` and
``mean_ap``, open-reid's, those of ``spcl.evaluation_metrics``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dhcl_ops.compat import _jaccard, _memory
from dhcl_ops.compat.openreid import cmc, mean_ap
from dhcl_ops.compat.torchreid import re_ranking

__all__ = ["HybridMemory", "cmc", "compute_jaccard_distance", "mean_ap", "re_ranking"]


def compute_jaccard_distance(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 0,
    use_float16: bool = False,
) -> np.ndarray[Any, Any]:
    """``compute_jaccard_distance`` of SpCL's ``faiss_rerank``: a dense (N, N) NumPy matrix.

    It differs from SpCL's in three ways: ``search_option`` is ignored, since one exact search
    replaces faiss's several; exact ties between neighbours go to the lower index, and a row comes
    first in its own list; with ``use_float16`` only the result is float16, not the sums. Features
    must have norm 1, which SpCL assumes without looking.

    The dense matrix takes 4 N^2 bytes. :func:`dhcl_ops.cluster` replaces this call and DBSCAN
    together and never makes it.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`dhcl_ops.jaccard_distance`.
    """
    said = "Computing jaccard distance...", "Jaccard distance computing time cost"
    with _jaccard.timed(print_flag, *said):
        return _jaccard.unit_distances(
            "compute_jaccard_distance", target_features, k1, k2, use_float16
        )


class HybridMemory(nn.Module):
    """``HybridMemory`` of SpCL (Ge et al., NeurIPS 2020): its bank and its unified loss.

    ``memory(inputs, indexes)`` returns the mean over the batch of ``-log(p + 1e-6)``, where p is
    the softmax, over all classes in ``labels``, of ``f . c / temp`` at the row's class, and c the
    mean of the class's bank rows, not normalised. SpCL's two epsilons, this one and another 1e-6 in
    the softmax's denominator, are kept; the first bounds the loss at 13.8.

    **Backward moves the bank**: rows ``indexes`` towards ``inputs``, one after another in batch
    order, with the share ``momentum`` of the old row, each normalised again. A forward whose
    backward is never called changes nothing.

    What differs from SpCL's:

    - After several forwards and one backward (SpCL's domain adaptation) the gradients belong to the
      bank that the logits were made with; in SpCL all but one use the bank as already moved.
    - Nothing overflows at small temperatures, where SpCL's exponentials do below about 0.012.
    - Half-precision inputs are taken, and autocast changes nothing: sums and loss are
      float32. It can be differentiated once; a second time raises. ``torch.compile`` runs it
      eagerly.
    - An update whose mixed row is zero or not finite is left out instead of written as NaN. On the
      CPU inputs that are not finite, and indexes and labels out of range, are refused.

    Args:
        num_features: d.
        num_samples: N.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1]; a number or a tensor of one element.

    Attributes:
        features: (N, d) the bank; to be assigned, with rows of norm 1.
        labels: (N,) integers >= 0; to be assigned. Un-clustered images have numbers of their own,
            and numbers without images are allowed.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, num_features: int, num_samples: int, temp: float = 0.05, momentum: float = 0.2
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))
        self.state = _memory.State()

    def forward(self, inputs: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            inputs: (B, d) float32, float16 or bfloat16, of norm 1.
            indexes: (B,) signed integers, their rows in the bank.

        Raises:
            TypeError, ValueError, IndexError: an argument or a buffer of the wrong kind, dtype,
                shape, device or range.
        """
        return _memory.hybrid_loss("HybridMemory", self, inputs, indexes)
