"""Loss, gradient and bank update of a training step, replayed from CUDA graphs.

At the sizes people train with, the host takes longer to start these operations than the GPU takes
to do them. A CUDA graph starts all of them at once, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dhcl_ops import _checks
from dhcl_ops.bank import MemoryBank
from dhcl_ops.hybrid import DHCLLoss, HybridStats

__all__ = ["GraphedStep"]

_OP = "GraphedStep"


class GraphedStep:
    """A step's loss, its gradient and the update of the bank, without the host's time for them.

    Built once the bank has its labels for the epoch, of one batch as a pattern; each call then
    takes a batch of the same shape::

        step = GraphedStep(loss, memory, features, indices)
        value = step(features, indices)
        value.backward()
        step.update_()

    which has the bits of ``loss(features, memory, indices)``, its backward, and
    ``memory.update_(features, indices)``. On CUDA the three are captured as a CUDA graph each and
    replayed; elsewhere they are called. Nothing waits for the device after the building, which
    takes about as long as a few steps and leaves the bank as it was.

    Until it is dropped it holds what a call of the loss takes of memory.

    Args:
        loss: with the settings and suspects that are captured.
        memory: the bank, with labels.
        features: (B, d) of a batch; finite.
        indices: (B,) int64, their rows of the bank.
        cameras: (N,) int64 of the bank's images, for a loss that looks at them. They are captured:
            other ones take another step.

    Attributes:
        stats: :class:`HybridStats` of the last call, overwritten by the next one; none of it
            carries a gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`hybrid_contrastive_loss`; and
            RuntimeError where CUDA refuses the capture.
    """

    stats: HybridStats

    def __init__(
        self,
        loss: DHCLLoss,
        memory: MemoryBank,
        features: torch.Tensor,
        indices: torch.Tensor,
        *,
        cameras: torch.Tensor | None = None,
    ) -> None:
        _checks.tensor(_OP, "features", features)
        _checks.dtype(_OP, "features", features, _checks.FLOATS)
        _checks.tensor(_OP, "indices", indices)
        self._loss, self._memory, self._cameras = loss, memory, cameras
        self._settings = dict(loss.settings)
        # Held, so that other tensors can't take the addresses that the graphs write to.
        self._captured = self._looked_at()
        # Where the graphs read a batch and the gradient of its loss.
        self._features = features.detach().clone().requires_grad_()
        self._indices = indices.clone()
        self._upstream = torch.ones((), dtype=torch.float32, device=features.device)
        self._calls = 0
        self._versions = (0, 0)
        self._side = torch.cuda.Stream(features.device) if features.is_cuda else None
        self._warm_up()
        self._replay_loss = self._recorded(self._forward)
        self._replay_gradient = self._recorded(self._backward)
        self._replay_update = self._recorded(self._update)

    def __call__(self, features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The loss () of a batch, differentiable once with respect to its features.

        Args:
            features: (B, d), of the shape, dtype and device that it was built with.
            indices: (B,) int64.

        Raises:
            TypeError, ValueError: arguments of another kind than it was built with.
            IndexError: an index out of range, on the CPU; on CUDA a device-side assert instead.
            RuntimeError: the bank's labels were set, or the loss's settings, suspects or false
                negatives, since it was built.
        """
        _as_built("features", features, self._features)
        _as_built("indices", indices, self._indices)
        *now, found = self._looked_at()
        *captured, found_then = self._captured
        if any(a is not b for a, b in zip(now, captured, strict=True)):
            raise RuntimeError(f"{_OP}: labels or suspects were set since; build another one")
        if found is not found_then:
            raise RuntimeError(f"{_OP}: false negatives were set since; build another one")
        if self._loss.settings != self._settings:
            raise RuntimeError(f"{_OP}: the loss's settings changed since; build another one")
        value: torch.Tensor = _Replayed.apply(features, indices, self)
        return value

    @torch.no_grad()
    def update_(self) -> None:
        """:meth:`MemoryBank.update_` with the batch of the last call, after its backward."""
        if not self._calls:
            raise RuntimeError(f"{_OP}: update_ is of the batch of a call, and there was none")
        self._replay_update()
        # A replay writes behind autograd's back.
        for tensor in (*self._bank()[:2], self._memory.skipped):
            torch.autograd.graph.increment_version(tensor)

    def _bank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory = self._memory
        return memory.features, memory.prototypes, memory.proto_of

    def _looked_at(self) -> tuple[Any, ...]:
        """Whose memory the graphs have the addresses of, beside the batch."""
        return (*self._bank(), self._loss.suspects, self._loss.false_negatives)

    # ---- what is captured -----------------------------------------------------------------------

    def _forward(self) -> None:
        with torch.enable_grad():
            self._value, self.stats = self._loss(
                self._features,
                self._memory,
                self._indices,
                cameras=self._cameras,
                return_stats=True,
            )

    def _backward(self) -> None:
        (self._gradient,) = torch.autograd.grad(self._value, self._features, self._upstream)

    def _update(self) -> None:
        self._memory.update_(self._features.detach(), self._indices)

    def _warm_up(self) -> None:
        """Do everything once, since what is set up at a first call can't be captured."""
        if self._side is None:
            self._try_all()
            return
        current = torch.cuda.current_stream(self._features.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            self._try_all()
        current.wait_stream(self._side)

    def _try_all(self) -> None:
        self._forward()
        self._backward()
        # An update leaves the rows of features that are not finite as they are, and counts them.
        before = self._memory.skipped.clone()
        nowhere = torch.full_like(self._features.detach(), math.nan)
        self._memory.update_(nowhere, self._indices)
        self._memory.skipped.copy_(before)

    def _recorded(self, function: Callable[[], None]) -> Callable[[], None]:
        """What repeats a function's work: its CUDA graph or, elsewhere, the function."""
        if self._side is None:
            return function
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may go on calling CUDA. The outer context
        # brings the stream back if a capture fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._features.device)),
            torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay

    # ---- what autograd calls --------------------------------------------------------------------

    def _take(self, features: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Value and number of a call."""
        with torch.no_grad():
            self._features.copy_(features)
        self._indices.copy_(indices)
        self._replay_loss()
        self._calls += 1
        self._versions = self._bank_versions()
        # A copy, as the next call overwrites it.
        return self._value.detach().clone(), self._calls

    def _give(self, grad: torch.Tensor, call: int) -> torch.Tensor:
        """The gradient (B, d) by the features of a call, given that of its value."""
        if call != self._calls:
            raise RuntimeError(f"{_OP}: backward must come before the next call")
        if self._versions != self._bank_versions():
            raise RuntimeError(f"{_OP}: backward must come before the bank's update")
        self._upstream.copy_(grad)
        self._replay_gradient()
        return self._gradient.clone()

    def _bank_versions(self) -> tuple[int, int]:
        return self._memory.features._version, self._memory.prototypes._version


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, indices: torch.Tensor, step: GraphedStep
    ) -> torch.Tensor:
        value, ctx.call = step._take(features, indices)
        ctx.step = step
        return value

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return ctx.step._give(grad, ctx.call), None, None


def _as_built(name: str, given: torch.Tensor, pattern: torch.Tensor) -> None:
    _checks.tensor(_OP, name, given)
    kind, wanted = ((t.shape, t.dtype, t.device) for t in (given, pattern))
    if kind != wanted:
        raise ValueError(
            f"{_OP}: {name} must be as when it was built, {_kind(pattern)} (got {_kind(given)})"
        )


def _kind(tensor: torch.Tensor) -> str:
    """Shape, dtype and device, for an error."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {dtype} on {tensor.device}"
