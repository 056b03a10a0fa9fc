"""Data sets by name: which files belong to training, query and gallery, who and which camera.

Identities are read for evaluation only. Training gets :attr:`dhcl.data.ReIDData.unlabeled`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dhcl.data.folders import load_folder, path_reader
from dhcl.data.layouts import FAMILIES, LAYOUTS, find_layout, resolve
from dhcl.data.lists import ReIDData
from dhcl.data.releases import (
    MSMT17_NAME,
    NAME,
    load_cuhk03,
    load_msmt17,
    load_named,
    load_vehicleid,
    veri_lists,
)
from dhcl.errors import DataError, as_path
from dhcl.words import show

__all__ = ["camera_reader", "load_data", "training_cameras"]


def load_data(
    name: str, root: str | Path, *, pattern: str | None = None, training: bool = True
) -> ReIDData:
    """Find a data set's files and read identities and cameras off their names or lists.

    No image is opened; :func:`dhcl.data.check_images` does that.

    Args:
        name: one of :data:`DATASETS`; case and punctuation do not matter. ``msmt17`` takes the
            version it finds and says which; ``msmt17_v1`` and ``msmt17_v2`` refuse the other.
            ``cuhk03-np`` takes the detected boxes where both kinds are there. ``vehicleid`` is the
            smallest test list, 800 vehicles. ``market1501`` serves any data in that layout.
        root: the data set's folder, or one that holds it, alone or under its usual name.
        pattern: for ``folder`` only, a regular expression with a group named ``id``, or
            ``camera``, or both, searched in each path below the root, written with ``/``:
            ``(?P<camera>cam\\d+)/(?P<id>[^/]+)/``. What the groups hold may be any text. Whole
            numbers keep their value as identity, and -1 is junk; other texts are numbered after
            them in sorted order. Cameras are numbered from 0 in sorted order. Groups ``track`` and
            ``frame`` name tracklets and frames within a camera: see
            :class:`dhcl.data.tracks.Tracklets`. Images that do not match are unknown (-1). Without
            a pattern nothing is known.
        training: images to train on must be there; without, a published data set may have queries
            and gallery alone, to evaluate on.

    A ``folder`` is searched through all levels, in sorted order, without hidden files. Folders
    ``train`` (or ``train_all``, ``bounding_box_train``, ``image_train``), ``query`` (or ``probe``,
    ``image_query``) and ``gallery`` (or ``test``, ``bounding_box_test``, ``image_test``) directly
    in it, or in the only folder in it that has such, are the splits if there are at least two of
    them; ``test`` may hold ``query`` and ``gallery``. Otherwise everything is to train on. What is
    left out is counted in the description: images in none of the splits, and files of other kinds.

    Raises:
        DataError: no such name (with the nearest), folders or files missing (with the tree that
            is expected), the wrong version, file names or lines that do not fit, no images.
    """
    key = resolve(name)
    root = Path(os.path.abspath(as_path("root", root)))
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing"
        raise DataError(f"{key}: the root must be a folder (got {what} at {show(root)})")
    if key == "folder":
        return load_folder(root, pattern)
    if pattern is not None:
        raise DataError(f"{key}: a pattern is for 'folder' only (got {pattern!r})")
    if key.startswith("msmt17"):
        data = load_msmt17(key, root, training)
    elif key.startswith("cuhk03"):
        data = load_cuhk03(key, root, training)
    elif key.startswith("vehicleid"):
        data = load_vehicleid(FAMILIES.get(key, (key,))[0], root, training)
    else:
        home = find_layout(key, root, training)
        notes = veri_lists(home) if key == "veri776" else []
        data = load_named(key, home, LAYOUTS[key].folders, notes)
    if training and not len(data.train):
        raise DataError(f"{key}: no images to train on in {show(data.root)}")
    return data


def training_cameras(name: str, root: str | Path, pattern: str | None) -> dict[int | str, int]:
    """The camera index of :func:`load_data` for each camera as the paths name it.

    Of a folder, its files are listed again.

    Raises:
        DataError: as :func:`load_data`; a data set whose paths name no cameras.
    """
    key = resolve(name)
    if key.startswith("vehicleid") or (key == "folder" and pattern is None):
        raise DataError(f"cameras: those of the training are unknown ({key}, pattern {pattern!r})")
    if key != "folder":
        numbers = LAYOUTS[FAMILIES.get(key, (key,))[0]].camera_numbers or range(1, 1000)
        return {number: index for index, number in enumerate(numbers)}
    data = load_data(key, root, pattern=pattern)
    read = path_reader(pattern)
    table = {}
    for images in (data.train, data.query, data.gallery):
        for path, camera in zip(images.paths, images.cameras, strict=True):
            table[read(path.relative_to(data.root).as_posix())[1]] = int(camera)
    return {camera: index for camera, index in table.items() if index >= 0}


def camera_reader(name: str, pattern: str | None) -> Callable[[str], int | str]:
    """What reads the camera off a path, written with ``/``, as :func:`load_data` does; -1: unknown.

    Args:
        name, pattern: of the data set, as there.
    """
    key = resolve(name)
    if key == "folder":
        read = path_reader(pattern)
    elif key.startswith("vehicleid"):
        read = path_reader(None)
    else:
        read = path_reader(MSMT17_NAME if key.startswith("msmt17") else NAME)
    return lambda path: read(path)[1]
