"""TransReID (He et al., ICCV 2021; damo-cv/TransReID) and the codes derived from it.

``re_ranking`` is that of ``utils.reranking``, which takes features; ``eval_func`` that of
``utils.metrics``. CLIP-ReID, CDTrans and many others carry the same two files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhcl_ops import _checks
from dhcl_ops.compat import _calls, _jaccard, _ranking
from dhcl_ops.reranking import rerank, rerank_distances

__all__ = ["eval_func", "re_ranking"]


@torch.no_grad()
def re_ranking(
    probFea: torch.Tensor,
    galFea: torch.Tensor,
    k1: int,
    k2: int,
    lambda_value: float,
    local_distmat: Any = None,
    only_local: bool = False,
) -> np.ndarray[Any, Any]:
    """``re_ranking`` of TransReID: the re-ranked (Q, G) distances from features, a NumPy array.

    Squared Euclidean distances are divided by the largest of their row and not squared again. The
    Jaccard distances are float32, where TransReID rounds them, their weights and their sums to
    float16: results agree to about 2e-3. Exact ties between neighbours go to the lower index, and a
    row comes first in its own list.

    With rows of norm 1 and no local distances, no matrix over all images exists.

    Args:
        probFea: (Q, d) query features of any length.
        galFea: (G, d) gallery features.
        k1, k2, lambda_value: as in :func:`dhcl_ops.rerank`.
        local_distmat: (Q + G, Q + G) distances >= 0 that are added to the squared ones.
        only_local: take ``local_distmat`` alone; of the features only the numbers count.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`dhcl_ops.rerank`.
    """
    op = "re_ranking"
    names = {"query": "probFea", "gallery": "galFea"}
    query, gallery = (
        _jaccard.checked(op, name, value)
        for name, value in (("probFea", probFea), ("galFea", galFea))
    )
    _checks.shape(op, "galFea", gallery, (len(gallery), query.shape[1]), "as wide as probFea")
    if local_distmat is None and _jaccard.are_unit(query) and _jaccard.are_unit(gallery):
        with _calls.as_called(op, "rerank", **names):
            result: torch.Tensor = rerank(query, gallery, k1, k2, lambda_value)
        return result.numpy(force=True)
    split, total = len(query), len(query) + len(gallery)
    whole = torch.zeros(total, total, device=query.device)
    if not only_local:
        rows = torch.cat([query, gallery])
        whole = _jaccard.squares(rows, rows)
    if local_distmat is not None or only_local:
        local = _calls.tensor(op, "local_distmat", local_distmat).to(whole)
        _checks.shape(op, "local_distmat", local, (total, total), "one row and column per image")
        whole += local
    # The op squares what it is given.
    whole = whole.clamp_(min=0.0).sqrt_()
    parts = whole[:split, split:], whole[:split, :split], whole[split:, split:]
    with _calls.as_called(op, "rerank_distances"):
        result = rerank_distances(*parts, k1, k2, lambda_value)
    return result.numpy(force=True)


def eval_func(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int = 50
) -> tuple[np.ndarray[Any, Any], float]:
    """``eval_func`` of TransReID: CMC (max_rank,) float32 and mAP.

    See :func:`dhcl_ops.compat.torchreid.evaluate_rank`.
    """
    ids, cameras = (q_pids, g_pids), (q_camids, g_camids)
    ranked = _ranking.evaluate_rank("eval_func", distmat, ids, cameras, max_rank)
    return ranked.cmc, ranked.mean_ap
