"""Making an index of a gallery, and changing it: only new and changed images are looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dhcl.data import path_reader
from dhcl.data.folders import check_matched
from dhcl.errors import ConfigError, as_path
from dhcl.inference.changes import Update, add, change, listed, remove, renew_neighbours
from dhcl.inference.gallery.lance import build_approximate, compact, replacing_old
from dhcl.inference.gallery.old import read_old
from dhcl.inference.gallery.places import Address, creating, is_folder, show_address
from dhcl.inference.gallery.schema import About, arrow_batch
from dhcl.inference.gallery.store import BLOCK, Recall
from dhcl.inference.index import Index
from dhcl.inference.reid import ReID

__all__ = [
    "Update",
    "add_images",
    "approximate_index",
    "check_folder",
    "compact_index",
    "convert_index",
    "create_index",
    "find_neighbours",
    "remove_images",
]


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
        wanted = listed(gallery)
        names = [Path(path).relative_to(root).as_posix() for path, root in wanted.roots.items()]
        check_matched(pattern, names, [read(name) for name in names])
        return change(Index(writer.now), writer, wanted, model, False, options)


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
    return add(Index, folder, gallery, model, sync=sync, **options)


def remove_images(folder: Address, paths: Sequence[str | os.PathLike[str]]) -> Update:
    """Remove images from an index: files, and all below folders, whether still there or not.

    Raises:
        ConfigError: a path of which the index has nothing; nothing would be left.
        DataError: no index.
    """
    return remove(Index, folder, paths)


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
    place = check_folder("compact", folder)
    before = _bytes_below(place)
    compact(place)
    return f"{_bytes_below(place):,} bytes, {before:,} before"


def approximate_index(
    folder: Address, progress: Callable[[str, int, int], None] | None = None
) -> Recall:
    """Make an index in a folder ready for approximate search, or make it so anew.

    Images that come later are found too, by looking at all of them; where they are many, do it
    again.

    Args:
        folder: of the index.
        progress: called as ``progress("search", rows_done, rows)`` while the nearest rows of some
            are found exactly, to measure with.

    Returns:
        The recall that was measured, on rows of the gallery; it is kept with the index.

    Raises:
        ConfigError: another store than a folder, or another process is changing it. DataError: no
            index.
    """
    return build_approximate(check_folder("ann", folder), progress)


def check_folder(name: str, address: Address) -> Path:
    """The folder of an index, for what only an index in a folder has.

    Raises:
        ConfigError: another address.
    """
    if not is_folder(address):
        raise ConfigError(f"{name}: is for indexes in folders (got {show_address(address)})")
    return as_path("index", address)


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
    return renew_neighbours(Index, folder, progress)
