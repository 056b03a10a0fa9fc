"""torchreid (Zhou and Xiang, 2019; KaiyangZhou/deep-person-reid).

``evaluate_rank`` is that of ``torchreid.metrics``, ``re_ranking`` that of ``torchreid.utils``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops.compat import _calls, _ranking
from dhcl_ops.defaults import ZHONG
from dhcl_ops.reranking import rerank_distances

__all__ = ["evaluate_rank", "re_ranking"]


def re_ranked(
    op: str, q_g: Any, q_q: Any, g_g: Any, k1: int, k2: int, lambda_value: float
) -> np.ndarray[Any, Any]:
    """What ``re_ranking`` and its relatives, called ``op``, compute from three matrices."""
    names = {"q_g": "q_g_dist", "q_q": "q_q_dist", "g_g": "g_g_dist"}
    given = zip(names.values(), (q_g, q_q, g_g), strict=True)
    q_g, q_q, g_g = (_calls.tensor(op, name, value) for name, value in given)
    with _calls.as_called(op, "rerank_distances", **names):
        distances: torch.Tensor = rerank_distances(q_g, q_q, g_g, k1, k2, lambda_value)
    return distances.numpy(force=True)


def re_ranking(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
) -> np.ndarray[Any, Any]:
    """``re_ranking`` of torchreid and many others: the re-ranked (Q, G) distances, a NumPy array.

    As there the distances given, floating-point arrays or tensors with any strides, are squared
    inside. Exact ties between neighbours go to the lower index, and a row comes first in its own
    list.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`dhcl_ops.rerank_distances`.
    """
    return re_ranked("re_ranking", q_g_dist, q_q_dist, g_g_dist, k1, k2, lambda_value)


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[np.ndarray[Any, Any], float]:
    """Evaluate CMC and mAP like ``torchreid.metrics.evaluate_rank``.

    As there, identity -1 is an identity like any other, and CUHK03's draws come from NumPy's global
    random state, in the same order. ``max_rank`` shrinks to the gallery's size, for CUHK03 to the
    number of its identities, and to the entries that are left if these are equally few for all
    queries. Entries of equal distance are ranked by index, where torchreid leaves their order open.

    Args:
        distmat: (Q, G) float array or tensor.
        q_pids, g_pids: (Q,) and (G,) identities.
        q_camids, g_camids: (Q,) and (G,) cameras.
        max_rank: length of the CMC.
        use_metric_cuhk03: CUHK03's single-gallery-shot CMC.
        use_cython: ignored; there is one implementation, whose results are those of torchreid's
            Python code.

    Returns:
        CMC (max_rank,) float32 and mAP.

    Raises:
        TypeError, ValueError: see :func:`dhcl_ops.evaluate_ranking`.
    """
    ids, cameras = (q_pids, g_pids), (q_camids, g_camids)
    ranked = _ranking.evaluate_rank(
        "evaluate_rank", distmat, ids, cameras, max_rank, use_metric_cuhk03
    )
    return ranked.cmc, ranked.mean_ap
