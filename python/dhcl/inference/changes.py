"""Changes of an index: which images come and go, and that only new and changed ones are looked at.

:class:`dhcl.inference.index.Index` stands above, so whoever changes a store says what opens it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dhcl.data import image_files, path_reader, time_reader
from dhcl.errors import ConfigError, DataError
from dhcl.inference import neighbours
from dhcl.inference.gallery.places import Address, open_store
from dhcl.inference.gallery.schema import Record, arrow_batch
from dhcl.inference.gallery.store import EVERYTHING, Store, Where, Writer
from dhcl.inference.reid import ReID
from dhcl.stored import Damaged
from dhcl.words import first_ones, show

__all__ = [
    "Update",
    "Wanted",
    "add",
    "change",
    "listed",
    "remove",
    "renew_neighbours",
]

# Files that a store is asked for by name; of more, all images are looked through.
_FEW = 1000


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


class Gallery(neighbours.Gallery, Protocol):
    """What is asked of :class:`dhcl.inference.index.Index` besides."""

    address: str
    roots: tuple[str, ...]
    pattern: str | None

    def images(self, where: Where = EVERYTHING) -> Iterator[tuple[int, Record]]:
        """Numbers and images, in the order of rows."""

    def path_of(self, record: Record) -> Path:
        """The file of an image."""

    def places(self, path: str) -> list[tuple[int, str]]:
        """Where in which roots an absolute path is."""

    def check_model(self, model: ReID) -> None:
        """Raise an error unless this model made it."""


Opener = Callable[[Store], Gallery]


def add(
    opener: Opener,
    folder: Address,
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    sync: bool = False,
    **options: Any,
) -> Update:
    """As :func:`dhcl.inference.update.add_images`."""
    index = opener(open_store(folder))
    index.check_model(model)
    wanted = listed(gallery)
    with index.store.writing() as writer:
        opener(writer.now).check_model(model)
        done = change(opener(writer.now), writer, wanted, model, sync, options)
    _keep_neighbours(opener, folder)
    return done


def remove(opener: Opener, folder: Address, paths: Sequence[str | os.PathLike[str]]) -> Update:
    """As :func:`dhcl.inference.update.remove_images`."""
    with open_store(folder).writing() as writer:
        old = opener(writer.now)
        places = [_absolute(path) for path in paths]
        hits = dict.fromkeys(places, 0)
        gone = []
        for number, path in _known(old, places, places):
            place = next((p for p in places if _below(path, p)), None)
            if place is not None:
                hits[place] += 1
                gone.append(number)
        without = [place for place, count in hits.items() if not count]
        if without:
            raise ConfigError(f"remove: {show(old.address)} has no image {show(without[0])}")
        total = len(old) - len(gone)
        _check_left(old, total)
        writer.delete(np.array(gone, np.int64))
    _keep_neighbours(opener, folder)
    return Update(removed=len(gone), total=total)


def renew_neighbours(
    opener: Opener, folder: Address, progress: Callable[[str, int, int], None] | None = None
) -> int:
    """As :func:`dhcl.inference.update.find_neighbours`."""
    with open_store(folder).writing() as writer:
        missing = neighbours.missing_lists(opener(writer.now), progress=progress)
        if missing is None:
            return 0
        lists, all_of_them = missing
        if all_of_them:
            writer.drop_neighbours()
        writer.put_neighbours(lists)
    return len(lists.rows)


def _keep_neighbours(opener: Opener, folder: Address) -> None:
    """After a change, where they are known."""
    if open_store(folder).neighbours() is not None:
        renew_neighbours(opener, folder)


def _check_left(index: Gallery, total: int) -> None:
    if not total:
        raise ConfigError(f"index: {show(index.address)} would be empty; remove it instead")


def _known(
    index: Gallery, paths: Collection[str], folders: Collection[str]
) -> Iterator[tuple[int, str]]:
    """Numbers and absolute paths of images that are these files, or lie below these folders.

    Of many files, those of all images, which then is quicker.
    """
    for number, record in _records(index, paths, folders):
        yield number, str(index.path_of(record))


def _records(
    index: Gallery, paths: Collection[str], folders: Collection[str]
) -> Iterator[tuple[int, Record]]:
    if len(paths) > _FEW or len(folders) > _FEW:
        yield from index.images()
        return
    files = frozenset(place for path in paths for place in index.places(path) if place[1])
    below = tuple(dict.fromkeys(place for each in folders for place in index.places(each)))
    seen = set()
    for where in (Where(paths=files), Where(below=below)):
        for number, record in index.images(where):
            if number not in seen:
                seen.add(number)
                yield number, record


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(Path(path).expanduser())


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@dataclass(frozen=True)
class Wanted:
    """Files by absolute path with the folder they were found in, and the folders themselves."""

    roots: dict[str, str]
    folders: list[str]


def listed(gallery: Sequence[str | os.PathLike[str]]) -> Wanted:
    """All images of folders, and single files.

    Raises:
        DataError: there is none, or a folder without images.
    """
    wanted = Wanted({}, [])
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
    again: set[str]  # paths of changed rows


def _size_and_time(path: str) -> tuple[int, int]:
    """Of a file; zeros where a link leads nowhere, which the model then names as a bad image."""
    try:
        about = os.stat(path)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _plan(old: Gallery, wanted: Wanted, sync: bool) -> _Plan:
    roots = list(old.roots)
    numbers = {root: number for number, root in enumerate(roots)}
    read, read_time = path_reader(old.pattern), time_reader(old.pattern)
    folders = wanted.folders if sync else []
    known = {
        str(old.path_of(record)): (row, record)
        for row, record in _records(old, wanted.roots, folders)
    }
    changed: set[int] = set()
    again: set[str] = set()
    new: list[tuple[str, Record]] = []
    for path, root in wanted.roots.items():
        about = _size_and_time(path)
        if path in known:
            row, record = known[path]
            if (record.size, record.mtime_ns) == about:
                continue
            changed.add(row)
            again.add(path)
            root = old.roots[record.root]
        if root not in numbers:
            numbers[root] = len(roots)
            roots.append(root)
        name = Path(path).relative_to(root).as_posix()
        record = Record(numbers[root], name, *read(name), *about, read_time(name))
        new.append((path, record))
    gone = {
        row
        for path, (row, _) in known.items()
        if sync and path not in wanted.roots and any(_below(path, f) for f in wanted.folders)
    }
    return _Plan(tuple(roots), changed, gone, new, again)


def change(
    old: Gallery,
    writer: Writer,
    wanted: Wanted,
    model: ReID,
    sync: bool,
    options: dict[str, Any],
) -> Update:
    """Bring what is wanted into a store that is held.

    Args:
        old: what ``writer.now`` holds.
        writer: of the store.
        wanted: files, see :func:`listed`.
        model: the one that made the index.
        sync: also remove images below these folders that are there no longer.
        options: as of :func:`dhcl.inference.update.create_index`.

    Raises:
        ConfigError: nothing would be left. DataError: as :meth:`dhcl.ReID.features`.
    """
    plan = _plan(old, wanted, sync)
    new, drop = plan.new, sorted(plan.changed | plan.gone)
    unchanged = len(old) - len(drop)
    if not new and not drop:
        return Update(unchanged=unchanged, total=len(old))
    bad: list[tuple[int, str]] = []
    writer.set_about(dataclasses.replace(writer.now.about, roots=plan.roots))
    inserted = writer.insert(_extracted(writer.now, model, new, bad, options))
    total = unchanged + inserted
    _check_left(old, total)
    # Last, so that an image which is to be replaced is there until the new one is.
    writer.delete(np.array(drop, np.int64))
    # A changed file that can't be read any more counts as left out.
    left_out = {index for index, _ in bad}
    again = sum(new[index][0] in plan.again for index in left_out)
    return Update(
        added=len(new) - len(plan.changed) - (len(left_out) - again),
        changed=len(plan.changed) - again,
        unchanged=unchanged,
        removed=len(plan.gone),
        total=total,
        bad=tuple(f"{show(new[index][0])}: {reason}" for index, reason in sorted(bad)),
    )


def _extracted(
    store: Store,
    model: ReID,
    new: list[tuple[str, Record]],
    bad: list[tuple[int, str]],
    options: dict[str, Any],
) -> Iterator[Any]:
    """Batches of new rows, as their features come from the model."""
    if not new:
        return
    about = store.about
    cameras = None
    if about.trained_cameras:
        cameras = model.camera_indices([record.camera for _, record in new])
    paths = [path for path, _ in new]
    number = store.next_row
    try:
        for batch in model.batches(paths, cameras, bad=bad, **options):
            rows = np.arange(number, number + len(batch.indices))
            number += len(rows)
            records = [new[i][1] for i in batch.indices]
            if len(rows):
                yield arrow_batch(rows, batch.features.numpy(), records, about.model)
    except Damaged as error:
        raise DataError(f"index: {error}") from error
    except DataError:
        # Where all new images are bad and are to be skipped, the old ones are still worth keeping.
        if not (len(store) and options.get("on_bad") == "skip" and len(bad) == len(new)):
            raise
