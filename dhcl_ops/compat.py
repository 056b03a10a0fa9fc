"""Functions under the names and signatures that re-identification code imports today.

Change the import, keep the script. Numbers are the originals' up to rounding; what differs is said
in each docstring.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from dhcl_ops import ranking
from dhcl_ops.jaccard import jaccard_distance
from dhcl_ops.reranking import rerank_distances

__all__ = ["compute_jaccard_distance", "evaluate_rank", "re_ranking"]


# ---- SpCL, Cluster Contrast and what derives from them ------------------------------------------


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
    """
    start = time.time()
    if print_flag:
        print("Computing jaccard distance...")
    distances = jaccard_distance(torch.as_tensor(target_features), k1, k2).numpy(force=True)
    if use_float16:
        distances = distances.astype(np.float16)
    if print_flag:
        print(f"Jaccard distance computing time cost: {time.time() - start}")
    return distances


# ---- torchreid, fast-reid and what derives from them --------------------------------------------


def re_ranking(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray[Any, Any]:
    """``re_ranking`` of torchreid and fast-reid: the re-ranked (Q, G) distances as a NumPy array.

    As there the distances given are squared inside. Exact ties between neighbours go to the lower
    index, and a row comes first in its own list.
    """
    q_g, q_q, g_g = (torch.as_tensor(matrix) for matrix in (q_g_dist, q_q_dist, g_g_dist))
    distances: torch.Tensor = rerank_distances(q_g, q_q, g_g, k1, k2, lambda_value)
    return distances.numpy(force=True)


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
