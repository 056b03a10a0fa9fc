"""Making an index of a gallery, and changing it: only new and changed images are looked at."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhcl.data import image_files, path_reader
from dhcl.data.folders import check_matched
from dhcl.errors import ConfigError, DataError
from dhcl.inference.index import Index
from dhcl.inference.reid import ReID
from dhcl.inference.store import Record, strangers, write_generation, writing
from dhcl.words import first_ones, show

__all__ = ["Update", "add_images", "create_index", "remove_images"]

# Rows copied at a time.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Update:
    """What a change of an index did: numbers of images, and what was left out."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    total: int = 0
    bad: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{count:,} {name}"
            for name in ("added", "changed", "unchanged", "removed")
            if (count := getattr(self, name))
        ]
        lines = [f"{', '.join(parts) or 'nothing to do'}; {self.total:,} images in the index"]
        if self.bad:
            lines.append(f"left out, {len(self.bad):,} that can't be read:")
            lines += [f"  {line}" for line in first_ones(self.bad)]
        return "\n".join(lines)


def create_index(
    folder: str | os.PathLike[str],
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    pattern: str | None = None,
    trained_cameras: bool = False,
    **options: Any,
) -> Update:
    """Make an index of images.

    Args:
        folder: of the index, new or empty.
        gallery: folders of images, on all levels, and files.
        model: extracts the features.
        pattern: identities and cameras in the paths, as of :func:`dhcl.data.load_data`.
        trained_cameras: the cameras are those the model was trained on, under the same names; their
            statistics are used.
        options: ``batch_size``, ``workers``, ``on_bad`` and ``progress`` of
            :meth:`dhcl.ReID.features`.

    Raises:
        ConfigError: the folder holds an index or something else, or is being written; a pattern
            that matches no path.
        DataError: as :meth:`dhcl.ReID.features`; a pattern that is none.
    """
    folder = Path(folder).expanduser()
    path_reader(pattern)
    if (folder / "index.json").exists():
        raise ConfigError(
            f"out: {show(folder)} is an index already; --add, --sync and --remove change it"
        )
    if folder.exists() and (not folder.is_dir() or any(strangers(folder))):
        raise ConfigError(f"out: must be a new or empty folder (got {show(folder)})")
    nothing = Index(
        folder=folder,
        model=model.id,
        run=Path(os.path.abspath(model.run)),
        which="best" if model.which == "best" else "last",
        pattern=pattern,
        trained_cameras=trained_cameras,
        roots=(),
        records=(),
        features=np.empty((0, model.dim), np.float32),
        generation=0,
    )
    wanted = _listed(gallery)
    names = [Path(path).relative_to(root).as_posix() for path, root in wanted.roots.items()]
    check_matched(pattern, names, [path_reader(pattern)(name) for name in names])
    with writing(folder):
        return _change(nothing, wanted, model, False, options)


def add_images(
    folder: str | os.PathLike[str],
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    sync: bool = False,
    **options: Any,
) -> Update:
    """Add images to an index; of those in it already, only changed files are looked at again.

    Args:
        folder: of the index.
        gallery: folders of images, on all levels, and files.
        model: the one that made the index.
        sync: also remove images of the index that lie below these folders no longer.
        options: as of :func:`create_index`.

    Raises:
        ConfigError: another model. DataError: no index; as :meth:`dhcl.ReID.features`.
    """
    folder = Path(folder).expanduser()
    Index.open(folder).check_model(model)
    wanted = _listed(gallery)
    with writing(folder):
        old = Index.open(folder)
        old.check_model(model)
        return _change(old, wanted, model, sync, options)


def remove_images(
    folder: str | os.PathLike[str], paths: Sequence[str | os.PathLike[str]]
) -> Update:
    """Remove images from an index: files, and all below folders, whether still there or not.

    Raises:
        ConfigError: a path of which the index has nothing; nothing would be left.
        DataError: no index.
    """
    folder = Path(folder).expanduser()
    Index.open(folder)
    with writing(folder):
        old = Index.open(folder)
        places = [_absolute(path) for path in paths]
        hits = dict.fromkeys(places, 0)
        keep = []
        for row in range(len(old)):
            place = next((p for p in places if _below(str(old.path(row)), p)), None)
            if place is None:
                keep.append(row)
            else:
                hits[place] += 1
        without = [place for place, count in hits.items() if not count]
        if without:
            raise ConfigError(f"remove: {show(old.folder)} has no image {show(without[0])}")
        _replace(old, old.roots, keep, ())
        return Update(removed=len(old) - len(keep), total=len(keep))


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(Path(path).expanduser())


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@dataclass(frozen=True)
class _Wanted:
    """Files by absolute path with the folder they were found in, and the folders themselves."""

    roots: dict[str, str]
    folders: list[str]


def _listed(gallery: Sequence[str | os.PathLike[str]]) -> _Wanted:
    wanted = _Wanted({}, [])
    for each in gallery:
        place = _absolute(each)
        if os.path.isfile(place):
            wanted.roots.setdefault(place, os.path.dirname(place))
            continue
        wanted.folders.append(place)
        for file in image_files(place):
            wanted.roots.setdefault(str(file), place)
    if not wanted.roots:
        raise DataError("gallery: a folder of images or files must be given")
    return wanted


@dataclass(frozen=True)
class _Plan:
    """What a change is to do to an index: rows that go, images that come, and folders by number."""

    roots: tuple[str, ...]
    changed: set[int]
    gone: set[int]
    new: list[tuple[str, Record]]  # by absolute path; those of changed rows again


def _size_and_time(path: str) -> tuple[int, int]:
    """Of a file; zeros where a link leads nowhere, which the model then names as a bad image."""
    try:
        about = os.stat(path)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _plan(old: Index, rows: dict[str, int], wanted: _Wanted, sync: bool) -> _Plan:
    roots = list(old.roots)
    numbers = {root: number for number, root in enumerate(roots)}
    read = path_reader(old.pattern)
    changed: set[int] = set()
    new: list[tuple[str, Record]] = []
    for path, root in wanted.roots.items():
        about = _size_and_time(path)
        row = rows.get(path)
        if row is not None:
            record = old.records[row]
            if (record.size, record.mtime_ns) == about:
                continue
            changed.add(row)
            root = old.roots[record.root]
        if root not in numbers:
            numbers[root] = len(roots)
            roots.append(root)
        name = Path(path).relative_to(root).as_posix()
        record = Record(numbers[root], name, *read(name), *about)
        new.append((path, record))
    gone = {
        row
        for path, row in rows.items()
        if sync and path not in wanted.roots and any(_below(path, f) for f in wanted.folders)
    }
    return _Plan(tuple(roots), changed, gone, new)


def _change(
    old: Index, wanted: _Wanted, model: ReID, sync: bool, options: dict[str, Any]
) -> Update:
    rows = {str(old.path(row)): row for row in range(len(old))}
    plan = _plan(old, rows, wanted, sync)
    new, drop = plan.new, plan.changed | plan.gone
    unchanged = len(old) - len(drop)
    if not new and not drop:
        return Update(unchanged=unchanged, total=len(old))
    keep = [row for row in range(len(old)) if row not in drop]
    bad: list[tuple[int, str]] = []
    total = _replace(old, plan.roots, keep, _extracted(old, model, new, bad, options))
    # A changed file that can't be read any more counts as left out.
    left_out = {index for index, _ in bad}
    again = sum(new[index][0] in rows for index in left_out)
    return Update(
        added=len(new) - len(plan.changed) - (len(left_out) - again),
        changed=len(plan.changed) - again,
        unchanged=unchanged,
        removed=len(plan.gone),
        total=total,
        bad=tuple(f"{show(new[index][0])}: {reason}" for index, reason in sorted(bad)),
    )


def _replace(
    old: Index,
    roots: Sequence[str],
    keep: Sequence[int],
    new: Iterable[tuple[list[Record], torch.Tensor]],
) -> int:
    """Write the next generation: rows of the old one, then new ones. Returns their number."""
    kept = np.array(keep, np.int64)
    blocks = (kept[start : start + _BLOCK] for start in range(0, len(kept), _BLOCK))
    about = {
        "model": old.model,
        "run": str(old.run),
        "which": old.which,
        "pattern": old.pattern,
        "trained_cameras": old.trained_cameras,
        "roots": list(roots),
    }
    return write_generation(
        old.folder,
        old.generation + 1,
        old.features.shape[1],
        about,
        itertools.chain((([old.records[r] for r in b], old.features[b]) for b in blocks), new),
    )


def _extracted(
    index: Index,
    model: ReID,
    new: list[tuple[str, Record]],
    bad: list[tuple[int, str]],
    options: dict[str, Any],
) -> Iterator[tuple[list[Record], torch.Tensor]]:
    if not new:
        return
    cameras = None
    if index.trained_cameras:
        cameras = model.camera_indices([record.camera for _, record in new])
    paths = [path for path, _ in new]
    try:
        for batch in model.batches(paths, cameras, bad=bad, **options):
            yield [new[i][1] for i in batch.indices], batch.features
    except DataError:
        # Where all new images are bad and are to be skipped, the old ones are still worth keeping.
        if not (len(index) and options.get("on_bad") == "skip" and len(bad) == len(new)):
            raise
