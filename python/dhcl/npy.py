"""Arrays in ``.npy`` files, whose header is judged before memory is taken for the numbers."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dhcl.stored import Damaged, open_stored

__all__ = ["NpyHeader", "read_npy", "read_npy_header"]


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
