"""Files that were stored earlier, maybe by a stranger: opened, measured and parsed within limits.

What a file claims of itself decides neither how much memory is taken nor how long is waited. Each
function raises ``OSError`` where the system can't read the file, and :class:`Damaged` where it is
not what it should be; whoever asked for the file adds its part in that.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "IMAGE_FORMATS",
    "MAX_TEXT",
    "Damaged",
    "checksum",
    "most_unpacked",
    "open_stored",
    "parse_json",
    "read_json",
    "read_text",
]

MAX_TEXT = 1 << 26
"""Bytes that a file of options or metrics may have, 64 MiB."""

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow's, those that images are read in: others draw what a program says, or start one."""

# Bytes that a stored file may become: so many, or so many times its size.
_UNPACKED = 1 << 30
_EXPANSION = 100

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


def read_text(path: Path, limit: int = MAX_TEXT, errors: str = "strict") -> str:
    """What a file of text in UTF-8 holds; ``errors`` as of :meth:`bytes.decode`.

    Raises:
        OSError, Damaged: as :func:`open_stored`; bytes that are none.
    """
    with open_stored(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown since
        raise Damaged(f"{path.name} must be no larger than {limit:,} bytes")
    try:
        return data.decode(errors=errors)
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


def most_unpacked(packed: int) -> int:
    """Bytes that a file of ``packed`` bytes may become in memory: 1 GiB, or 100 times its size."""
    return max(_UNPACKED, _EXPANSION * packed)


def checksum(data: Any, start: int = 0) -> int:
    """CRC-32 of what has bytes (RFC 1952), going on from that of what came before.

    It finds accidents, at some GB/s; whoever means harm can write a fitting one.
    """
    view = memoryview(data).cast("B")
    for first in range(0, len(view), _PIECE):
        start = zlib.crc32(view[first : first + _PIECE], start)
    return start
