"""torchreid (Zhou and Xiang, 2019): ``evaluate_rank`` and ``re_ranking``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops import ranking
from dhcl_ops.defaults import ZHONG
from dhcl_ops.reranking import rerank_distances

__all__ = ["evaluate_rank", "re_ranking"]


def re_ranking(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
) -> np.ndarray[Any, Any]:
    """``re_ranking`` of torchreid and fast-reid: the re-ranked (Q, G) distances as a NumPy array.

    As there the distances given are squared inside. Exact ties between neighbours go to the lower
    index, and a row comes first in its own list.
    """
    q_g, q_q, g_g = (torch.as_tensor(matrix) for matrix in (q_g_dist, q_q_dist, g_g_dist))
    distances: torch.Tensor = rerank_distances(q_g, q_q, g_g, k1, k2, lambda_value)
    return distances.numpy(force=True)


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[Any, float]:
    """Evaluate CMC and mAP like ``torchreid.metrics.evaluate_rank``.

    As there, identity -1 is an identity like any other, ``max_rank`` shrinks to the gallery's size,
    and CUHK03's draws come from NumPy's global random state, in the same order. Entries of equal
    distance are ranked by index, where torchreid leaves their order open.

    Args:
        distmat: (Q, G) float array.
        q_pids, g_pids: (Q,) and (G,) integer identities.
        q_camids, g_camids: (Q,) and (G,) integer cameras.
        max_rank: length of the CMC.
        use_metric_cuhk03: CUHK03's single-gallery-shot CMC.
        use_cython: ignored; there is one implementation.

    Returns:
        CMC (max_rank,) float32 and mAP.

    Raises:
        TypeError, ValueError: see :func:`dhcl_ops.evaluate_ranking`.
    """
    distmat = np.asarray(distmat)
    if distmat.ndim == 2 and distmat.shape[1] < max_rank:
        max_rank = distmat.shape[1]
        print(f"Note: number of gallery samples is quite small, got {max_rank}")
    settings = ranking.Settings(
        protocol="cuhk03" if use_metric_cuhk03 else "market", max_rank=max_rank, junk_id=None
    )
    identities = map(np.asarray, (q_pids, g_pids, q_camids, g_camids))
    result = ranking.evaluate_with_draws(
        distmat, ranking.Identities(*identities), settings, np.random.randint
    )
    return np.asarray(result.cmc).astype(np.float32), result.mAP
