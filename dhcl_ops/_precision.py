"""Full precision of matrix products, whatever the process allows for others.

A user may let torch round the operands of its fp32 products, to TF32 on CUDA or bf16 on the CPU
(``torch.set_float32_matmul_precision``, ``fp32_precision``, ``allow_tf32``), or add fp16 ones up in
fp16. Ops whose results are stated in fp32 make their products inside of :func:`ieee_products`; C++
enters it by the op ``dhcl::ieee_products``, so that a compiled graph is guarded too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from dhcl_ops._ops import LIBRARY

# What a backend says where it leaves fp32 products as they are: of its own accord, or as told.
_FULL = ("none", "ieee")


class _Guard:
    """Holds torch's settings, which are the process's, at full precision while anyone is inside.

    The first thread to enter remembers what was set and the last one to leave sets it again, so
    that no thread's products lose their guard when another one is done. Where nothing lower is set
    there is nothing to hold, and nobody is counted.
    """

    def __init__(self) -> None:
        libraries: Any = torch.backends
        # Not set_float32_matmul_precision: that raises where a backend was set on its own.
        self._backends = (libraries.cuda.matmul, libraries.mkldnn.matmul)
        self._cuda = libraries.cuda.matmul
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []
        self._narrow_sums = False

    def enter(self) -> bool:
        """Whether :meth:`leave` must be called."""
        with self._lock:
            if self._inside == 0:
                self._before = [backend.fp32_precision for backend in self._backends]
                self._narrow_sums = self._cuda.allow_fp16_accumulation
                if not self._narrow_sums and all(each in _FULL for each in self._before):
                    return False
                for backend in self._backends:
                    backend.fp32_precision = "ieee"
                self._cuda.allow_fp16_accumulation = False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for backend, precision in zip(self._backends, self._before, strict=True):
                # What was set for all backends together goes on being inherited.
                backend.fp32_precision = "none"
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision
            self._cuda.allow_fp16_accumulation = self._narrow_sums


_guard = _Guard()


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """No TF32 or bf16 inside of fp32 products, and no fp16 sums, in any thread."""
    entered = _guard.enter()
    try:
        yield
    finally:
        if entered:
            _guard.leave()


def _ieee_products(begin: bool) -> bool:
    """What C++ calls: enter, and where that returned True, leave."""
    if begin:
        return _guard.enter()
    _guard.leave()
    return False


LIBRARY.define("ieee_products(bool begin) -> bool")
LIBRARY.impl("ieee_products", _ieee_products, "CompositeExplicitAutograd")
