"""Indexes of format 1, which earlier versions wrote, to be read once and converted.

A folder with ``index.json``, which names the model and the two files of the present generation:
``features-G.npy``, (N, d) float32, memory-mapped, and ``images-G.jsonl``, a line per row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    StrictBool,
    TypeAdapter,
    ValidationError,
)

from dhcl.errors import DataError
from dhcl.inference.gallery.head import OLD_FORMAT, damaged, first_wrong, read_about
from dhcl.inference.gallery.schema import About, Record
from dhcl.npy import read_npy
from dhcl.stored import Damaged, checksum, parse_json, read_text
from dhcl.words import show

__all__ = ["OldIndex", "read_old"]

# Bytes of a record's line at most: a path has 4096, of which each may be written as six.
_MAX_LINE = 1 << 15

# By how much a row's length may differ from 1, for features that were rounded to half precision.
_LENGTH = 1e-2

# Rows that are looked at together.
_BLOCK = 1 << 12

_KNOWN = ConfigDict(extra="forbid")
# Not `str`, of which pydantic takes no names of files that are not UTF-8.
_Text = InstanceOf[str]
_Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


def _below_root(path: str) -> str:
    parts = PurePosixPath(path)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ValueError("must lie below its root")
    return path


@dataclass(frozen=True)
class _Line:
    """A line of ``images-G.jsonl``, see :class:`dhcl.inference.gallery.schema.Record`."""

    __pydantic_config__: ClassVar[ConfigDict] = _KNOWN

    root: _Count
    path: Annotated[_Text, AfterValidator(_below_root)]
    id: _Int64 | _Text
    camera: _Int64 | _Text
    size: _Count
    mtime_ns: _Int64


class _Checksums(BaseModel):
    """CRC-32 of what an index holds; of ``index.json`` all but what may be edited."""

    model_config = _KNOWN

    head: _Count
    features: _Count
    images: _Count


class _Head(BaseModel):
    """What ``index.json`` says; indexes of earlier versions have no checksums."""

    model_config = _KNOWN

    format: Literal[1]
    generation: _Count
    images: _Count
    dim: _Count
    model: _Text
    run: _Text
    which: Literal["last", "best"]
    pattern: _Text | None
    trained_cameras: StrictBool
    roots: list[_Text]
    checksums: _Checksums | None = None


# What people may edit where the gallery or the run has moved.
_EDITABLE = ("run", "roots", "checksums")


def _head_checksum(about: Mapping[str, Any]) -> int:
    """Of what ``index.json`` says, however it is laid out."""
    fixed = {name: value for name, value in about.items() if name not in _EDITABLE}
    return checksum(json.dumps(fixed, sort_keys=True).encode())


@functools.cache
def _lines() -> TypeAdapter[list[_Line]]:
    return TypeAdapter(list[_Line])


@dataclass(frozen=True, eq=False)
class OldIndex:
    """What an index of format 1 holds: N images, and their features (N, d), memory-mapped."""

    about: About
    records: tuple[Record, ...]
    features: NDArray[np.float32]


def read_old(folder: Path) -> OldIndex:
    """An index of format 1.

    All of it is read and checked: types, ranges, checksums, where it has some, and that rows have
    length 1.

    Raises:
        DataError: no index there, one of another format, or damaged.
    """
    for last_try in (False, True):
        about = read_about(folder)
        if about["format"] != OLD_FORMAT:
            raise DataError(f"index: {show(folder)} is of the present format already")
        try:
            return _of_generation(folder, about)
        except FileNotFoundError as error:
            # Between the two reads another process may have replaced it.
            if last_try:
                raise damaged(folder, f"there is no {show(str(error.filename))}") from error
        except OSError as error:
            raise DataError(f"index: {show(folder)} can't be read ({error.strerror})") from error
        except ValidationError as error:
            raise damaged(folder, first_wrong(error)) from error
        except Damaged as error:
            raise damaged(folder, str(error)) from error
    raise AssertionError


def _of_generation(folder: Path, about: dict[str, Any]) -> OldIndex:
    head = _Head.model_validate(about)
    if head.checksums and head.checksums.head != _head_checksum(about):
        raise Damaged("index.json is not as it was written, beyond run and roots")
    features = read_npy(folder / f"features-{head.generation}.npy", mapped=True)
    name = f"images-{head.generation}.jsonl"
    text = read_text(folder / name, len(features) * _MAX_LINE if features.ndim else 0)
    try:
        records = _lines().validate_python([parse_json(line) for line in text.splitlines()])
    except Damaged as error:
        raise Damaged(f"{name}, {error}") from error
    expected = (len(records), head.dim)
    if features.shape != expected or features.dtype != np.float32 or head.images != len(records):
        raise Damaged(
            f"{len(records)} images, features {features.shape} {features.dtype}, "
            f"index.json has {head.images} of {head.dim}"
        )
    if head.checksums and head.checksums.images != checksum(text.encode()):
        raise Damaged(f"{name} is not as it was written: its checksum is another")
    if max((record.root for record in records), default=0) >= len(head.roots):
        raise Damaged(f"{name} names a root beyond the {len(head.roots)} of index.json")
    found = _checked(features)
    if head.checksums and head.checksums.features != found:
        raise Damaged("features are not as they were written: their checksum is another")
    said = About(
        model=head.model,
        run=head.run,
        which=head.which,
        pattern=head.pattern,
        trained_cameras=head.trained_cameras,
        roots=tuple(head.roots),
        width=head.dim,
    )
    return OldIndex(said, tuple(Record(**vars(line)) for line in records), features)


def _checked(features: NDArray[np.float32], start: int = 0) -> int:
    """The checksum of rows (n, d), each of which must have length 1, going on from one."""
    for first in range(0, len(features), _BLOCK):
        block = np.ascontiguousarray(features[first : first + _BLOCK])
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
            wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH))
        if len(wrong):
            raise Damaged(
                f"features must have length 1 (got {lengths[wrong[0]]:.6g} in row "
                f"{first + int(wrong[0])})"
            )
        start = checksum(block, start)
    return start
