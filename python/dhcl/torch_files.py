"""Tensors in files of :func:`torch.save`, maybe a stranger's: no code of theirs is run.

And what a file claims is compared with what it has before memory is taken for it.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dhcl.stored import Damaged, most_unpacked, open_stored

__all__ = ["ForeignCode", "load_plain", "load_tensors"]


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
        Exception: as of :func:`load_plain`.
    """
    import torch

    with torch.serialization.safe_globals(_harmless()):
        try:
            return load_plain(path)
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


def load_plain(path: Path) -> Any:
    """Tensors and plain values that :func:`torch.save` wrote, on the CPU; code is not run.

    Raises:
        OSError, Damaged: as :func:`open_stored`; a file that claims to unpack to more than
            :func:`most_unpacked` allows, also by a tensor that repeats its numbers.
        Exception: whatever torch raises for a damaged file, or one of another kind.
    """
    import torch

    with open_stored(path) as file:
        most = most_unpacked(file.seek(0, 2))
        _check_archive(file, most)
        file.seek(0)
        content = _with_arrays(torch.load(file, map_location="cpu", weights_only=True))
    for value in _values(content):
        size = value.nbytes if isinstance(value, (torch.Tensor, np.ndarray)) else 0
        if size > most:
            raise Damaged(f"{path.name} must hold at most {most:,} bytes (got {size:,} in one)")
    return content


def _check_archive(file: BinaryIO, most: int) -> None:
    """Refuse a zip archive whose members are more than so many bytes, packed or not."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":  # as torch tells; before 1.6 it packed nothing
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > most:
        raise Damaged(f"it must unpack to at most {most:,} bytes (got {size:,})")


def _values(content: Any) -> Iterable[Any]:
    """Everything in dictionaries and lists in each other, once."""
    rest, seen = [content], set()
    while rest:
        value = rest.pop()
        if isinstance(value, (Mapping, list, tuple)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            rest += value.values() if isinstance(value, Mapping) else value
        yield value


def _harmless() -> list[Any]:
    """Classes and functions that make plain values, under the names that files have for them."""
    cores = ("numpy.core.multiarray", "numpy._core.multiarray")  # its name since NumPy 2
    paths = (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    return [
        *((_Values, f"{core}._reconstruct") for core in cores),
        *((_scalar, f"{core}.scalar") for core in cores),
        *((_Values, "numpy.ndarray"), (_Kind, "numpy.dtype")),
        *(argparse.Namespace, types.SimpleNamespace),
        *(bool, int, float, str, list, tuple, dict),  # of which a defaultdict makes values
        (_as_dict, "collections.defaultdict"),
        (_as_list, "collections.deque"),
        (_no_bytes, "builtins.bytes"),
        *(set, frozenset, complex, slice, bytearray),
        # Of a few bytes, and a list of it could have any length.
        (slice, "builtins.range"),
        # Of a file's own kind of system a path may not be one here, and a pure one is.
        *((kind, f"pathlib{part}.{kind.__name__}") for kind in paths for part in ("", "._local")),
        *(
            (kind, f"pathlib{part}.{kind.__name__.removeprefix('Pure')}")
            for kind in paths
            for part in ("", "._local")
        ),
    ]


class _Kind:
    """In place of a NumPy dtype, whose own state could make it read and write anywhere."""

    def __init__(self, code: Any = "", *_: object) -> None:
        self.code, self.order, self.plain = code, "=", True

    def __setstate__(self, state: Any) -> None:
        _, self.order, subarray, names, *_ = state
        self.plain = subarray is None and names is None

    def dtype(self) -> np.dtype[Any] | None:
        """It, of numbers or texts; None for anything else."""
        code = self.code if isinstance(self.code, str) else ""
        if not self.plain or not re.fullmatch(r"[biufcSU][0-9]{1,9}", code):
            return None
        dtype: np.dtype[Any] = np.dtype(code)
        return dtype if self.order in _ORDERS else dtype.newbyteorder("S")


# Of numbers, those that are not swapped.
_ORDERS = ("=", "|", "<" if sys.byteorder == "little" else ">")


class _Values:
    """In place of a NumPy array: its parts, of which one is made where they fit."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[Any] | None:
        """It, of numbers, texts or objects; None for anything else, which is passed over.

        Raises:
            Damaged: parts that don't fit.
        """
        try:
            *_, shape, kind, fortran, data = self.state
            dtype = kind.dtype()
            data = data.encode("latin1") if isinstance(data, str) else data
            if kind.code == "O8" and isinstance(data, list):
                return np.reshape(_objects(data), shape, order="F" if fortran else "C")
            if dtype is None or not isinstance(data, bytes):
                return None
            flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
            array: NDArray[Any] = flat.reshape(shape, order="F" if fortran else "C").copy()
        except Exception as error:  # of whatever stands in place of the parts
            raise Damaged(f"an array of NumPy that is none ({error})") from error
        return array


def _objects(values: list[Any]) -> NDArray[Any]:
    """Each as it is, also where all are arrays of one shape."""
    array = np.empty(len(values), object)
    for number, value in enumerate(values):
        array[number] = value
    return array


def _scalar(kind: Any = None, data: Any = b"") -> _Values:
    values = _Values()
    values.state = ((), kind, False, data)
    return values


def _with_arrays(content: Any) -> Any:
    """The same with NumPy's arrays, and None for other things of NumPy."""
    done: dict[int, tuple[Any, Any]] = {}  # and what it was, so that no other gets its number

    def made(value: Any) -> Any:
        if isinstance(value, _Kind):
            return value.dtype()
        if isinstance(value, _Values):
            array = value.array()
            if array is None or array.dtype.kind != "O":
                return array if array is None or array.ndim else array[()]
            return _objects(list(map(made, array.flat))).reshape(array.shape)
        if type(value) is tuple:
            if id(value) not in done:
                done[id(value)] = value, tuple(map(made, value))
            return done[id(value)][1]
        if isinstance(value, (dict, list)) and id(value) not in done:
            done[id(value)] = value, value
            for name in list(value) if isinstance(value, dict) else range(len(value)):
                value[name] = made(value[name])
        return value

    return made(content)


def _as_dict(*_: object) -> dict[Any, Any]:
    """In place of a defaultdict, which torch does not fill."""
    return {}


def _as_list(*_: object) -> list[Any]:
    """In place of a deque, which torch does not fill."""
    return []


def _no_bytes(*_: object) -> bytes:
    """What the pickle of an empty array asks for; any number of zeros could be asked for."""
    return b""


def _foreign(path: Path, message: str) -> list[str]:
    """Names in a file that are not allowed, as torch finds them or its error says."""
    import torch

    try:
        found = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # files of the format before torch 1.6, and damaged ones
        found = []
    named = re.findall(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", message)
    return sorted(found) or named
