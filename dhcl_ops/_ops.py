"""How an op is declared: schema, reference, fake and autograd in Python, kernels from the library.

An op exists and is right before anything is compiled: its PyTorch reference is registered for every
device. Loading the compiled library overrides the CPU and CUDA keys. The first call of any op lands
in the reference's wrapper, which loads the library and calls the op again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from dhcl_ops import _library

LIBRARY = torch.library.Library("dhcl", "DEF")


@dataclasses.dataclass(frozen=True)
class Op:
    """A declared op: its name, family (the stem of its files), reference and sample arguments.

    ``sample(device)`` returns arguments for one small call; the doctor's self-check and the tests
    use it. ``cuda_library`` says what runs on CUDA where that is torch's own code rather than ours;
    ``composed`` what an op without kernels of its own is made of, on every device.
    """

    name: str
    family: str
    reference: Callable[..., Any]
    sample: Callable[[torch.device], tuple[Any, ...]]
    cuda_library: str = ""
    composed: str = ""

    @property
    def overload(self) -> Any:
        """The callable ``torch.ops.dhcl.<name>.default``."""
        return getattr(torch.ops.dhcl, self.name).default

    def compiled(self, device_type: str) -> bool:
        """Whether a compiled kernel is registered for ``"cpu"`` or ``"cuda"``."""
        key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return bool(has_kernel(f"dhcl::{self.name}", key))


OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    family: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    sample: Callable[[torch.device], tuple[Any, ...]],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    cuda_library: str = "",
    composed: str = "",
) -> Any:
    """Declare ``dhcl::<schema>`` and return its callable overload."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    op = Op(name, family, reference, sample, cuda_library, composed)
    OPS[name] = op

    def kernel(*args: Any) -> Any:
        if _library.load_once():
            return op.overload(*args)
        return reference(*args)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dhcl::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(
            f"dhcl::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    _bump_versions(op)
    return op.overload


def below_autograd() -> Any:
    """A context in which ops run as they are, without what would record their gradients.

    For use where the caller sees to the gradient: for an op that has one, torch's record in Python
    costs as much as a small op.
    """
    return torch._C._AutoDispatchBelowAutograd()


def _mutated_places(overload: Any) -> list[int]:
    """Which arguments of an op it changes in place."""
    arguments = overload._schema.arguments
    return [
        i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    ]


def in_place(overload: Any) -> Callable[..., None]:
    """An in-place op without autograd's turn in the dispatcher, for calls that count microseconds.

    What that turn does for such an op, the version counters, is done here, at an eighth of its
    time. For tensors that autograd need not follow otherwise.
    """
    mutated = _mutated_places(overload)

    def call(*args: Any) -> None:
        if torch.compiler.is_compiling():
            overload(*args)
            return
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload(*args)
        # Tensors of inference mode have no version.
        changed = [args[i] for i in mutated if args[i] is not None and not args[i].is_inference()]
        torch.autograd.graph.increment_version(changed)

    return call


def _bump_versions(op: Op) -> None:
    """Make an in-place op count as one for autograd.

    A raw kernel writes through a pointer, and autograd would not notice that a tensor saved for
    backward has changed; with the version counter moved, backward raises instead of lying.
    """
    mutated = _mutated_places(op.overload)
    if not mutated:
        return
    below = torch._C._after_ADInplaceOrView_keyset

    def adinplaceorview(keyset: Any, *args: Any) -> Any:
        for i in mutated:
            if i < len(args) and args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return op.overload.redispatch(keyset & below, *args)

    LIBRARY.impl(op.name, adinplaceorview, "ADInplaceOrView", with_keyset=True)
