"""Training and evaluation of unsupervised person re-identification, on top of :mod:`dhcl_ops`.

``dhcl.ReID`` is a trained model to use, ``dhcl.JaccardDBSCAN`` the clustering as an estimator of
scikit-learn, ``dhcl.ReIDMetric`` the evaluation as a metric of TorchMetrics. Each needs an extra
and is imported when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhcl.inference.estimator import JaccardDBSCAN
    from dhcl.inference.metric import ReIDMetric
    from dhcl.inference.reid import ReID
    from dhcl_ops import __version__

__all__ = ["JaccardDBSCAN", "ReID", "ReIDMetric", "__version__"]

# The module of each name, and the extra that has what it needs.
_LAZY = {
    "JaccardDBSCAN": ("dhcl.inference.estimator", "train"),
    "ReID": ("dhcl.inference.reid", "train"),
    "ReIDMetric": ("dhcl.inference.metric", "torchmetrics"),
    "__version__": ("dhcl_ops", ""),  # which imports torch, and that takes seconds
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dhcl' has no attribute {name!r}")
    module, extra = _LAZY[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("dhcl", "dhcl_ops"):
            raise
        raise ModuleNotFoundError(
            f"dhcl.{name} needs {error.name}: pip install 'dhcl[{extra}]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
