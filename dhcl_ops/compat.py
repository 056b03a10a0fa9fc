"""Functions under the names and signatures that re-identification code imports today.

Change the import, keep the script. Numbers are the originals' up to rounding; what differs is said
in each docstring.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from dhcl_ops.jaccard import jaccard_distance
from dhcl_ops.reranking import rerank_distances

__all__ = ["compute_jaccard_distance", "re_ranking"]


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
