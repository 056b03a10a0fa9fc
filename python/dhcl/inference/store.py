"""An index on disk.

A folder with ``index.json``, which names the model and the two files of the present generation:
``features-G.npy``, (N, d) float32, memory-mapped, and ``images-G.jsonl``, a line per row. A change
writes the next generation beside it and then replaces ``index.json``: at any moment, whatever
happens, the index is the old one or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.errors import ConfigError, DataError
from dhcl.files import NpyRows, only_writer, write_atomic
from dhcl.words import show

__all__ = ["Record", "read_stored", "strangers", "write_generation", "writing"]

_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """An image of an index.

    Attributes:
        root: number of the folder it was found in.
        path: below that folder, with ``/``.
        id, camera: as the index's pattern reads them off the path, -1 for unknown.
        size, mtime_ns: of the file when its features were extracted.
    """

    root: int
    path: str
    id: int | str
    camera: int | str
    size: int
    mtime_ns: int


def read_stored(folder: Path) -> dict[str, Any]:
    """The attributes of :class:`dhcl.inference.index.Index`, off the files of an index.

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
    raise AssertionError


def _of_generation(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    try:
        generation = int(about["generation"])
        text = (folder / f"images-{generation}.jsonl").read_text(encoding="utf-8")
        records = tuple(Record(**json.loads(line)) for line in text.splitlines())
        features = np.load(folder / f"features-{generation}.npy", mmap_mode="r")
        stored = {
            "folder": folder,
            "model": str(about["model"]),
            "run": Path(about["run"]),
            "which": about["which"],
            "pattern": about["pattern"],
            "trained_cameras": bool(about["trained_cameras"]),
            "roots": tuple(about["roots"]),
            "records": records,
            "features": features,
            "generation": generation,
        }
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    if features.ndim != 2 or len(features) != len(records) or features.dtype != np.float32:
        raise _damaged(folder, f"{len(records)} images, features {features.shape} {features.dtype}")
    return stored


def _read_about(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says."""
    file = folder / "index.json"
    if not file.is_file():
        what = "it has no index.json" if folder.is_dir() else "there is no such folder"
        raise DataError(f"index: {show(folder)} is not an index, {what}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(folder, f"index.json, {error}") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        got = about.get("format") if isinstance(about, dict) else about
        raise DataError(
            f"index: {show(folder)} must be of format {_FORMAT} (got {got!r}); make it anew"
        )
    return about


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(f"index: {show(folder)} is damaged ({why}); make it anew")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with its holder, and leave no folder that is no index.

    Raises:
        ConfigError: at once, if another process is changing the index.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_writer(folder / ".lock"))
        except TimeoutError as error:
            raise ConfigError(
                f"index: another process is changing {show(folder)}; try again when it is done"
            ) from error
        try:
            yield
        finally:
            _tidy(folder)
            if made and not (folder / "index.json").exists():
                (folder / ".lock").unlink()
                folder.rmdir()


def _tidy(folder: Path) -> None:
    """Remove the files of other generations than the present one."""
    about = _read_about(folder) if (folder / "index.json").is_file() else {}
    present = f"-{about.get('generation')}."
    for pattern in ("features-*.npy", "images-*.jsonl", "*.partial"):
        for file in folder.glob(pattern):
            if present not in file.name:
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
        ConfigError: there are none.
    """
    rows = NpyRows(folder / f"features-{generation}.npy", width)
    lines: list[str] = []
    for records, features in parts:
        rows.append(features)
        lines.extend(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
    if not rows.rows:
        raise ConfigError(f"index: {show(folder)} would be empty; remove the folder instead")
    rows.close()
    write_atomic(folder / f"images-{generation}.jsonl", "".join(lines).encode())
    counts = {"format": _FORMAT, "generation": generation, "images": rows.rows, "dim": width}
    text = json.dumps({**counts, **about}, indent=1) + "\n"
    write_atomic(folder / "index.json", text.encode())
    return rows.rows
