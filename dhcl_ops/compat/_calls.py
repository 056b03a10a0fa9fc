"""How the functions of other projects hand their arguments on, and how errors name them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dhcl_ops import _arrays


@contextlib.contextmanager
def as_called(op: str, inner: str, **names: str) -> Iterator[None]:
    """Errors of the op ``inner`` speak of the function that was called, and of its arguments.

    Args:
        op: the function that was called.
        inner: the op that is called inside.
        names: of the op's arguments, what the function calls them.
    """
    try:
        yield
    except (TypeError, ValueError, MemoryError) as error:
        head, found, rule = str(error).partition(f"{inner}: ")
        if head or not found:
            raise
        for ours, theirs in names.items():
            rule = re.sub(rf"\b{ours}\b", theirs, rule)
        raise type(error)(f"{op}: {rule}") from None


def tensor(op: str, name: str, value: Any) -> torch.Tensor:
    """A tensor, an array with any strides, or what NumPy makes an array of, as a tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return _arrays.to_tensor(op, name, value if _arrays.is_array(value) else np.asarray(value))
