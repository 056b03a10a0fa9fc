"""Making an index of a gallery, and changing it: only new and changed images are looked at."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dhcl.data import image_files, path_reader, time_reader
from dhcl.data.folders import check_matched
from dhcl.errors import ConfigError, DataError, as_path
from dhcl.inference.gallery.lance import compact, replacing_old
from dhcl.inference.gallery.old import read_old
from dhcl.inference.gallery.places import Address, creating, is_folder, open_store
from dhcl.inference.gallery.schema import About, Record, arrow_batch
from dhcl.inference.gallery.store import BLOCK, Store, Where, Writer
from dhcl.inference.index import Index
from dhcl.inference.neighbours import missing_lists
from dhcl.inference.reid import ReID
from dhcl.stored import Damaged
from dhcl.words import first_ones, show

__all__ = [
    "Update",
    "add_images",
    "compact_index",
    "convert_index",
    "create_index",
    "find_neighbours",
    "remove_images",
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


def create_index(
    folder: Address,
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    pattern: str | None = None,
    trained_cameras: bool = False,
    **options: Any,
) -> Update:
    """Make an index of images.

    Args:
        folder: of the index, new or empty; or the URL of another store.
        gallery: folders of images, on all levels, and files.
        model: extracts the features.
        pattern: identities, cameras and times in the paths, as of :func:`dhcl.data.load_data`.
        trained_cameras: the cameras are those the model was trained on, under the same names; their
            statistics are used.
        options: ``batch_size``, ``workers``, ``on_bad`` and ``progress`` of
            :meth:`dhcl.ReID.features`.

    Raises:
        ConfigError: the folder holds an index or something else, or is being written; a pattern
            that matches no path.
        DataError: as :meth:`dhcl.ReID.features`; a pattern that is none.
    """
    read = path_reader(pattern)
    about = About(
        model=model.id,
        run=os.path.abspath(model.run),
        which="best" if model.which == "best" else "last",
        pattern=pattern,
        trained_cameras=trained_cameras,
        roots=(),
        width=model.dim,
    )
    with creating(folder, about) as writer:
        wanted = _listed(gallery)
        names = [Path(path).relative_to(root).as_posix() for path, root in wanted.roots.items()]
        check_matched(pattern, names, [read(name) for name in names])
        return _change(writer, wanted, model, False, options)


def add_images(
    folder: Address,
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    sync: bool = False,
    **options: Any,
) -> Update:
    """Add images to an index; of those in it already, only changed files are looked at again.

    Args:
        folder: of the index, or its URL.
        gallery: folders of images, on all levels, and files.
        model: the one that made the index.
        sync: also remove images of the index that lie below these folders no longer.
        options: as of :func:`create_index`.

    Raises:
        ConfigError: another model. DataError: no index; as :meth:`dhcl.ReID.features`.
    """
    index = Index.open(folder)
    index.check_model(model)
    wanted = _listed(gallery)
    with index.store.writing() as writer:
        Index(writer.now).check_model(model)
        done = _change(writer, wanted, model, sync, options)
    _keep_neighbours(folder)
    return done


def remove_images(folder: Address, paths: Sequence[str | os.PathLike[str]]) -> Update:
    """Remove images from an index: files, and all below folders, whether still there or not.

    Raises:
        ConfigError: a path of which the index has nothing; nothing would be left.
        DataError: no index.
    """
    with open_store(folder).writing() as writer:
        old = Index(writer.now)
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
    _keep_neighbours(folder)
    return Update(removed=len(gone), total=total)


def convert_index(folder: Address) -> Update:
    """Make an index of the present format of one that an earlier version wrote, in its place.

    No image is looked at. Until the new one is whole, the old one is there.

    Raises:
        ConfigError: another process is changing it. DataError: no index, one of the present format
            already, or damaged.
    """
    place = as_path("index", folder)
    old = read_old(place)

    def batches() -> Iterator[Any]:
        for start in range(0, len(old.records), BLOCK):
            part = slice(start, start + BLOCK)
            records = old.records[part]
            rows = np.arange(start, start + len(records))
            yield arrow_batch(rows, old.features[part], records, old.about.model)

    with replacing_old(place, old.about) as writer:
        count = writer.insert(batches())
    return Update(unchanged=count, total=count)


def compact_index(folder: Address) -> str:
    """Write the table of an index in a folder anew, in few files, and free what it does not need.

    Changes do so by themselves where it pays; this also takes away what searches that go on may
    still read.

    Returns:
        How many bytes it takes now and took before.

    Raises:
        ConfigError: another store than a folder, or another process is changing it. DataError: no
            index.
    """
    if not is_folder(folder):
        raise ConfigError(f"compact: is for indexes in folders (got {show(os.fspath(folder))})")
    place = as_path("index", folder)
    before = _bytes_below(place)
    compact(place)
    return f"{_bytes_below(place):,} bytes, {before:,} before"


def _bytes_below(folder: Path) -> int:
    files = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(file).st_size for file in files)


def find_neighbours(
    folder: Address, progress: Callable[[str, int, int], None] | None = None
) -> int:
    """Find the nearest images of each image of an index, where they are not known yet.

    A search with re-ranking then takes little longer than one without. Changes keep them true from
    then on, which takes one pass over the index each.

    Args:
        folder: of the index, or its URL.
        progress: as of :func:`dhcl_ops.knn`.

    Returns:
        Number of images whose nearest ones were found or have changed; 0 where nothing was
        missing, or there are so few images that they are not needed.

    Raises:
        ConfigError: another process is changing it. DataError: no index.
    """
    with open_store(folder).writing() as writer:
        missing = missing_lists(Index(writer.now), progress=progress)
        if missing is None:
            return 0
        lists, all_of_them = missing
        if all_of_them:
            writer.drop_neighbours()
        writer.put_neighbours(lists)
    return len(lists.rows)


def _keep_neighbours(folder: Address) -> None:
    """After a change, where they are known."""
    if open_store(folder).neighbours() is not None:
        find_neighbours(folder)


def _check_left(index: Index, total: int) -> None:
    if not total:
        raise ConfigError(f"index: {show(index.address)} would be empty; remove it instead")


def _known(
    index: Index, paths: Collection[str], folders: Collection[str]
) -> Iterator[tuple[int, str]]:
    """Numbers and absolute paths of images that are these files, or lie below these folders.

    Of many files, those of all images, which then is quicker.
    """
    for number, record in _records(index, paths, folders):
        yield number, str(index.path_of(record))


def _records(
    index: Index, paths: Collection[str], folders: Collection[str]
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
    again: set[str]  # paths of changed rows


def _size_and_time(path: str) -> tuple[int, int]:
    """Of a file; zeros where a link leads nowhere, which the model then names as a bad image."""
    try:
        about = os.stat(path)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _plan(old: Index, wanted: _Wanted, sync: bool) -> _Plan:
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


def _change(
    writer: Writer, wanted: _Wanted, model: ReID, sync: bool, options: dict[str, Any]
) -> Update:
    old = Index(writer.now)
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
