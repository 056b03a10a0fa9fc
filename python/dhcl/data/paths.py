"""Paths of many files as one column: a list of ten million is two arrays, not as many objects."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["Paths"]

# Paths that are copied or decoded at once.
_CHUNK = 1 << 16


class Paths(Sequence[Path]):
    """A sequence of paths, which are made when they are asked for.

    Their texts lie side by side in one buffer, as those of an Arrow string column do. A ``Path``
    takes several times the bytes of its text, and a forked worker process copies the pages of all
    objects that it looks at, since looking counts references. Here there is nothing to count.

    Args:
        paths: of files, in any form that ``Path`` takes.
    """

    __slots__ = ("_offsets", "_text")
    _text: bytes
    _offsets: NDArray[np.int64]

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        made = Paths.of_texts(
            os.fspath(path if isinstance(path, Path) else Path(path)) for path in paths
        )
        self._text, self._offsets = made._text, made._offsets

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Paths:
        """Paths from their texts, which must be as ``str(Path(text))`` would write them."""
        buffer, ends = bytearray(), array("q", [0])
        for text in texts:
            buffer += os.fsencode(text)
            ends.append(len(buffer))
        return cls._of(bytes(buffer), np.array(ends, np.int64))

    @classmethod
    def _of(cls, text: bytes, offsets: NDArray[np.int64]) -> Paths:
        made = cls.__new__(cls)
        made._text, made._offsets = text, offsets
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Paths._of, (self._text, self._offsets)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self._text) + int(self._offsets.nbytes)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Paths: ...

    def __getitem__(self, index: int | slice) -> Path | Paths:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]
        begin, end = int(self._offsets[place]), int(self._offsets[place + 1])
        return Path(os.fsdecode(self._text[begin:end]))

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts())

    def texts(self) -> Iterator[str]:
        """``str`` of each path."""
        for start in range(0, len(self), _CHUNK):
            cuts = self._offsets[start : start + _CHUNK + 1].tolist()
            for begin, end in itertools.pairwise(cuts):
                yield os.fsdecode(self._text[begin:end])

    def names(self) -> Iterator[str]:
        """The last part of each path."""
        return (text.rpartition(os.sep)[2] for text in self.texts())

    def take(self, indices: NDArray[np.int64]) -> Paths:
        """The paths at these places, none of them negative, in that order."""
        starts, sizes = self._offsets[indices], np.diff(self._offsets)[indices]
        offsets = np.concatenate((np.zeros(1, np.int64), sizes.cumsum()))
        source = np.frombuffer(self._text, np.uint8)
        text = np.empty(int(offsets[-1]), np.uint8)
        for start in range(0, len(indices), _CHUNK):
            part = slice(start, start + _CHUNK)
            begin, end = int(offsets[start]), int(offsets[min(start + _CHUNK, len(indices))])
            shift = np.repeat(starts[part] - offsets[:-1][part], sizes[part])
            text[begin:end] = source[shift + np.arange(begin, end)]
        return Paths._of(text.tobytes(), offsets)

    def __add__(self, other: Paths) -> Paths:
        if not isinstance(other, Paths):
            return NotImplemented
        offsets = np.concatenate((self._offsets, other._offsets[1:] + self._offsets[-1]))
        return Paths._of(self._text + other._text, offsets)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            same = np.array_equal(self._offsets, other._offsets)
            return same and self._text == other._text
        if not isinstance(other, (tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(map(Path.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} paths>"
