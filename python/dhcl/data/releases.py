"""Published data sets as their owners released them, read into lists of images."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dhcl.data.description import reid_data
from dhcl.data.folders import look_below, other_kinds
from dhcl.data.layouts import (
    FAMILIES,
    LAYOUTS,
    child,
    find_layout,
    has_all,
    missing_layout,
    needed,
    usual_places,
)
from dhcl.data.lists import ImageList, ReIDData, image_list
from dhcl.errors import DataError
from dhcl.stored import Damaged, read_text
from dhcl.words import show

__all__ = [
    "MSMT17_NAME",
    "NAME",
    "load_cuhk03",
    "load_msmt17",
    "load_named",
    "load_vehicleid",
    "veri_lists",
]

# Where the name of a file begins in a path.
_START = r"(?:^|(?<=/))"
NAME = _START + r"(?P<id>-?[0-9]{1,18})_c(?P<camera>[0-9]{1,18})(?![0-9])(?=[^/]*$)"
"""Paths whose names begin with identity and camera."""
MSMT17_NAME = _START + r"[^_/]+_[^_/]+_(?P<camera>\d{1,2})_[^/]*$"
"""Those of MSMT17: 0000/0000_000_01_0303morning_0008_0.jpg is of camera 01."""


def _named_files(key: str, folder: Path | None, others: Counter[str]) -> ImageList:
    """Images whose names begin with identity and camera, as in Market-1501.

    Files of other kinds are added to ``others``. Of no folder there are none.
    """
    if folder is None:
        return image_list([], [], [])
    numbers = LAYOUTS[key].camera_numbers
    paths, kinds = look_below(folder)
    others += kinds
    ids, cameras = array("q"), array("q")
    strange: list[int] = []
    wrong: list[int] = []
    for place, name in enumerate(paths.names()):
        match = re.search(NAME, name)
        if match is None:
            strange.append(place)
            continue
        one, camera = int(match["id"]), int(match["camera"])
        if one < -1 or camera < 1 or (numbers and camera not in numbers):
            wrong.append(place)
            continue
        ids.append(one)
        cameras.append(numbers.index(camera) if numbers else camera - 1)
    if strange:
        raise DataError(
            f"{key}: names must begin like 0002_c1 with identity and camera (got {len(strange)} "
            f"that do not, the first {show(paths[strange[0]])})"
        )
    if wrong:
        rule = f"one of {numbers}" if numbers else "at least 1"
        raise DataError(
            f"{key}: identities must be at least -1 and cameras {rule} "
            f"(got {show(paths[wrong[0]])})"
        )
    return image_list(paths, ids, cameras)


def load_named(
    key: str, home: Path, folders: tuple[str, ...], notes: Sequence[str] = ()
) -> ReIDData:
    """A data set whose file names tell identity and camera, a folder for each split."""
    others: Counter[str] = Counter()
    splits = [_named_files(key, child(home, folder), others) for folder in folders]
    return reid_data(key, home, splits, [*notes, *other_kinds(others)])


def veri_lists(home: Path) -> list[str]:
    """What VeRi's name lists leave out: public loaders take all images of the folders."""
    notes = []
    for split in ("train", "query", "test"):
        listed = child(home, f"name_{split}.txt")
        folder = child(home, f"image_{split}")
        if listed and folder:
            names = {line.strip() for line in _lines(listed)}
            extra = sum(name not in names for name in look_below(folder)[0].names())
            if extra:
                notes.append(f"{extra:,} images of image_{split} are not in {listed.name}.")
    return notes


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except (OSError, Damaged) as error:
        raise DataError(f"list: must be a text file (got {show(path)}: {error})") from error
    return [line for line in text.splitlines() if line.strip()]


def _listed(key: str, path: Path) -> list[tuple[str, int]]:
    """Lines of a name and an identity."""
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        name, _, one = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"\d{1,18}", one):
            raise DataError(
                f"{key}: a line must be a name, a blank and an identity "
                f"(got {line!r} in line {number} of {show(path)})"
            )
        pairs.append((name.strip(), int(one)))
    return pairs


def load_msmt17(key: str, root: Path, training: bool) -> ReIDData:
    """MSMT17 of the version asked for, or of the one that is there."""
    homes = ("msmt17", "msmt17_v1", "msmt17_v2")
    market = LAYOUTS["market1501"].folders
    found: dict[str, Path] = {}
    for place in usual_places(root, homes):
        for version in FAMILIES["msmt17"]:
            if has_all(place, needed(LAYOUTS[version], training)):
                found.setdefault(version, place)
        # Repacked in Market-1501's layout, only the folder's name tells the version.
        if place.name.lower() in FAMILIES["msmt17"] and has_all(place, market):
            found.setdefault(place.name.lower(), place)
    if key == "msmt17" and len(found) == 2:
        places = " and ".join(show(place) for place in found.values())
        raise DataError(f"msmt17: both versions are there; name msmt17_v1 or msmt17_v2 ({places})")
    version = next(iter(found), "msmt17_v1") if key == "msmt17" else key
    if version not in found:
        for other, place in found.items():
            raise DataError(
                f"{key}: must be {LAYOUTS[key].title} (got {LAYOUTS[other].title} in "
                f"{show(place)}); results on the two differ, since V2 has blurred faces"
            )
        raise missing_layout(version, root, training)
    home = found[version]
    if not has_all(home, needed(LAYOUTS[version], training)):
        return load_named(version, home, market, ["Repacked in Market-1501's layout."])
    train, test = (child(home, folder) or home for folder in LAYOUTS[version].folders)
    splits = [_msmt17_list(version, home, f"list_{s}.txt", test) for s in ("query", "gallery")]
    notes = []
    learned = image_list([], [], [])
    if has_all(home, LAYOUTS[version].tree):
        learned = _msmt17_list(version, home, "list_train.txt", train)
        if child(home, "list_val.txt"):
            learned = _joined(learned, _msmt17_list(version, home, "list_val.txt", train))
            notes.append("Training images are those of list_train.txt and list_val.txt.")
    return reid_data(version, home, [learned, *splits], notes)


def _msmt17_list(key: str, home: Path, name: str, folder: Path) -> ImageList:
    pairs = _listed(key, child(home, name) or home / name)
    cameras = []
    for relative, _ in pairs:
        camera = re.search(MSMT17_NAME, relative)
        if camera is None or int(camera["camera"]) < 1:
            raise DataError(f"{key}: names must be like 0000_000_01_… (got {relative!r} in {name})")
        cameras.append(int(camera["camera"]) - 1)
    return image_list((folder / p for p, _ in pairs), (i for _, i in pairs), cameras)


def _joined(first: ImageList, second: ImageList) -> ImageList:
    return ImageList(
        first.paths + second.paths,
        np.concatenate((first.ids, second.ids)),
        np.concatenate((first.cameras, second.cameras)),
    )


def load_cuhk03(key: str, root: Path, training: bool) -> ReIDData:
    """CUHK03-NP with the boxes asked for, or with those that are there."""
    kinds = FAMILIES.get(key, (key,))
    for kind in kinds:
        boxes = kind.rsplit("-", 1)[-1]
        other = "labeled" if boxes == "detected" else "detected"
        for place in usual_places(root, LAYOUTS[kind].homes):
            # A folder of another name may hold either kind: it is taken for the one asked for.
            fits = place.name.lower() == boxes or (kind == key and place.name.lower() != other)
            if fits and has_all(place, needed(LAYOUTS[kind], training)):
                both = kind != key and child(place.parent, other)
                notes = [f"The {other} boxes are here too: cuhk03-np-{other}."] if both else []
                return load_named(kind, place, LAYOUTS[kind].folders, notes)
            if has_all(place, needed(LAYOUTS[kind], training)) and place.name.lower() != other:
                raise DataError(
                    f"{key}: nothing tells the boxes in {show(place)}; name cuhk03-np-detected or "
                    "cuhk03-np-labeled"
                )
    raise missing_layout(kinds[0], root, training)


def load_vehicleid(key: str, root: Path, training: bool) -> ReIDData:
    """VehicleID, split by its lists; no camera is known."""
    home = find_layout(key, root, training)
    images = child(home, "image") or home
    lists = [child(home, entry) for entry in LAYOUTS[key].tree if entry.endswith(".txt")]
    train, test = (_listed(key, path) if path else [] for path in lists)
    gallery: dict[int, tuple[str, int]] = {}
    for pair in test:
        gallery.setdefault(pair[1], pair)
    query = [pair for pair in test if gallery[pair[1]] is not pair]
    splits = [
        image_list(
            (images / f"{n}.jpg" for n, _ in pairs), (i for _, i in pairs), [-1] * len(pairs)
        )
        for pairs in (train, query, list(gallery.values()))
    ]
    return reid_data(key, home, splits, [])
