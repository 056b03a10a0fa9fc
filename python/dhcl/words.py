"""Text for people: names that can be printed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["show"]


def show(path: Path | str) -> str:
    """The path as text that can always be printed, whatever bytes its name holds."""
    return str(path).encode("utf-8", "backslashreplace").decode()
