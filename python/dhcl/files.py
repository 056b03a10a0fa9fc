"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_atomic"]

# Bytes of a write, so that an error comes soon after the disk is full.
_PIECE = 1 << 20


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace the file by these bytes; whatever happens, it holds the old ones or the new ones.

    Raises:
        OSError: with the old file untouched, and nothing left beside it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            view = memoryview(data)
            for start in range(0, len(view), _PIECE):
                file.write(view[start : start + _PIECE])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    # The new name itself must reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
