"""The op of hard positives: of the bank rows of a feature's class, the least similar one.

:meth:`dhcl_ops.MemoryBank.hardest_positives` is what a user calls, and
:func:`dhcl_ops.hybrid_contrastive_loss` with ``instance_positives="hardest"`` or
``"cross-camera"``. Mathematics: method.md in docs, section "Loss". ``csrc/positives.h`` states
which row is chosen, to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dhcl_ops import _checks, _sums
from dhcl_ops._ops import define
from dhcl_ops.memory import class_csr

__all__ = ["hardest_positives"]


def _hardest_positive_reference(
    features: torch.Tensor,
    bank: torch.Tensor,
    indices: torch.Tensor,
    class_of: torch.Tensor,
    members: torch.Tensor,
    offsets: torch.Tensor,
    cameras: torch.Tensor | None,
) -> torch.Tensor:
    op = "hardest_positive"
    _checks.indices_in_range(op, "indices", indices, len(bank))
    classes = class_of[indices]
    _checks.indices_in_range(op, "class_of", classes, len(offsets) - 1)
    rows = indices.clone()
    for b, (begin, end) in enumerate(
        zip(offsets[classes].tolist(), offsets[classes + 1].tolist(), strict=True)
    ):
        candidates = members[begin:end]
        if cameras is not None:
            candidates = candidates[cameras[candidates] != cameras[indices[b]]]
        if len(candidates) == 0:
            continue
        similarities = _sums.sum_elements(features[b] * bank[candidates].float())
        similarities = similarities.masked_fill(similarities.isnan(), math.inf)
        place = similarities.argmin()
        found = similarities[place] < math.inf
        rows[b] = torch.where(found, candidates[place], rows[b])
    return rows


def _hardest_positive_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(7, 40, generator=generator).to(device)
    features = torch.randn(4, 40, generator=generator).to(device)
    class_of = torch.tensor([1, 0, 1, 2, 1, 0, 1], device=device)
    cameras = torch.tensor([0, 1, 0, 2, 1, 1, 2], device=device)
    indices = torch.tensor([0, 6, 1, 3], device=device)
    return (features, bank, indices, class_of, *class_csr(class_of, 3), cameras)


_hardest_positive = define(
    "hardest_positive(Tensor features, Tensor bank, Tensor indices, Tensor class_of, "
    "Tensor members, Tensor offsets, Tensor? cameras) -> Tensor",
    family="positives",
    reference=_hardest_positive_reference,
    fake=lambda features, bank, indices, class_of, members, offsets, cameras: indices.new_empty(
        indices.shape[0]
    ),
    sample=_hardest_positive_sample,
)


def hardest_positives(
    features: torch.Tensor,
    bank: torch.Tensor,
    indices: torch.Tensor,
    class_of: torch.Tensor,
    members: torch.Tensor,
    offsets: torch.Tensor,
    cameras: torch.Tensor | None = None,
    *,
    op: str = "hardest_positives",
) -> torch.Tensor:
    """Of the rows of each feature's class, the one that is least similar to it.

    Args:
        features: (B, d) float32, float16, bfloat16 or float64, taken as fp32; no gradient flows
            through.
        bank: (N, d) float32, float16 or bfloat16.
        indices: (B,) int64, the bank row of each feature, in [0, N).
        class_of: (N,) int64, the class of each row, in [0, K).
        members: (N,) int64, the rows by class, ascending in each; of class k those from
            ``offsets[k]`` up to ``offsets[k + 1]``.
        offsets: (K + 1,) int64.
        cameras: (N,) int64, of which camera each row is. Then only rows count that are of another
            camera than the feature's own row.
        op: the name that errors begin with.

    Returns:
        (B,) int64 rows of the bank. Similarities are fp32 inner products in a fixed order of
        summation, so it is the same row every time, on the CPU and on CUDA; of equal ones the
        lowest row. Where no row is left, or the similarities of all that are left are not finite,
        it is the feature's own.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        IndexError: an index out of range, on the CPU; on CUDA a device-side assert instead.
    """
    for name, value in (("features", features), ("bank", bank)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
    _checks.dtype(op, "features", features, _checks.ALL_FLOATS)
    _checks.dtype(op, "bank", bank, _checks.FLOATS)
    count = bank.shape[0]
    wanted = (features.shape[0], bank.shape[1])
    _checks.shape(op, "features", features, wanted, "rows of the bank's width")
    tensors = {"features": features, "bank": bank, "indices": indices}
    _checks.integers(op, "indices", indices, features.shape[0], "one per feature")
    if cameras is not None:
        _checks.integers(op, "cameras", cameras, count, "one per row of the bank")
        tensors["cameras"] = cameras
    _checks.same_device(op, **tensors)
    if not torch.compiler.is_compiling():
        _checks.indices_in_range(op, "indices", indices, count)
    rows: torch.Tensor = _hardest_positive(
        features.detach().float(), bank, indices, class_of, members, offsets, cameras
    )
    return rows
