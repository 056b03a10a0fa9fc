"""An index on disk.

A folder with ``index.json``, which names the model and the two files of the present generation:
``features-G.npy``, (N, d) float32, memory-mapped, and ``images-G.jsonl``, a line per row. A change
writes the next generation beside it and then replaces ``index.json``: at any moment, whatever
happens, the index is the old one or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
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

from dhcl.errors import ConfigError, DataError
from dhcl.files import NpyRows, Taken, write_atomic, writing_folder
from dhcl.npy import read_npy
from dhcl.stored import Damaged, checksum, parse_json, read_json, read_text
from dhcl.words import show

__all__ = ["Record", "read_stored", "strangers", "write_generation", "writing"]

_FORMAT = 1

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
class Record:
    """An image of an index.

    Attributes:
        root: number of the folder it was found in.
        path: below that folder, with ``/``.
        id, camera: as the index's pattern reads them off the path, -1 for unknown.
        size, mtime_ns: of the file when its features were extracted.
    """

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
def _records() -> TypeAdapter[list[Record]]:
    return TypeAdapter(list[Record])


def read_stored(folder: Path) -> dict[str, Any]:
    """The attributes of :class:`dhcl.inference.index.Index`, off the files of an index.

    All of it is read and checked: types, ranges, checksums, and that rows have length 1. Indexes
    without checksums, of earlier versions, get theirs with the next change.

    Raises:
        DataError: no index there, one of another version, or damaged.
    """
    for last_try in (False, True):
        about = _read_about(folder)
        try:
            return _of_generation(folder, about)
        except FileNotFoundError as error:
            # Between the two reads another process may have replaced it.
            if last_try:
                raise _damaged(folder, f"there is no {show(str(error.filename))}") from error
        except OSError as error:
            raise _unreadable(folder, error) from error
        except ValidationError as error:
            raise _damaged(folder, _first_wrong(error)) from error
        except Damaged as error:
            raise _damaged(folder, str(error)) from error
    raise AssertionError


def _of_generation(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    head = _Head.model_validate(about)
    if head.checksums and head.checksums.head != _head_checksum(about):
        raise Damaged("index.json is not as it was written, beyond run and roots")
    features = read_npy(folder / f"features-{head.generation}.npy", mapped=True)
    name = f"images-{head.generation}.jsonl"
    text = read_text(folder / name, len(features) * _MAX_LINE if features.ndim else 0)
    try:
        records = _records().validate_python([parse_json(line) for line in text.splitlines()])
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
    return {
        **head.model_dump(include={"model", "which", "pattern", "trained_cameras", "generation"}),
        "folder": folder,
        "run": Path(head.run),
        "roots": tuple(head.roots),
        "records": tuple(records),
        "features": features,
    }


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


def _first_wrong(error: ValidationError) -> str:
    """What pydantic says first, with the place: a line and a field, or a field of the head."""
    first = error.errors(include_url=False, include_context=False)[0]
    place: Sequence[Any] = first["loc"]
    if place and isinstance(place[0], int):
        place = (f"line {place[0] + 1}", *place[1:])
    said = first["msg"].removeprefix("Value error, ")
    return show(f"{', '.join(map(str, place))}: {said[:1].lower()}{said[1:]}")


def _read_about(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says, of a format that is known."""
    file = folder / "index.json"
    try:
        if not file.is_file():
            what = "it has no index.json" if folder.is_dir() else "there is no such folder"
            raise DataError(f"index: {show(folder)} is not an index, {what}")
        about = read_json(file)
    except OSError as error:
        raise _unreadable(folder, error) from error
    except Damaged as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        got = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise DataError(
            f"index: {show(folder)} must be of format {_FORMAT} (got {show(repr(got)[:40])}); "
            "make it anew"
        )
    return about


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(f"index: {show(folder)} can't be read ({error.strerror})")


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(
        f"index: {show(folder)} is damaged ({why}); make it anew: remove the folder, then "
        "`dhcl index`"
    )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with its holder, and leave no folder that is no index.

    Raises:
        ConfigError: at once, if another process is changing the index.
        NotPlainFile: the lock's file is a link, a FIFO or a device.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(writing_folder(folder, "index.json"))
        except Taken as error:
            raise ConfigError(
                f"index: {show(str(error))} is changing {show(folder)}; try again when it is done"
            ) from error
        try:
            yield
        finally:
            _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove the files of other generations than the present one, and half-written ones."""
    about = _read_about(folder) if (folder / "index.json").is_file() else {}
    generation = about.get("generation")
    present = (f"features-{generation}.npy", f"images-{generation}.jsonl")
    for pattern in ("features-*.npy", "images-*.jsonl", "*.partial"):
        for file in folder.glob(pattern):
            if file.name not in present:
                file.unlink(missing_ok=True)


def strangers(folder: Path) -> Iterator[Path]:
    """What no interrupted attempt to make an index has left."""
    for file in folder.iterdir():
        if not any(map(file.match, (".lock", "features-*.npy", "images-*.jsonl", "*.partial"))):
            yield file


def write_generation(
    folder: Path,
    generation: int,
    width: int,
    about: Mapping[str, Any],
    parts: Iterable[tuple[Iterable[Record], torch.Tensor | NDArray[np.float32]]],
) -> int:
    """Write both files of a generation, then ``index.json``, which makes it the present one.

    What an exception leaves behind is removed with the lock, see :func:`writing`.

    Args:
        folder: of the index.
        generation: its number.
        width: d, features of an image.
        about: what ``index.json`` says besides.
        parts: records of n images and their features (n, d), in the order of the rows.

    Returns:
        The number of rows.

    Raises:
        ConfigError: there are none. DataError: features that are not of length 1.
    """
    rows = NpyRows(folder / f"features-{generation}.npy", width)
    lines: list[str] = []
    crc = 0
    try:
        for records, features in parts:
            array = np.ascontiguousarray(np.asarray(features), dtype="<f4")
            try:
                crc = _checked(array, crc)
            except Damaged as error:
                raise DataError(f"index: {error}, after {rows.rows} rows") from error
            rows.append(array)
            lines.extend(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        if not rows.rows:
            raise ConfigError(f"index: {show(folder)} would be empty; remove the folder instead")
        rows.close()
    finally:
        rows.discard()
    images = "".join(lines).encode()
    write_atomic(folder / f"images-{generation}.jsonl", images)
    counts = {"format": _FORMAT, "generation": generation, "images": rows.rows, "dim": width}
    said = {**counts, **about}
    sums = {"head": _head_checksum(said), "features": crc, "images": checksum(images)}
    text = json.dumps({**said, "checksums": sums}, indent=1) + "\n"
    write_atomic(folder / "index.json", text.encode())
    return rows.rows
