"""fast-reid (He et al., 2020; JDAI-CV/fast-reid).

``evaluate_rank`` is that of ``fastreid.evaluation.rank``, ``re_ranking`` that of
``fastreid.evaluation.rerank`` and ``compute_jaccard_distance`` that of
``fastreid.utils.compute_dist``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops.compat import _jaccard, _ranking
from dhcl_ops.compat.torchreid import re_ranking

__all__ = ["compute_jaccard_distance", "evaluate_rank", "re_ranking"]


def compute_jaccard_distance(
    features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    search_option: int = 0,
    fp16: bool = False,
) -> np.ndarray[Any, Any]:
    """``compute_jaccard_distance`` of fast-reid: a dense (N, N) NumPy matrix.

    It is OpenUnReID's without a word printed; see
    :func:`dhcl_ops.compat.openunreid.compute_jaccard_distance`.
    """
    return _jaccard.distances("compute_jaccard_distance", features, k1, k2, fp16)


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[Any, ...]:
    """``evaluate_rank`` of fast-reid: torchreid's, with the scores of each query.

    See :func:`dhcl_ops.compat.torchreid.evaluate_rank`.

    Returns:
        CMC (max_rank,) float32, and average precision and inverse negative penalty, float64, of
        each query that has a right match; for CUHK03 CMC and mAP, as in fast-reid.
    """
    ids, cameras = (q_pids, g_pids), (q_camids, g_camids)
    ranked = _ranking.evaluate_rank(
        "evaluate_rank", distmat, ids, cameras, max_rank, use_metric_cuhk03
    )
    if use_metric_cuhk03:
        return ranked.cmc, ranked.mean_ap
    return ranked.cmc, ranked.average_precision, ranked.inverse_negative_penalty
