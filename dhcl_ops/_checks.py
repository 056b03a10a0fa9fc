"""Argument checks with one wording: ``op: rule (got value)``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tensor(op: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless the value is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or an array (got {type(value).__name__})")


def rank(op: str, name: str, value: torch.Tensor, expected: int) -> None:
    """Raise ``ValueError`` unless the tensor has this many dimensions."""
    if value.dim() != expected:
        raise ValueError(f"{op}: {name} must be {expected}-D (got shape {tuple(value.shape)})")


def shape(op: str, name: str, value: torch.Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raise ``ValueError`` unless the tensor has this shape."""
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{op}: {name} must have shape {expected}, {why} (got {tuple(value.shape)})"
        )


def dtype(op: str, name: str, value: torch.Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Raise ``TypeError`` unless the tensor has one of these dtypes."""
    allowed = tuple(allowed)
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {names} (got {got})")


def same_device(op: str, **values: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all tensors are on one device."""
    devices = {name: value.device for name, value in values.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device (got {got})")


def number(
    op: str, name: str, value: float, low: float, high: float = math.inf, *, rule: str
) -> float:
    """Return the value as a finite float in [low, high]; raise naming the rule otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number (got {type(value).__name__})")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{op}: {name} must be {rule} (got {value!r})")
    return float(value)


def integer(op: str, name: str, value: int, low: int) -> int:
    """Return the value as an int of at least ``low``; raise naming the rule otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer (got {type(value).__name__})")
    if value < low:
        raise ValueError(f"{op}: {name} must be >= {low} (got {value})")
    return int(value)


def one_of(op: str, name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless the value is one of these names."""
    allowed = tuple(allowed)
    if value not in allowed:
        names = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: {name} must be {names} (got {value!r})")


def indices_in_range(op: str, name: str, indices: torch.Tensor, size: int, lowest: int = 0) -> None:
    """Raise ``IndexError`` naming the first index, (B,) or (B, E), outside [lowest, size).

    CUDA tensors are not looked at, since that would wait for the device: there the kernels check.
    """
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = torch.aminmax(indices)
    if int(low) < lowest or int(high) >= size:
        outside = (indices < lowest) | (indices >= size)
        position = int(outside.nonzero()[0, 0])
        raise IndexError(
            f"{op}: {name} must be in [{lowest}, {size}) "
            f"(got {int(indices[outside][0])} at batch position {position})"
        )
