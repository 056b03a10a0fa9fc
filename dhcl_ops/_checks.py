"""Argument checks with one wording: ``op: rule (got value)``."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALL_FLOATS = (*FLOATS, torch.float64)

# Numbers meet fp32 arithmetic sooner or later: larger ones would be infinite there, and smaller
# ones, which it may flush to zero, make 0 * inf.
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


def tensor(op: str, name: str, value: object, layout: torch.layout = torch.strided) -> None:
    """Raise ``TypeError`` unless the value is a tensor of this layout, a dense one by default."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or an array (got {type(value).__name__})")
    if value.layout != layout:
        wanted = "a dense" if layout == torch.strided else "a sparse CSR"
        got = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {wanted} tensor (got {got})")


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


def integers(op: str, name: str, value: Any, size: int, why: str) -> torch.Tensor:
    """Return the value, an int64 tensor of this size; raise naming the rule otherwise."""
    tensor(op, name, value)
    dtype(op, name, value, (torch.int64,))
    shape(op, name, value, (size,), why)
    numbers: torch.Tensor = value
    return numbers


def unit_rows(op: str, name: str, features: torch.Tensor) -> torch.Tensor:
    """Check features (N, d) of unit rows, to 1 %, and return them in float32."""
    tensor(op, name, features)
    rank(op, name, features, 2)
    dtype(op, name, features, ALL_FLOATS)
    if len(features) > 2**31 - 1:
        raise ValueError(f"{op}: {name} must have at most 2147483647 rows (got {len(features)})")
    rows = features.detach().float().contiguous()
    norms = rows.norm(dim=1)
    wrong = ~((norms - 1.0).abs() <= 1e-2)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        norm = float(norms[row])
        rule = "must have rows of norm 1, see torch.nn.functional.normalize"
        if not bool(rows[row].isfinite().all()):
            rule, norm = "must be finite", float(rows[row][~rows[row].isfinite()][0])
        raise ValueError(f"{op}: {name} {rule} (got {norm:g} in row {row})")
    return rows


def same_device(op: str, **values: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all tensors are on one device."""
    devices = {name: value.device for name, value in values.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device (got {got})")


def number(
    op: str, name: str, value: float, low: float, high: float = math.inf, *, rule: str
) -> float:
    """Return the value as a float in [low, high]; raise naming the rule otherwise.

    It is finite in fp32, and zero where it is smaller than fp32's smallest normal number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number (got {type(value).__name__})")
    # An int may be too large for any float, and for printing.
    number = math.inf if isinstance(value, int) and abs(value) > _LARGEST else float(value)
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{op}: {name} must be {rule} (got {number!r})")
    if abs(number) > _LARGEST:
        raise ValueError(f"{op}: {name} must be finite in float32 (got {number!r})")
    return number if abs(number) >= _SMALLEST else 0.0


def integer(op: str, name: str, value: int, low: int, high: int = 2**63 - 1) -> int:
    """Return the value as an int in [low, high]; raise naming the rule otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer (got {type(value).__name__})")
    if number < low:
        raise ValueError(f"{op}: {name} must be >= {low} (got {_short(number)})")
    if number > high:
        raise ValueError(f"{op}: {name} must be <= {high} (got {_short(number)})")
    return number


def _short(number: int) -> str:
    """An integer for a message; Python refuses to print very long ones."""
    return str(number) if abs(number) < 2**64 else f"one of {number.bit_length()} bits"


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


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, None where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps of memory that nobody uses, it gives back before it runs out.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo") as file:
            lines = file.read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return None


def fits_in_memory(
    op: str, size: tuple[int, int], device: torch.device, instead: str, element: int = 4
) -> None:
    """Raise ``MemoryError`` if a dense matrix does not fit; ``instead`` says what does.

    Its elements take ``element`` bytes, float32 by default.
    """
    needed, free = element * size[0] * size[1], available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{op}: a dense matrix of {size[0]} x {size[1]} needs {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; {instead}"
        )
