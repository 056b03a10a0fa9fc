"""Folders of images of any shape: the files in them, and what a pattern reads off their paths."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dhcl.data.description import reid_data
from dhcl.data.lists import ImageList, ReIDData, identifier
from dhcl.errors import ConfigError, DataError, as_path
from dhcl.words import counted, first_ones, show

__all__ = [
    "IMAGE_SUFFIXES",
    "check_matched",
    "image_files",
    "load_folder",
    "look_below",
    "other_kinds",
    "path_reader",
    "split_folders",
]

# What a pattern may name.
_GROUPS = ("id", "camera", "track", "frame")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Names of folders that are the splits, if at least two of them are there; the first ones count.
# As in Market-1501 and VeRi-776, in lists of train, query (or probe) and test, and as layumi's
# Person_reID_baseline_pytorch prepares data: its train_all is train and val together.
_SPLIT_FOLDERS = (
    ("train_all", "train", "bounding_box_train", "image_train"),
    ("query", "probe", "image_query"),
    ("gallery", "bounding_box_test", "image_test", "test"),
)


def look_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Images below a folder, sorted by path, and how many other files by their suffix.

    Hidden files and what macOS leaves are skipped.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for where, inside, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round in circles.
        real = os.path.realpath(where)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(d for d in inside if not d.startswith(".") and d != "__MACOSX")
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append(Path(where, name))
            else:
                others[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    return sorted(found, key=Path.as_posix), others


def other_kinds(others: Counter[str]) -> list[str]:
    """A line that counts files of other kinds by suffix, if there are any."""
    if not others:
        return []
    return [f"Left out: {counted(others.total(), 'file')} of other kinds ({_kinds(others)})."]


def _kinds(others: Counter[str]) -> str:
    return ", ".join(first_ones([f"{show(s)} {count:,}" for s, count in sorted(others.items())]))


def image_files(folder: str | Path) -> list[Path]:
    """Images on all levels below a folder, in sorted order, without hidden files.

    Raises:
        DataError: no such folder, or no images in it.
    """
    folder = as_path("images", folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"images: must be a folder (got {what} at {show(folder)})")
    files, others = look_below(folder)
    if not files:
        raise DataError(_no_images("images: none", folder, others))
    return files


def _no_images(what: str, folder: Path, others: Counter[str]) -> str:
    """That there are none in a folder, what was looked for, and what there is instead."""
    instead = f"; there are {_kinds(others)}" if others else ""
    looked = f"looked for {' '.join(IMAGE_SUFFIXES)} on all levels"
    return f"{what} in {show(folder)} ({looked}{instead})"


def path_reader(pattern: str | None) -> Callable[[str], tuple[int | str, int | str]]:
    """What reads identity and camera off a path: whole numbers or other texts, -1 for unknown.

    Args:
        pattern: as of :func:`load_data`; None knows nothing of any path.

    Raises:
        DataError: not a regular expression, or one without the groups.
    """
    if pattern is None:
        return lambda path: (-1, -1)
    expression = _compiled(pattern)

    def read(path: str) -> tuple[int | str, int | str]:
        match = expression.search(path)
        found = match.groupdict() if match else {}
        return identifier(found.get("id")), identifier(found.get("camera"))

    return read


def check_matched(
    pattern: str | None, names: Sequence[str], known: Sequence[tuple[int | str, int | str]]
) -> None:
    """Refuse a pattern that tells nothing of any path.

    Args:
        pattern: of :func:`path_reader`; None is no pattern, and tells nothing.
        names: paths, written with ``/``.
        known: what the pattern read off each.

    Raises:
        ConfigError: it tells nothing; names the first path.
    """
    if pattern is not None and names and all(pair == (-1, -1) for pair in known):
        raise ConfigError(
            f"pattern: must match some path below the folder (got {pattern!r}, which does not "
            f"match {show(names[0])!r})"
        )


def load_folder(root: Path, pattern: str | None) -> ReIDData:
    """The data set ``folder`` of :func:`dhcl.data.load_data`."""
    notes: list[str] = []
    home, folders = _find_splits(root, notes)
    looked = [look_below(folder) if folder else ([], Counter[str]()) for folder in folders]
    files = [images for images, _ in looked]
    others = sum((kinds for _, kinds in looked), Counter[str]())
    every = [path for split in files for path in split]
    if not every:
        raise DataError(_no_images("folder: no images", root, others))
    if home is not None:
        _count_left_out(root, home, folders, set(every), notes)
    notes += other_kinds(others)
    columns = dict.fromkeys(("ids", "cameras", "tracks", "frames"), [-1] * len(every))
    if pattern is not None:
        columns = _columns(pattern, _matched(pattern, root, every, notes))
    splits, start = [], 0
    for split in files:
        part = slice(start, start := start + len(split))
        known = {name: np.array(numbers[part], np.int64) for name, numbers in columns.items()}
        splits.append(ImageList(tuple(split), **known))
    return reid_data("folder", root, splits, notes)


def _columns(pattern: str, texts: dict[str, list[str | None]]) -> dict[str, list[int]]:
    """What an :class:`ImageList` says of each image, from what the groups hold."""
    cameras = _numbered(texts["camera"], keep_numbers=False)
    frames = _numbered_within(cameras, texts["frame"])
    if "camera" in _compiled(pattern).groupindex:
        # Of two unknown cameras nobody knows whether they saw something at once.
        frames = [-1 if c < 0 else f for c, f in zip(cameras, frames, strict=True)]
    return {
        "ids": _numbered(texts["id"], keep_numbers=True),
        "cameras": cameras,
        "tracks": _numbered_within(cameras, texts["track"]),
        "frames": frames,
    }


def _find_splits(root: Path, notes: list[str]) -> tuple[Path | None, list[Path | None]]:
    """The folder that holds the splits, and theirs; where there is none, all is to train on."""
    folders = split_folders(root)
    if folders:
        return root, folders
    inside = [
        (each, found) for each in _subfolders(root).values() if (found := split_folders(each))
    ]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = " and ".join(show(each.name) + "/" for each, _ in inside)
        notes.append(
            f"{names} have splits each; all their images are to train on. To evaluate, name one "
            "of them as the root."
        )
    return None, [root, None, None]


def split_folders(home: Path) -> list[Path | None]:
    """The folders of training images, queries and gallery in a folder; empty if it has no two."""
    there = _subfolders(home)
    folders = [
        next((there[name] for name in names if name in there), None) for names in _SPLIT_FOLDERS
    ]
    if "test" in there and folders[2] == there["test"] and folders[1] is None:
        below = split_folders(there["test"])
        if below and below[1] and below[2]:
            folders[1:] = below[1:]
    return folders if sum(folder is not None for folder in folders) >= 2 else []


def _subfolders(folder: Path) -> dict[str, Path]:
    """Folders directly in a folder by their names in lower case, without hidden ones."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return {name.lower(): folder / name for name in names}


def _count_left_out(
    root: Path, home: Path, folders: list[Path | None], used: set[Path], notes: list[str]
) -> None:
    """Say which folders are the splits, where that is not plain, and count all other images."""
    outside: Counter[str] = Counter()
    for path in look_below(root)[0]:
        if path in used:
            continue
        start = home if home in path.parents else root
        inside = path.relative_to(start).parts
        place = start / inside[0] if len(inside) > 1 else start
        outside[f"{place.relative_to(root).as_posix()}/"] += 1
    if home == root and not outside:
        return
    names = [f"{each.relative_to(root).as_posix()}/" for each in folders if each]
    notes.append(f"The splits are {show(', '.join(names))}.")
    if outside:
        parts = [
            f"{counted(count, 'image')} in {'the root itself' if place == './' else show(place)}"
            for place, count in sorted(outside.items())
        ]
        notes.append(f"Left out: {', '.join(first_ones(parts))}.")


def _matched(
    pattern: str, root: Path, paths: list[Path], notes: list[str]
) -> dict[str, list[str | None]]:
    """What each of the groups holds for each path, None where there is nothing."""
    expression = _compiled(pattern)
    matches = [expression.search(path.relative_to(root).as_posix()) for path in paths]
    unmatched = [path for path, match in zip(paths, matches, strict=True) if match is None]
    if len(unmatched) == len(paths):
        raise DataError(
            f"pattern: must match some path below the root (got {pattern!r}, which does not match "
            f"{show(paths[0].relative_to(root).as_posix())!r})"
        )
    if unmatched:
        first = show(unmatched[0].relative_to(root).as_posix())
        notes.append(f"{len(unmatched):,} images do not match the pattern, the first {first!r}.")
    texts: dict[str, list[str | None]] = {group: [None] * len(paths) for group in _GROUPS}
    for group in expression.groupindex.keys() & texts:
        texts[group] = [match[group] if match else None for match in matches]
    return texts


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"pattern: must be a regular expression (got {pattern!r}: {error})"
        ) from error
    if not expression.groupindex.keys() & set(_GROUPS):
        raise DataError(
            "pattern: must have a group (?P<id>...) or (?P<camera>...), or one named track or "
            f"frame (got {pattern!r})"
        )
    return expression


def _numbered(texts: Sequence[str | None], *, keep_numbers: bool) -> list[int]:
    """A number for each text: equal for equal texts (``7`` equals ``007``), -1 for nothing."""
    values = [identifier(text) for text in texts]
    numbers = sorted({v for v in values if isinstance(v, int) and v != -1})
    words = sorted({v for v in values if isinstance(v, str)})
    if keep_numbers and numbers and numbers[0] < -1:
        raise DataError(f"pattern: identities must be at least -1 (got {numbers[0]})")
    table: dict[int | str, int] = {-1: -1}
    table |= {v: v for v in numbers} if keep_numbers else {v: i for i, v in enumerate(numbers)}
    first = max(table.values(), default=-1) + 1
    table |= {word: first + i for i, word in enumerate(words)}
    return [table[v] for v in values]


def _numbered_within(cameras: Sequence[int], texts: Sequence[str | None]) -> list[int]:
    """A number from 0 for each text of each camera, in the order of their first; -1 for nothing."""
    table: dict[tuple[int, int | str], int] = {}
    values = [identifier(text) for text in texts]
    return [
        -1 if value == -1 else table.setdefault((camera, value), len(table))
        for camera, value in zip(cameras, values, strict=True)
    ]
