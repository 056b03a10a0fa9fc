"""NumPy and CuPy arrays in, arrays of the same kind out, without copies where the device allows."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])


def _is_cupy(value: object) -> bool:
    # CuPy is optional: an array of it can only exist if someone imported it.
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def is_array(value: object) -> bool:
    """Whether the value is a NumPy or CuPy array."""
    return isinstance(value, np.ndarray) or _is_cupy(value)


def any_array(values: Iterable[object]) -> bool:
    """Whether one of the values is a NumPy or CuPy array; quick, since every call asks."""
    cupy = sys.modules.get("cupy")
    kinds = np.ndarray if cupy is None else (np.ndarray, cupy.ndarray)
    for value in values:  # noqa: SIM110, a generator takes twice the time
        if isinstance(value, kinds):
            return True
    return False


def to_tensor(op: str, name: str, array: Any, *, mutated: bool = False) -> torch.Tensor:
    """View an array as a tensor; an array that is to be changed in place is never copied."""
    if _is_cupy(array):
        return torch.utils.dlpack.from_dlpack(array)
    if mutated and not array.flags.writeable:
        raise ValueError(
            f"{op}: {name} is changed in place and must be writable (got a read-only array)"
        )
    if not array.dtype.isnative:
        if mutated:
            raise ValueError(
                f"{op}: {name} is changed in place and must have this machine's byte order "
                f"(got {array.dtype})"
            )
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        if mutated:
            raise ValueError(
                f"{op}: {name} is changed in place and must be contiguous "
                f"(got strides {array.strides})"
            )
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(f"{op}: {name} has an unsupported dtype (got {array.dtype})") from error


def as_tensors(op: str, **values: Any) -> list[Any]:
    """The values, with arrays as tensors."""
    return [
        to_tensor(op, name, value) if is_array(value) else value for name, value in values.items()
    ]


def _to_kind(value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if kind == "numpy":
            return value.numpy(force=True)
        return sys.modules["cupy"].from_dlpack(value)
    if isinstance(value, tuple):
        converted = [_to_kind(v, kind) for v in value]
        return type(value)(*converted) if hasattr(value, "_fields") else tuple(converted)
    return value


def like(given: object, value: Any) -> Any:
    """The tensors in value as arrays of the kind of ``given``; unchanged where that is a tensor."""
    if not is_array(given):
        return value
    return _to_kind(value, "cupy" if _is_cupy(given) else "numpy")


def caller_waits(pairs: Iterable[tuple[object, Any]]) -> None:
    """Let CuPy's current stream wait for what torch was asked to do with arrays on a GPU.

    Torch works on its own current stream, which waited for CuPy's when the arrays came. Without the
    way back the caller could read an array before it has changed, or write to one that is still
    read. The stream waits where a tensor is handed over, so that one is handed over for nothing.

    Args:
        pairs: what the caller gave, and the tensor that was made of it.
    """
    shared = [tensor for given, tensor in pairs if _is_cupy(given) and tensor.is_cuda]
    for tensor in {tensor.device: tensor for tensor in shared}.values():
        sys.modules["cupy"].from_dlpack(tensor.detach())


def takes_arrays(*names: str, mutates: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Let a function's named tensor arguments be arrays too.

    The first named argument decides the kind of the answer: tensors answer in tensors, NumPy in
    NumPy, CuPy in CuPy. The other arrays join it on its device. Arguments in ``mutates`` are
    shared, never copied, and are themselves what the function returns in their place. A caller's
    CuPy stream goes on once the work on its arrays is done.
    """

    def decorate(function: F) -> F:
        op = function.__name__
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not (any_array(args) or any_array(kwargs.values())):
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            lead = given.get(names[0])
            tensors = {
                name: to_tensor(op, name, given[name], mutated=name in mutates)
                if is_array(given[name])
                else given[name]
                for name in names
                if name in given
            }
            first = tensors.get(names[0])
            if isinstance(first, torch.Tensor):
                for name, value in tensors.items():
                    if is_array(given[name]) and name not in mutates:
                        tensors[name] = value.to(first.device)
            pairs = [(given[name], tensor) for name, tensor in tensors.items()]
            given.update(tensors)
            result = function(*bound.args, **bound.kwargs)
            caller_waits(pairs)
            if result is first and names[0] in mutates:
                return lead
            if not is_array(lead):
                return result
            return like(lead, result)

        return wrapper  # type: ignore[return-value]

    return decorate
