"""What the memories of SpCL and Cluster Contrast have in common: a bank that moves in backward."""

from __future__ import annotations

import math
from typing import Any

import torch

from dhcl_ops import _checks
from dhcl_ops.memory import least_similar, momentum_update_


class UpdateInBackward(torch.autograd.Function):
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


def check(
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
