"""The op families and their kernels, read off the sources: what benchmarks and tools go through.

A family is a stem with kernels (``csrc/STEM.cu``). Its benchmark is ``benchmarks/STEM.py``, whose
``main`` measures and whose ``watched`` makes the calls that Compute Sanitizer and Nsight Compute
look at. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _build_module() -> Any:
    """dhcl_ops/_build.py alone, since importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_dhcl_build", ROOT / "dhcl_ops" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FAMILIES: tuple[str, ...] = tuple(_build_module().families())
# Benchmarks of several families together.
COMPOSITIONS = ("compat", "end_to_end", "scaling", "sharded")


def kernels(family: str) -> list[str]:
    """The names of a family's kernels."""
    text = (ROOT / "csrc" / f"{family}.cu").read_text()
    return re.findall(r"^__global__[^;{]*?\b(\w+_kernel)\(", text, re.MULTILINE)
