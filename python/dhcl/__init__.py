"""Training and evaluation of unsupervised person re-identification, on top of :mod:`dhcl_ops`.

``dhcl.ReID`` is a trained model to use; it needs the extra ``train`` and is imported when asked
for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhcl.inference.reid import ReID
    from dhcl_ops import __version__

__all__ = ["ReID", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dhcl_ops import __version__  # dhcl_ops imports torch, which takes seconds

        return __version__
    if name != "ReID":
        raise AttributeError(f"module 'dhcl' has no attribute {name!r}")
    try:
        from dhcl.inference.reid import ReID
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("dhcl", "dhcl_ops"):
            raise
        raise ModuleNotFoundError(
            f"dhcl.ReID needs {error.name}: pip install 'dhcl[train]'", name=error.name
        ) from error
    return ReID


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
