"""Functions by the names and signatures of the packages people use today.

A script runs with one import changed and gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dhcl_ops import ranking

__all__ = ["evaluate_rank"]


# ---- ranking: torchreid.metrics.evaluate_rank ---------------------------------------------------


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
    result = ranking._evaluate(
        distmat,
        (np.asarray(q_pids), np.asarray(g_pids), np.asarray(q_camids), np.asarray(g_camids)),
        metric="euclidean",
        protocol="cuhk03" if use_metric_cuhk03 else "market",
        ap="hits",
        max_rank=max_rank,
        junk_id=None,
        repeats=10,
        per_query=False,
        progress=None,
        randint=np.random.randint,
    )
    return np.asarray(result.cmc).astype(np.float32), result.mAP
