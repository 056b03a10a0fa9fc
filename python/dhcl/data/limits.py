"""Image files as bytes: what is read of a file, and how many pixels it may claim.

A file decides how much memory its picture takes and, being a link to a device or a FIFO, how long
it is read. What it asks for is compared with limits before anything is allocated.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from dhcl.errors import DataError

__all__ = ["check_header", "check_size", "read_file"]

MAX_PIXELS = 1 << 26
"""Pixels of an image, rows by columns, at most: 8192 x 8192, 192 MiB decoded."""

MAX_BYTES = 1 << 28
"""Bytes of an image file at most: 256 MiB."""


def read_file(path: Path) -> bytes:
    """What a file holds.

    A FIFO without a writer is not waited for, and a device is not read from.

    Raises:
        DataError: not a regular file, or one of more than ``DHCL_MAX_IMAGE_BYTES`` bytes.
        OSError: it can't be opened or read.
    """
    # With the calls of the system, since a buffered file takes a tenth of a crop's time.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        limit = _limit("DHCL_MAX_IMAGE_BYTES", MAX_BYTES)
        if status.st_size > limit:
            raise DataError(
                f"the file must have at most {limit:,} bytes (got {status.st_size:,}; "
                "DHCL_MAX_IMAGE_BYTES sets the limit)"
            )
        data = os.read(file, status.st_size)
        # A read may give less than is there; the end moves where the file is being written.
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def check_size(width: int, height: int) -> None:
    """Refuse an image of too many pixels, before it is decoded.

    Raises:
        DataError: more than ``DHCL_MAX_PIXELS`` of them.
    """
    limit = _limit("DHCL_MAX_PIXELS", MAX_PIXELS)
    if width * height > limit:
        raise DataError(
            f"the image must have at most {limit:,} pixels (got {height:,} x {width:,}; "
            "DHCL_MAX_PIXELS sets the limit)"
        )


def check_header(data: bytes) -> bool:
    """Whether it is the header of a JPEG, PNG or WebP that tells its size, which is checked.

    Pillow tells the size of these too, when it opens them. That takes a while, and room for the
    canvas of a WebP is made then already.

    Raises:
        DataError: as :func:`check_size` says.
    """
    size = None
    if data.startswith(b"\xff\xd8\xff"):
        size = _size_of_jpeg(data)
    elif data.startswith(b"\x89PNG") and len(data) >= 24:
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _size_of_webp(data)
    if size is not None:
        check_size(*size)
    return size is not None


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the first frame header, found as libjpeg finds it (ITU-T T.81, B.2.2)."""
    at = 2
    while True:
        # libjpeg passes over what is no marker, and takes a stuffed zero for none.
        at = data.find(b"\xff", at)
        while 0 <= at < len(data) and data[at] == 0xFF:
            at += 1
        if at < 0 or at + 8 > len(data):
            return None
        marker, at = data[at], at + 1
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # these have no length
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[at + 3 : at + 5], data[at + 5 : at + 7]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        if marker in (0xD8, 0xD9, 0xDA):
            return None
        at += int.from_bytes(data[at : at + 2], "big")


def _size_of_webp(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the canvas or of the only frame (RFC 9649, 2.5 to 2.7; RFC 6386, 9.1)."""
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8X":
        width, height = data[24:27], data[27:30]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        bits = int.from_bytes(data[26:30], "little")
        return bits & 0x3FFF, bits >> 16 & 0x3FFF
    return None


def _limit(name: str, default: int) -> int:
    """A limit as the environment has it."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdecimal() or len(value) > 18 or int(value) < 1:
        raise DataError(f"{name}: must be a whole number of at least 1 (got {value[:40]!r})")
    return int(value)
