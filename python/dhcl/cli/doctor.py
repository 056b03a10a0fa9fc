"""The command ``dhcl doctor``."""

from __future__ import annotations

import importlib.metadata

__all__ = ["doctor"]

_LIBRARIES = (
    "torchvision",
    "timm",
    "accelerate",
    "scikit-learn",
    "tensorboard",
    "tyro",
    "Pillow",
    "plotly",
    "pydantic",
    "filelock",
    "jinja2",
)


def doctor(words: list[str]) -> int:
    """The ops' report, and the versions of what the trainer stands on.

    Returns:
        1 if an op disagrees with its reference, else 0.
    """
    from dhcl_ops.doctor import main as report_on_ops

    status = report_on_ops(words, prog="dhcl doctor")
    if "--json" in words:
        return status
    print("trainer")
    for name in _LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed; pip install 'dhcl[train]'"
        print(f"  {name:<13}{version}")
    return status
