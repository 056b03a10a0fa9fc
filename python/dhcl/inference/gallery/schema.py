"""What every store keeps of an image, as Arrow columns, and how damage to it is found.

=============  =========================  =======================================================
column         Arrow type                 what
=============  =========================  =======================================================
``row``        int64                      number of the image, never given twice, in order of coming
``feature``    fixed_size_list<float>[d]  of length 1
``root``       int32                      number of the folder it was found in
``path``       string                     below that folder, with ``/``, see :func:`written`
``id``         string                     identity, ``-1`` for unknown
``camera``     string                     camera, ``-1`` for unknown
``time``       double, or null            seconds, of the pattern's group ``time``
``size``       int64                      bytes of the file when its feature was extracted
``mtime_ns``   int64                      its time of change then
``model``      string                     fingerprint of the model
``sum``        int64                      CRC-32 of ``row`` and ``feature``
``about_sum``  int64                      CRC-32 of ``row`` and everything else
=============  =========================  =======================================================
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.stored import Damaged
from dhcl.words import show

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "ABOUT_COLUMNS",
    "FEATURE_COLUMNS",
    "About",
    "Record",
    "arrow_batch",
    "arrow_schema",
    "checked_features",
    "checked_records",
    "read",
    "text_of",
    "written",
]

FEATURE_COLUMNS = ("row", "feature", "sum")
"""What :func:`checked_features` needs."""

ABOUT_COLUMNS = (
    *("row", "root", "path", "id", "camera", "time", "size", "mtime_ns", "model", "about_sum"),
)
"""What :func:`checked_records` needs."""

# By how much a row's length may differ from 1, for features that were rounded to half precision.
_LENGTH = 1e-2

# A byte of a file's name that is no UTF-8 is written as one of these 128 characters, which Unicode
# has set aside for private use; their own bytes in a name are written so too.
_ESCAPES = 0x10FE00
_ESCAPED = re.compile("[\U0010fe80-\U0010feff]")


@dataclass(frozen=True)
class Record:
    """An image of an index.

    Attributes:
        root: number of the folder it was found in.
        path: below that folder, with ``/``.
        id, camera: as the index's pattern reads them off the path, -1 for unknown.
        size, mtime_ns: of the file when its features were extracted.
        time: in seconds, as the pattern reads it, None for unknown.
    """

    root: int
    path: str
    id: int | str
    camera: int | str
    size: int
    mtime_ns: int
    time: float | None = None


@dataclass(frozen=True)
class About:
    """What an index says of itself.

    Attributes:
        model: fingerprint of the model (:attr:`dhcl.ReID.id`).
        run, which: that model's run and checkpoint.
        pattern: what identities, cameras and times are read with, or None.
        trained_cameras: whether cameras are those of the training, with their statistics.
        roots: folders the images were found in, by number; a change may add some at the end.
        width: d, features of an image.
    """

    model: str
    run: str
    which: Literal["last", "best"]
    pattern: str | None
    trained_cameras: bool
    roots: tuple[str, ...]
    width: int


def arrow_schema(width: int) -> pyarrow.Schema:
    """The columns of an index whose features have this width."""
    import pyarrow as pa

    kinds = {
        "row": pa.int64(),
        "feature": pa.list_(pa.float32(), width),
        "root": pa.int32(),
        **dict.fromkeys(("path", "id", "camera"), pa.string()),
        "time": pa.float64(),
        **dict.fromkeys(("size", "mtime_ns"), pa.int64()),
        "model": pa.string(),
        **dict.fromkeys(("sum", "about_sum"), pa.int64()),
    }
    return pa.schema([pa.field(name, kind, name == "time") for name, kind in kinds.items()])


def written(name: str) -> str:
    """A file's name, which may hold any bytes, as text that is UTF-8; other names stay as they are.

    Raises:
        ValueError: half of a surrogate pair, which no file's name has.
    """
    plain = _ESCAPED.sub(lambda found: found[0].encode().decode("ascii", "surrogateescape"), name)
    text = re.sub("[\udc80-\udcff]", lambda x: chr(ord(x[0]) - 0xDC00 + _ESCAPES), plain)
    text.encode()
    return text


def text_of(value: int | str) -> str:
    """An identity or camera as its column has it."""
    return written(str(value))


def read(text: str) -> str:
    """The name that :func:`written` has written."""
    plain = _ESCAPED.sub(lambda found: chr(ord(found[0]) - _ESCAPES + 0xDC00), text)
    return plain.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def arrow_batch(
    rows: NDArray[np.int64], features: NDArray[np.float32], records: Sequence[Record], model: str
) -> pyarrow.RecordBatch:
    """A batch of :func:`arrow_schema`, with its checksums.

    Args:
        rows: (n,) numbers of the images.
        features: (n, d), rows of length 1.
        records: n images.
        model: fingerprint of the model.

    Raises:
        Damaged: a feature whose length is not 1.
        ValueError: a path that is not below its root.
    """
    import pyarrow as pa

    features = np.ascontiguousarray(features, "<f4")
    rows = np.ascontiguousarray(rows, "<i8")
    _check_lengths(rows, features)
    for record in records:
        _check_path(record.path)
    columns: dict[str, Any] = {
        "row": rows,
        "feature": pa.FixedSizeListArray.from_arrays(
            pa.array(features.reshape(-1)), features.shape[1]
        ),
        "root": [record.root for record in records],
        "path": [written(record.path) for record in records],
        "id": [text_of(record.id) for record in records],
        "camera": [text_of(record.camera) for record in records],
        "time": [record.time for record in records],
        "size": [record.size for record in records],
        "mtime_ns": [record.mtime_ns for record in records],
        "model": [model] * len(records),
        "sum": _feature_sums(rows, features),
    }
    columns["about_sum"] = _about_sums(columns)
    schema = arrow_schema(features.shape[1])
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, schema.field(name).type)
        for name, values in ((name, columns[name]) for name in schema.names)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def checked_features(
    batch: pyarrow.RecordBatch, width: int, *, check: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Numbers (n,) and features (n, d) of a batch with :data:`FEATURE_COLUMNS`.

    Args:
        batch: as a store gives it.
        width: d.
        check: whether to look at checksums and lengths, which takes about as long as reading.

    Raises:
        Damaged: they are not as they were written.
    """
    try:
        rows = batch["row"].to_numpy(zero_copy_only=False).astype("<i8", copy=False)
        flat = batch["feature"].flatten().to_numpy(zero_copy_only=False)
        features = flat.reshape(len(rows), width)
        if check:
            stored = batch["sum"].to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(stored != _feature_sums(rows, features))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise Damaged(f"features are not (n, {width}) numbers") from error
    if check:
        if len(wrong):
            raise Damaged(
                f"the feature of row {rows[wrong[0]]} is not as it was written: its checksum is "
                "another"
            )
        _check_lengths(rows, features)
    return rows, features


def checked_records(batch: pyarrow.RecordBatch, model: str, roots: int) -> list[Record]:
    """The images of a batch with :data:`ABOUT_COLUMNS`.

    Args:
        batch: as a store gives it.
        model: fingerprint that each row must have.
        roots: number of folders.

    Raises:
        Damaged: they are not as they were written, of another model, or below no known folder.
    """
    columns = {name: batch[name].to_pylist() for name in ABOUT_COLUMNS}
    try:
        sums = _about_sums(columns)
        images = [
            Record(root, read(path), identifier(read(id)), identifier(read(camera)), size, at, time)
            for root, path, id, camera, size, at, time in zip(
                *(columns[name] for name in ("root", "path", "id", "camera", "size", "mtime_ns")),
                columns["time"],
                strict=True,
            )
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise Damaged("rows without what every row has") from error
    wrong = next((n for n, s in enumerate(sums) if s != columns["about_sum"][n]), None)
    if wrong is not None:
        raise Damaged(
            f"row {columns['row'][wrong]} is not as it was written: its checksum is another"
        )
    for number, image, other in zip(columns["row"], images, columns["model"], strict=True):
        if other != model:
            raise Damaged(f"row {number} is of the model {show(other[:12])}")
        if not 0 <= image.root < roots:
            raise Damaged(f"row {number} names a root beyond the {roots} there are")
        try:
            _check_path(image.path)
        except ValueError as error:
            raise Damaged(f"row {number}, path: {error}") from error
    return images


def _check_path(path: str) -> None:
    parts = PurePosixPath(path)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ValueError("must lie below its root")


def _check_lengths(rows: NDArray[np.int64], features: NDArray[np.float32]) -> None:
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features))
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH))
    if len(wrong):
        raise Damaged(
            f"features must have length 1 (got {lengths[wrong[0]]:.6g} in row "
            f"{int(rows[wrong[0]])})"
        )


def _feature_sums(rows: NDArray[np.int64], features: NDArray[np.float32]) -> NDArray[np.int64]:
    crc = zlib.crc32
    heads = np.ascontiguousarray(rows, "<i8").view("u1").reshape(len(rows), 8)
    data = np.ascontiguousarray(features, "<f4").view("u1")
    sums = (crc(values, crc(head)) for head, values in zip(heads, data, strict=True))  # type: ignore[arg-type]
    return np.fromiter(sums, np.int64, len(rows))


def _about_sums(columns: dict[str, Any]) -> list[int]:
    texts = zip(*(columns[name] for name in ABOUT_COLUMNS[:-1]), strict=True)
    return [zlib.crc32(repr(_plain(values)).encode()) for values in texts]


def _plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a row, so that it is written one way, whatever kind of number each comes as."""
    row, root, path, id, camera, time, size, mtime_ns, model = values
    at = None if time is None else float(time)
    whole = (int(row), int(root), cast(str, path), id, camera, at)
    return (*whole, int(size), int(mtime_ns), model)
