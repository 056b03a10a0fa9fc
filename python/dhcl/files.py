"""Writing files: never half-written ones, arrays that grow row by row, one writer at a time."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NpyRows", "only_writer", "write_atomic", "write_together"]

# Bytes of a write, so that an error comes soon after the disk is full.
_PIECE = 1 << 20


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace the file by these bytes; whatever happens, it holds the old ones or the new ones.

    Its folder is made where there is none.

    Raises:
        OSError: with the old file untouched, and nothing left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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


def write_together(folder: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Write files into a folder: a new folder is whole or not there, an old one keeps its others.

    In a folder that is there, all are written to the disk under other names before the first one
    gets its own, so that a full disk changes nothing; they are then renamed one by one, in the
    order given.

    Raises:
        OSError: with the folder as it was, but for a crash between two renames.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    there = folder.is_dir()
    home = folder if there else folder.parent
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=home))
    try:
        for name, data in files.items():
            write_atomic(partial / name, data)
        if there:
            for name in files:
                (partial / name).replace(folder / name)
        else:
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def only_writer(lock: Path) -> Iterator[None]:
    """Hold a lock that ends with its holder, however that ends; the file stays and says nothing.

    Args:
        lock: the file, made where there is none.

    Raises:
        TimeoutError: at once, if another process holds it.
    """
    from filelock import FileLock

    with FileLock(lock, timeout=0):
        yield


class NpyRows:
    """A ``.npy`` file of float32 rows that grows, so that no more than a batch is in memory.

    It is whole once :meth:`close` has been called.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width, self.rows = path, width, 0
        self._file = path.open("wb")
        self._header_bytes = self._file.write(self._header())

    def _header(self) -> bytes:
        # NumPy pads headers so that the number of rows can grow in place.
        buffer = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(buffer, shape)
        return buffer.getvalue()

    def append(self, rows: Any) -> None:
        """Add rows (n, width) of an array or a tensor on the CPU."""
        array = np.ascontiguousarray(np.asarray(rows), dtype="<f4")
        if array.ndim != 2 or array.shape[1] != self.width:
            raise ValueError(f"rows: must be (n, {self.width}) (got {array.shape})")
        self._file.write(array.data)
        self.rows += len(array)

    def close(self) -> None:
        """Write the number of rows, and everything to the disk."""
        header = self._header()
        assert len(header) == self._header_bytes
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)
