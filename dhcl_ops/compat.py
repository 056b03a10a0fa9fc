"""Functions under the names and signatures that re-identification code imports today.

Change the import, keep the script. Numbers are the originals' up to rounding; what differs is said
in each docstring.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from dhcl_ops import _checks, ranking
from dhcl_ops.contrastive import debiased_contrastive_loss
from dhcl_ops.defaults import ZHONG
from dhcl_ops.jaccard import jaccard_distance
from dhcl_ops.memory import least_similar, momentum_update_, prototypes
from dhcl_ops.reranking import rerank_distances

__all__ = [
    "ClusterMemory",
    "HybridMemory",
    "compute_jaccard_distance",
    "evaluate_rank",
    "re_ranking",
]


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


_LOG_EPSILON = math.log(1e-6)


class _UpdateInBackward(torch.autograd.Function):
    """The identity, whose backward moves the bank's rows towards the features that went through."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        indices: torch.Tensor,
        bank: torch.Tensor,
        momentum: float,
        hard: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(features, indices)
        # Not saved: it is meant to change between forward and backward.
        ctx.bank, ctx.momentum, ctx.hard = bank, momentum, hard
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        features, indices = ctx.saved_tensors
        with torch.no_grad():
            if ctx.hard:
                chosen = least_similar(features, indices, ctx.bank)
                # Features that are not finite are left out, without waiting for the device.
                features = torch.where(chosen[:, None], features, math.nan)
            momentum_update_(ctx.bank, features, indices, ctx.momentum)
        return grad, None, None, None, None


def _check_memory(
    op: str,
    inputs: torch.Tensor,
    bank: torch.Tensor,
    momentum: float,
    name: str,
    numbers: torch.Tensor,
) -> None:
    """Refuse before the loss what the update in backward would refuse."""
    _checks.tensor(op, "inputs", inputs)
    _checks.tensor(op, name, numbers)
    _checks.rank(op, "inputs", inputs, 2)
    _checks.dtype(op, "inputs", inputs, _checks.FLOATS)
    _checks.rank(op, "features", bank, 2)
    _checks.dtype(op, "features", bank, _checks.FLOATS)
    _checks.shape(op, "inputs", inputs, (len(inputs), bank.shape[1]), "as wide as the bank")
    _checks.dtype(op, name, numbers, (torch.int64,))
    _checks.shape(op, name, numbers, (len(inputs),), "one per input")
    _checks.same_device(op, features=bank, inputs=inputs, **{name: numbers})
    if bank.requires_grad or not bank.is_contiguous():
        got = "one that requires a gradient" if bank.requires_grad else f"strides {bank.stride()}"
        raise ValueError(
            f"{op}: features are changed in place and must be contiguous, without a gradient "
            f"(got {got})"
        )
    _checks.indices_in_range(op, name, numbers, len(bank))
    _checks.number(op, "momentum", momentum, 0.0, 1.0, rule="in [0, 1]")


class HybridMemory(nn.Module):
    """``HybridMemory`` of SpCL (Ge et al., NeurIPS 2020): its bank and its unified loss.

    ``memory(inputs, indexes)`` returns the mean over the batch of ``-log(p + 1e-6)``, where p is
    the softmax, over all classes in ``labels``, of ``f . c / temp`` at the row's class, and c the
    mean of the class's bank rows, not normalised. SpCL's two epsilons, this one and another 1e-6 in
    the softmax's denominator, are kept; the first bounds the loss at 13.8.

    **Backward moves the bank**: rows ``indexes`` towards ``inputs``, one after another in batch
    order, with the share ``momentum`` of the old row, each normalised again. A forward whose
    backward is never called changes nothing.

    What differs from SpCL's:

    - After several forwards and one backward (SpCL's domain adaptation) the gradients belong to the
      bank that the logits were made with; in SpCL all but one use the bank as already moved.
    - Nothing overflows at small temperatures, where SpCL's exponentials do below about 0.012.
    - Half-precision inputs are taken, and autocast changes nothing: sums and loss are
      float32. It can be differentiated once; a second time raises. ``torch.compile`` runs it
      eagerly.
    - An update whose mixed row is zero or not finite is left out instead of written as NaN.

    Args:
        num_features: d.
        num_samples: N.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1].

    Attributes:
        features: (N, d) the bank; to be assigned, with rows of norm 1.
        labels: (N,) int64, >= 0; to be assigned. Un-clustered images have numbers of their own, and
            numbers without images are allowed.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, num_features: int, num_samples: int, temp: float = 0.05, momentum: float = 0.2
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            inputs: (B, d) float32, float16 or bfloat16, of norm 1.
            indexes: (B,) int64, their rows in the bank.

        Raises:
            TypeError, ValueError, IndexError: an argument or a buffer of the wrong kind, dtype,
                shape, device or range.
        """
        op = "HybridMemory"
        bank, labels = self.features, self.labels
        _check_memory(op, inputs, bank, self.momentum, "indexes", indexes)
        _checks.shape(op, "labels", labels, (len(bank),), "one per row of features")
        _checks.same_device(op, features=bank, labels=labels)
        labels = labels.long()
        lowest, highest = (int(x) for x in torch.aminmax(labels))
        if lowest < 0:
            raise ValueError(
                f"{op}: labels must be >= 0, an un-clustered image having a number of its own "
                f"(got {lowest})"
            )
        classes = prototypes(bank, labels, highest + 1)
        # A number without images is no class: in the group that every row leaves out.
        missing = torch.zeros(highest + 1, dtype=torch.int64, device=labels.device)
        missing[labels] = -1
        targets = labels[indexes]
        inputs = _UpdateInBackward.apply(inputs, indexes, bank, self.momentum, False)
        losses = debiased_contrastive_loss(
            inputs,
            classes,
            targets,
            temperature=self.temp,
            exclude=(torch.zeros_like(indexes), missing),
            reduction="none",
        )
        # p = e^r / (S + 1e-6), S = e^(r + loss), and then -log(p + 1e-6); r is the positive logit.
        positive = (inputs.float() * classes[targets].float()).sum(1) / self.temp
        losses = torch.logaddexp(losses, _LOG_EPSILON - positive)
        return -torch.logaddexp(-losses, losses.new_tensor(_LOG_EPSILON)).mean()


class ClusterMemory(nn.Module):
    """``ClusterMemory`` of Cluster Contrast (Dai et al., ACCV 2022): a row per cluster.

    ``memory(inputs, targets)`` normalises the inputs and returns their mean cross-entropy over
    ``f . c / temp``, c the rows of the bank. **Backward moves the bank**: the rows ``targets``
    towards the normalised inputs, one after another in batch order, or with ``use_hard`` each class
    once, towards the input that is least similar to its row (the first of equals). A forward whose
    backward is never called changes nothing.

    What differs from Cluster Contrast's: inputs are moved to the bank's device, which need not be
    a GPU; after several forwards and one backward the gradients belong to the bank that the logits
    were made with; normalisation, sums and loss are float32 for half-precision inputs and under
    autocast; a second derivative raises; an update whose mixed row is zero or not finite is left
    out; two inputs of one class whose similarities are equal to rounding may swap places in the
    choice of ``use_hard``; ``torch.compile`` runs it eagerly.

    Args:
        num_features: d.
        num_samples: K, the number of clusters.
        temp: temperature, > 0.
        momentum: share of the old row, in [0, 1].
        use_hard: update with the least similar input only.

    Attributes:
        features: (K, d) the bank; to be assigned, with rows of norm 1.
    """

    features: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.use_hard = use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss () of a batch.

        Args:
            inputs: (B, d) float32, float16 or bfloat16.
            targets: (B,) int64, their clusters.

        Raises:
            TypeError, ValueError, IndexError: an argument or the bank of the wrong kind, dtype,
                shape, device or range.
        """
        op = "ClusterMemory"
        _checks.tensor(op, "inputs", inputs)
        bank = self.features
        inputs = inputs.to(bank.device)
        _check_memory(op, inputs, bank, self.momentum, "targets", targets)
        inputs = nn.functional.normalize(inputs.float(), dim=1)
        inputs = _UpdateInBackward.apply(inputs, targets, bank, self.momentum, self.use_hard)
        loss: torch.Tensor = debiased_contrastive_loss(inputs, bank, targets, temperature=self.temp)
        return loss


# ---- torchreid, fast-reid and what derives from them --------------------------------------------


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
