"""A CUDA device without a GPU whose values can't be read: what runs there waits for no device.

Its tensors are torch's fake ones, which have a device, a shape and no values. Code takes the ways
that it takes on CUDA; ``item``, ``tolist``, ``nonzero``, ``if tensor`` and whatever else needs a
value raise, and so does a copy to or from the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source = args[0] if func is _COPIES[0] else args[1]
            if source.device != out.device:
                raise AssertionError(f"{func} from {source.device} to {out.device}")
        return out


class UnreadDevice:
    """The device, and the way onto it."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor like this one, there."""
        alone = value.detach()
        with self._mode:
            there = self._mode.from_tensor(alone).to("cuda")
            return there.requires_grad_(value.requires_grad)

    def move(self, module: torch.nn.Module) -> None:
        """Put a module's parameters and buffers there."""
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            module._apply(self.of)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """What runs in this context may not read from the device, nor copy to or from it."""
        with self._mode, _NoCopies():
            yield


def backward(loss: torch.Tensor) -> None:
    """What ``loss.backward()`` does, node by node, as autograd's engine would start CUDA."""
    waiting: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    while waiting:
        node = max(waiting, key=lambda each: each._sequence_nr())
        given = waiting.pop(node)
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
            continue
        call = getattr(node, "apply", node)
        grads = call(*(given.get(i) for i in range(max(given) + 1)))
        grads = grads if isinstance(grads, tuple) else (grads,)
        # Functions written in Python answer for their plain arguments too, which come last.
        for grad, (following, place) in zip(grads, node.next_functions, strict=False):
            if following is None or grad is None:
                continue
            # Summed over what was broadcast, as the engine does.
            grad = grad.sum_to_size(following._input_metadata[place].shape)
            places = waiting.setdefault(following, {})
            places[place] = places[place] + grad if place in places else grad
