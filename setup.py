"""Everything static is in pyproject.toml; this adds the ahead-of-time build.

``DHCL_BUILD=aot pip install --no-build-isolation .`` compiles the kernels at install. Without it
nothing is compiled and torch is not even imported: the kernels are built at the first call of an
op.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import setup

HERE = Path(__file__).resolve().parent


def build_module() -> Any:
    """dhcl_ops/_build.py alone: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_dhcl_build", HERE / "dhcl_ops" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ahead_of_time() -> dict[str, Any]:
    """Arguments of setup() that compile the kernels into the wheel."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "DHCL_BUILD=aot builds against the torch you will run with: install torch, ninja and "
            "setuptools first and use `pip install --no-build-isolation`"
        ) from error
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(f"setuptools 77 or newer is needed (got {setuptools.__version__})")
    return build_module().setuptools_arguments(HERE)


mode = os.environ.get("DHCL_BUILD", "")
setup(**(ahead_of_time() if mode == "aot" else {}))
