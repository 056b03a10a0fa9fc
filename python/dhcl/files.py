"""Files: never half-written ones, arrays that grow row by row, one writer at a time.

And reading tensors from files of others, none of whose code is run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import pickle
import re
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "ForeignCode",
    "NpyRows",
    "load_tensors",
    "new_folder",
    "only_writer",
    "write_atomic",
    "write_together",
]

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
    if not folder.is_dir():
        with new_folder(folder) as partial:
            for name, data in files.items():
                write_atomic(partial / name, data)
        return
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder))
    try:
        for name, data in files.items():
            write_atomic(partial / name, data)
        for name in files:
            (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole; an error leaves nothing.

    Raises:
        OSError: the folder exists already, or can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ForeignCode(Exception):
    """A file that can't be read without running code that it names; ``str()`` says what to do.

    For whoever reads it, to be raised anew with the file's part in what was asked for.
    """


def load_tensors(path: Path) -> Any:
    """What :func:`torch.save` wrote, on the CPU, without running code that the file names.

    Beside tensors and plain values there may be what scripts put beside them and what can do
    nothing: NumPy's arrays and scalars, paths, the options of argparse.

    Raises:
        ForeignCode: the file names something else.
        Exception: whatever torch raises for a damaged file, or one of another kind.
    """
    import torch

    with torch.serialization.safe_globals(_harmless()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            names = _foreign(path, str(error))
            if not names:
                raise
            more = "" if len(names) <= 5 else ", ..."
            raise ForeignCode(
                f"holds more than tensors: {', '.join(names[:5])}{more}; code that a file names is "
                "not run. If you trust the file, write its tensors alone to another one, with "
                "everything importable that it was saved with:\n"
                f"  content = torch.load({str(path)!r}, weights_only=False)\n"
                '  torch.save(content["state_dict"], "weights.pth")  # or what holds the tensors; '
                "of a whole network content.state_dict()"
            ) from error


def _harmless() -> list[Any]:
    """Classes and functions that make plain values, under the names that files have for them."""
    core: Any = getattr(np, "_core", None) or np.core  # its name before NumPy 2
    made = (core.multiarray.scalar, core.multiarray._reconstruct)
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]} | {type(np.dtype("V1"))}
    paths = (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    return [
        *((f, f"numpy.{name}.multiarray.{f.__name__}") for f in made for name in ("core", "_core")),
        *(np.ndarray, np.dtype, *kinds),
        *(argparse.Namespace, types.SimpleNamespace),
        *(bool, int, float, str, list, tuple, dict),  # of which a defaultdict makes values
        (_as_dict, "collections.defaultdict"),
        (_as_list, "collections.deque"),
        *(set, frozenset, complex, slice, range, bytearray),
        # Of a file's own kind of system a path may not be one here, and a pure one is.
        *((kind, f"pathlib{part}.{kind.__name__}") for kind in paths for part in ("", "._local")),
        *(
            (kind, f"pathlib{part}.{kind.__name__.removeprefix('Pure')}")
            for kind in paths
            for part in ("", "._local")
        ),
    ]


def _as_dict(*_: object) -> dict[Any, Any]:
    """In place of a defaultdict, which torch does not fill."""
    return {}


def _as_list(*_: object) -> list[Any]:
    """In place of a deque, which torch does not fill."""
    return []


def _foreign(path: Path, message: str) -> list[str]:
    """Names in a file that are not allowed, as torch finds them or its error says."""
    import torch

    try:
        found = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # files of the format before torch 1.6, and damaged ones
        found = []
    named = re.findall(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", message)
    return sorted(found) or named


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
