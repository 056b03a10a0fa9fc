"""The ops' PyTorch references in place of the compiled kernels, for the length of a measurement."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

import dhcl_ops
from dhcl_ops import _ops


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Run everything in ``dhcl_ops`` on its PyTorch references, on CPU and CUDA alike.

    It acts on the whole process and takes milliseconds to enter and leave; calls inside cost the
    same as with ``DHCL_BUILD=off``.
    """
    dhcl_ops.status()  # loading the library later would take the references' place
    override = torch.library.Library("dhcl", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op in _ops.OPS.values():
                for key in ("CPU", "CUDA"):
                    if op.compiled(key.lower()):
                        override.impl(op.name, op.reference, key, allow_override=True)
        yield
    finally:
        override._destroy()
