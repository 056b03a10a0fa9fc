"""CAP (Wang et al., AAAI 2021; Terminator8758/CAP-master), whose package is ``reid``.

``faiss_compute_jaccard_dist`` is that of ``reid.utils.faiss_rerank``, ``cmc`` and ``mean_ap`` those
of ``reid.utils.evaluation_metrics.ranking``. The memory of camera proxies stays CAP's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops import ranking
from dhcl_ops.compat import _jaccard
from dhcl_ops.compat.openreid import cmc, evaluated

__all__ = ["cmc", "faiss_compute_jaccard_dist", "mean_ap"]


def faiss_compute_jaccard_dist(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 3,
    use_float16: bool = False,
) -> np.ndarray[Any, Any]:
    """``faiss_compute_jaccard_dist`` of CAP: a dense (N, N) NumPy matrix.

    It is :func:`dhcl_ops.compat.spcl.compute_jaccard_distance` under another name; neither needs
    faiss.
    """
    said = "Computing jaccard distance...", "Jaccard distance computing time cost"
    with _jaccard.timed(print_flag, *said):
        return _jaccard.unit_distances(
            "faiss_compute_jaccard_dist", target_features, k1, k2, use_float16
        )


def mean_ap(
    distmat: Any,
    query_ids: Any = None,
    gallery_ids: Any = None,
    query_cams: Any = None,
    gallery_cams: Any = None,
) -> float:
    """``mean_ap`` of CAP: the mean area under the precision-recall curve, by trapezoids.

    That is the average precision of scikit-learn before 0.19, a few points from
    :func:`dhcl_ops.compat.openreid.mean_ap`, whose arguments these are.
    """
    ids, cameras = (query_ids, gallery_ids), (query_cams, gallery_cams)
    return evaluated("mean_ap", distmat, ids, cameras, ranking.Settings(ap="trapezoid")).mAP
