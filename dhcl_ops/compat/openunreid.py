"""OpenUnReID (Ge et al., 2020; open-mmlab/OpenUnReID).

``HybridMemory`` is that of ``openunreid.models.losses``, ``compute_jaccard_distance`` that of
``openunreid.core.utils.compute_dist``, ``re_ranking_cpu`` that of ``openunreid.core.utils.rerank``
and ``evaluate_rank`` that of ``openunreid.core.metrics.rank``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dhcl_ops import _checks
from dhcl_ops.compat import _jaccard, _memory, _ranking
from dhcl_ops.compat.torchreid import re_ranked
from dhcl_ops.defaults import ZHONG

__all__ = ["HybridMemory", "compute_jaccard_distance", "evaluate_rank", "re_ranking_cpu"]


def compute_jaccard_distance(
    features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    search_option: int = 0,
    fp16: bool = False,
    verbose: bool = True,
) -> np.ndarray[Any, Any]:
    """``compute_jaccard_distance`` of OpenUnReID: a dense (N, N) NumPy matrix.

    Features (N, d) may have any length; distances between them are Euclidean. ``search_option`` is
    ignored, exact ties between neighbours go to the lower index, a row comes first in its own list,
    and with ``fp16`` only the result is float16, not the sums.

    Raises:
        TypeError, ValueError, MemoryError: as :func:`dhcl_ops.jaccard_distance`.
    """
    said = "Computing jaccard distance...", "Jaccard distance computing time cost"
    with _jaccard.timed(verbose, *said):
        return _jaccard.distances("compute_jaccard_distance", features, k1, k2, fp16)


def re_ranking_cpu(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
) -> np.ndarray[Any, Any]:
    """``re_ranking_cpu`` of OpenUnReID: :func:`dhcl_ops.compat.torchreid.re_ranking`."""
    return re_ranked("re_ranking_cpu", q_g_dist, q_q_dist, g_g_dist, k1, k2, lambda_value)


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
    cmc_topk: Sequence[int] = (1, 5, 10),
    verbose: bool = True,
) -> tuple[np.ndarray[Any, Any], float]:
    """``evaluate_rank`` of OpenUnReID: torchreid's, and with ``verbose`` it prints the scores.

    See :func:`dhcl_ops.compat.torchreid.evaluate_rank`. Of ``cmc_topk`` those past the CMC's end
    are not printed.

    Returns:
        CMC (max_rank,) float32 and mAP.
    """
    ids, cameras = (q_pids, g_pids), (q_camids, g_camids)
    ranked = _ranking.evaluate_rank(
        "evaluate_rank", distmat, ids, cameras, max_rank, use_metric_cuhk03
    )
    if verbose:
        print(f"\n\nMean AP: {ranked.mean_ap:4.1%}\nCMC Scores:")
        for k in cmc_topk:
            if k <= len(ranked.cmc):
                print(f"  top-{k:<4}{ranked.cmc[k - 1]:12.1%}")
    return ranked.cmc, ranked.mean_ap


class HybridMemory(nn.Module):
    """``HybridMemory`` of OpenUnReID: SpCL's, for a dictionary of results and several processes.

    ``memory(results, indexes)`` normalises ``results["feat"]`` and returns what
    :class:`dhcl_ops.compat.spcl.HybridMemory` returns for it; what differs from the original is
    said there. With ``torch.distributed`` initialised, backward moves the rows of all processes,
    in the order of their ranks, so that every process keeps the same bank. Batches must then be
    equally large, and forward is called by all processes.

    Args:
        num_features: d.
        num_memory: N.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1].

    Attributes:
        features: (N, d) the bank.
        labels: (N,) integers >= 0.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, num_features: int, num_memory: int, temp: float = 0.05, momentum: float = 0.2
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_memory = num_memory
        self.momentum = momentum
        self.temp = temp
        self.register_buffer("features", torch.zeros(num_memory, num_features))
        self.register_buffer("labels", torch.zeros(num_memory, dtype=torch.int64))
        self.state = _memory.State()

    @torch.no_grad()
    def _update_feature(self, features: torch.Tensor) -> None:
        """Fill the bank with features (N, d), normalised."""
        unit = nn.functional.normalize(features.float(), dim=1)
        self.features.copy_(unit.to(self.features.device))

    @torch.no_grad()
    def _update_label(self, labels: torch.Tensor) -> None:
        """Take labels (N,)."""
        self.labels.copy_(labels.long().to(self.labels.device))

    def forward(self, results: Mapping[str, torch.Tensor], indexes: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            results: with ``"feat"``, (B, d) float32, float16 or bfloat16.
            indexes: (B,) signed integers, their rows in the bank.

        Raises:
            TypeError, ValueError, IndexError: an argument or a buffer of the wrong kind, dtype,
                shape, device or range.
        """
        op = "HybridMemory"
        if not isinstance(results, Mapping) or "feat" not in results:
            got = list(results) if isinstance(results, Mapping) else type(results).__name__
            raise TypeError(f"{op}: results must be a dictionary with 'feat' (got {got})")
        inputs = results["feat"]
        _checks.tensor(op, "results['feat']", inputs)
        _checks.dtype(op, "results['feat']", inputs, _checks.FLOATS)
        inputs = nn.functional.normalize(inputs.float(), dim=1)
        everyone = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _memory.check(op, self, inputs, "indexes", indexes)
            everyone = _of_all_processes(inputs.detach()), _of_all_processes(indexes.long())
        return _memory.hybrid_loss(op, self, inputs, indexes, everyone)


def _of_all_processes(own: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, which are equally large, one after another."""
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.contiguous())
    return torch.cat(parts)
