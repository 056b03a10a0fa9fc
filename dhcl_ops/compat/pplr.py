"""PPLR (Cho et al., CVPR 2022; yoonkicho/PPLR).

``compute_jaccard_distance`` and ``compute_ranked_list`` are those of ``pplr.utils.faiss_rerank``;
the other names are SpCL's, under ``pplr`` in place of ``spcl``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops import _checks
from dhcl_ops.compat import _jaccard
from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, mean_ap, re_ranking

__all__ = ["cmc", "compute_jaccard_distance", "compute_ranked_list", "mean_ap", "re_ranking"]


@torch.no_grad()
def compute_ranked_list(
    features: torch.Tensor,
    k: int = 20,
    search_option: int = 0,
    fp16: bool = False,
    verbose: bool = True,
) -> np.ndarray[Any, Any]:
    """``compute_ranked_list`` of PPLR: the k nearest other rows of each, a (N, k) int64 array.

    Features (N, d) may have any length; distances are Euclidean. ``search_option`` and ``fp16`` are
    ignored; ties go to the lower index. The row itself is left out, where PPLR leaves out the
    first of the list, another row if two are equal. Fewer than k columns come back where N <= k.

    Raises:
        TypeError, ValueError: features that are not (N, d) or not finite; k < 1.
    """
    op = "compute_ranked_list"
    with _jaccard.timed(verbose, "Computing ranked list...", "Ranked list computing time cost"):
        rows = _jaccard.checked(op, "features", features)
        width = min(_checks.integer(op, "k", k, 1) + 1, len(rows))
        return _jaccard.nearest(rows, width)[:, 1:].numpy(force=True)
