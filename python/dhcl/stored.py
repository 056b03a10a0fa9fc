"""Files that were stored earlier, maybe by a stranger: opened, measured and parsed within limits.

What a file claims of itself decides neither how much memory is taken nor how long is waited. Each
function raises ``OSError`` where the system can't read the file, and :class:`Damaged` where it is
not what it should be; whoever asked for the file adds its part in that.
"""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_TEXT",
    "Damaged",
    "NpyHeader",
    "checksum",
    "open_stored",
    "parse_json",
    "read_json",
    "read_npy",
    "read_npy_header",
    "read_text",
]

MAX_TEXT = 1 << 26
"""Bytes that a file of options or metrics may have, 64 MiB."""

# Bytes that are looked at between two chances for Ctrl-C.
_PIECE = 1 << 24


class Damaged(ValueError):
    """A stored file that is not what it should be; ``str()`` says in what."""


def open_stored(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a file for reading bytes, without waiting for a writer as opening a FIFO does.

    What the path names is judged once it is open, so that nothing can take its place in between.

    Args:
        path: the file, or a symbolic link to it.
        limit: bytes that it may have; None for any number.

    Raises:
        OSError: as of :func:`open`.
        Damaged: a folder, a FIFO, a device or a socket; more bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise Damaged(f"{path.name} must be a regular file")
        if limit is not None and about.st_size > limit:
            raise Damaged(
                f"{path.name} must be no larger than {limit:,} bytes (got {about.st_size:,})"
            )
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: Path, limit: int = MAX_TEXT, encoding: str = "utf-8") -> str:
    """What a file of text holds.

    Raises:
        OSError, Damaged: as :func:`open_stored`; bytes of another encoding.
    """
    with open_stored(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown since
        raise Damaged(f"{path.name} must be no larger than {limit:,} bytes")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Damaged(f"{path.name} is not text ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        Damaged: it is none, is nested beyond what Python can follow, or holds a number of more
            digits than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Damaged("JSON is nested too deep") from error
    except ValueError as error:
        raise Damaged(f"not JSON, {error}") from error


def read_json(path: Path, limit: int = MAX_TEXT) -> Any:
    """What a file of JSON says.

    Raises:
        OSError, Damaged: as :func:`read_text` and :func:`parse_json`.
    """
    try:
        return parse_json(read_text(path, limit))
    except Damaged as error:
        named = str(error).startswith(path.name)
        raise error if named else Damaged(f"{path.name}, {error}") from error


def checksum(data: Any, start: int = 0) -> int:
    """CRC-32 of what has bytes (RFC 1952), going on from that of what came before.

    It finds accidents, at some GB/s; whoever means harm can write a fitting one.
    """
    view = memoryview(data).cast("B")
    for first in range(0, len(view), _PIECE):
        start = zlib.crc32(view[first : first + _PIECE], start)
    return start


# ---- arrays -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyHeader:
    """What stands before the numbers of a ``.npy`` file.

    Attributes:
        shape, dtype, fortran: of the array.
        offset: bytes of the header.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the whole file, as the header has them; in a Python integer, of any size."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """The header of a ``.npy`` file, which is read up to the first number.

    Raises:
        Damaged: there is none.
    """
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's, of escapes in texts
            shape, fortran, dtype = read[version](file)
        offset = file.tell()
    except Exception as error:  # it is parsed as Python, whose parser has errors of any kind
        raise Damaged(f"no header of a .npy file ({type(error).__name__}: {error})") from error
    if not all(0 <= length < 2**63 for length in shape):
        raise Damaged("a header of a .npy file whose shape no array has")
    return NpyHeader(shape, dtype, fortran, offset)


def read_npy(path: Path, mapped: bool = False) -> NDArray[Any]:
    """The array of a ``.npy`` file, which must have every byte that its header claims.

    Args:
        path: the file.
        mapped: memory-mapped, read-only, in place of read.

    Raises:
        OSError, Damaged: as :func:`open_stored` and :func:`read_npy_header`; fewer bytes, or
            mapped also more; an array of Python objects, whose pickles are code.
    """
    with open_stored(path) as file:
        try:
            header = read_npy_header(file)
        except Damaged as error:
            raise Damaged(f"{path.name} has {error}") from error
        there = os.fstat(file.fileno()).st_size
        if header.dtype.hasobject:
            raise Damaged(f"{path.name} holds pickled objects, which are not read")
        # Of a file that is read, what comes after the array is nobody's business.
        if header.size > there or (mapped and header.size < there):
            raise Damaged(
                f"{path.name} must have {header.size:,} bytes for {header.shape} {header.dtype} "
                f"(got {there:,})"
            )
        if not mapped or not math.prod(header.shape):
            file.seek(0)
            array: NDArray[Any] = np.load(file, allow_pickle=False)
            return array
        order: Any = "F" if header.fortran else "C"
        return np.memmap(file, header.dtype, "r", header.offset, header.shape, order)
