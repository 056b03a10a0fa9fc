"""Folders of images of any shape: the files in them, and what a pattern reads off their paths."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import re
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dhcl.data.description import reid_data
from dhcl.data.lists import ImageList, Integers, ReIDData, identifier
from dhcl.data.paths import Paths
from dhcl.errors import ConfigError, DataError, as_path
from dhcl.files import waiting_for
from dhcl.words import counted, first_ones, show

__all__ = [
    "IMAGE_SUFFIXES",
    "check_matched",
    "image_files",
    "load_folder",
    "look_below",
    "other_kinds",
    "path_reader",
    "seconds",
    "split_folders",
    "time_reader",
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


class _Run(NamedTuple):
    """Images of a folder between which no image of another folder lies, in the order of paths."""

    first: str  # path of the first one, written with /
    before: str  # what stands before each name
    names: str  # divided by null characters, of which no name has one


def look_below(folder: Path) -> tuple[Paths, Counter[str]]:
    """Images below a folder, sorted by path, and how many other files by their suffix.

    Hidden files and what macOS leaves are skipped.
    """
    with waiting_for(folder):
        return _look_below(folder)


def _look_below(folder: Path) -> tuple[Paths, Counter[str]]:
    runs: list[_Run] = []
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
        images: list[str] = []
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                images.append(name)
            else:
                others[os.path.splitext(name)[1].lower() or "without suffix"] += 1
        runs += _runs(where, sorted(images), inside)
    texts = (run.before + name for run in sorted(runs) for name in run.names.split("\0"))
    return Paths.of_texts(texts), others


def _runs(where: str, images: list[str], inside: list[str]) -> Iterator[_Run]:
    """A folder's images (ascending), cut where those of the folders inside stand among them.

    So all images of a tree are sorted by sorting the runs, of which there are few: no list of
    all paths is ever made.
    """
    cuts = sorted({0, len(images), *(bisect(images, f"{name}/") for name in inside)})
    for begin, end in itertools.pairwise(cuts):
        first = Path(where, images[begin])
        before = os.fspath(first).removesuffix(images[begin])
        yield _Run(first.as_posix(), before, "\0".join(images[begin:end]))


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
    with waiting_for(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"images: must be a folder (got {what} at {show(folder)})")
    files, others = look_below(folder)
    if not files:
        raise DataError(_no_images("images: none", folder, others))
    return list(files)


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


def time_reader(pattern: str | None) -> Callable[[str], float | None]:
    """What reads the time off a path, in seconds; None for unknown.

    It is what the pattern's group ``time`` holds: a number of seconds, or a date and time of
    ISO 8601, which without a zone is one of UTC, in seconds since 1970; without that group, the
    number that the group ``frame`` holds.

    Args:
        pattern: as of :func:`path_reader`.

    Raises:
        DataError: as :func:`path_reader`.
    """
    expression = None if pattern is None else _compiled(pattern)
    names = () if expression is None else ("time", "frame")
    name = next((n for n in names if expression and n in expression.groupindex), None)
    if expression is None or name is None:
        return lambda path: None

    def read(path: str) -> float | None:
        match = expression.search(path)
        text = match[name] if match else None
        return None if text is None else seconds(text)

    return read


def seconds(text: str) -> float | None:
    """A number of seconds, or a time of ISO 8601 in seconds since 1970; None for other texts."""
    with contextlib.suppress(ValueError):
        found = float(text)
        return found if math.isfinite(found) else None
    with contextlib.suppress(ValueError):
        date = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()
    return None


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
    looked = [look_below(folder) if folder else (Paths(), Counter[str]()) for folder in folders]
    files = [images for images, _ in looked]
    others = sum((kinds for _, kinds in looked), Counter[str]())
    count = sum(map(len, files))
    if not count:
        raise DataError(_no_images("folder: no images", root, others))
    if home is not None:
        _count_left_out(root, home, folders, files, notes)
    notes += other_kinds(others)
    columns = {"ids": np.full(count, -1), "cameras": np.full(count, -1)}
    if pattern is not None:
        columns = _columns(pattern, _matched(pattern, root, files, notes))
    splits, start = [], 0
    for split in files:
        part = slice(start, start := start + len(split))
        known = {name: numbers[part] for name, numbers in columns.items()}
        splits.append(ImageList(split, **known))
    return reid_data("folder", root, splits, notes)


class _Texts(NamedTuple):
    """What a group of a pattern holds for each of N images, each distinct text once."""

    values: list[int | str]  # as identifier() has them; -1, for nothing, is the first
    places: NDArray[np.int32]  # (N,) in values


def _columns(pattern: str, texts: dict[str, _Texts]) -> dict[str, Integers]:
    """What an :class:`ImageList` says of each image, from what the groups hold."""
    cameras = _numbered(texts["camera"], keep_numbers=False)
    frames = _numbered_within(cameras, texts["frame"])
    if "camera" in _compiled(pattern).groupindex:
        # Of two unknown cameras nobody knows whether they saw something at once.
        frames = np.where(cameras < 0, -1, frames)
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
    root: Path, home: Path, folders: list[Path | None], splits: list[Paths], notes: list[str]
) -> None:
    """Say which folders are the splits, where that is not plain, and count all other images."""
    outside: Counter[str] = Counter()
    for text in _without(_posix(look_below(root)[0]), heapq.merge(*map(_posix, splits))):
        path = Path(text)
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


def _posix(paths: Paths) -> Iterator[str]:
    """Texts of paths, written with ``/``."""
    return (text.replace(os.sep, "/") for text in paths.texts())


def _without(texts: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Of ascending texts those that are not among others, ascending too."""
    left = iter(others)
    other = next(left, None)
    for text in texts:
        while other is not None and other < text:
            other = next(left, None)
        if text != other:
            yield text


def _matched(pattern: str, root: Path, splits: list[Paths], notes: list[str]) -> dict[str, _Texts]:
    """What each of the groups holds for each path of the splits, one after another."""
    expression = _compiled(pattern)
    places = {group: array("i") for group in _GROUPS}
    tables: dict[str, dict[int | str, int]] = {group: {-1: 0} for group in _GROUPS}
    known = [group for group in _GROUPS if group in expression.groupindex]
    before = len((root / "x").as_posix()) - 1
    count, unmatched, first, first_unmatched = 0, 0, "", ""
    for text in itertools.chain.from_iterable(map(_posix, splits)):
        name = text[before:]
        first = first or name
        count += 1
        match = expression.search(name)
        if match is None:
            unmatched += 1
            first_unmatched = first_unmatched or name
        for group in known:
            table = tables[group]
            value = identifier(match[group]) if match else -1
            places[group].append(table.setdefault(value, len(table)))
    if unmatched == count:
        raise DataError(
            f"pattern: must match some path below the root (got {pattern!r}, which does not match "
            f"{show(first)!r})"
        )
    if unmatched:
        notes.append(
            f"{unmatched:,} images do not match the pattern, the first {show(first_unmatched)!r}."
        )
    return {
        group: _Texts(
            list(tables[group]), np.array(places[group] if group in known else [0] * count, "i")
        )
        for group in _GROUPS
    }


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


def _numbered(texts: _Texts, *, keep_numbers: bool) -> Integers:
    """A number for each text: equal for equal texts (``7`` equals ``007``), -1 for nothing."""
    numbers = sorted({v for v in texts.values if isinstance(v, int) and v != -1})
    words = sorted({v for v in texts.values if isinstance(v, str)})
    if keep_numbers and numbers and numbers[0] < -1:
        raise DataError(f"pattern: identities must be at least -1 (got {numbers[0]})")
    table: dict[int | str, int] = {-1: -1}
    table |= {v: v for v in numbers} if keep_numbers else {v: i for i, v in enumerate(numbers)}
    first = max(table.values(), default=-1) + 1
    table |= {word: first + i for i, word in enumerate(words)}
    return np.array([table[v] for v in texts.values], np.int64)[texts.places]


def _numbered_within(cameras: Integers, texts: _Texts) -> Integers:
    """A number from 0 for each text of each camera, in the order of their first; -1 for nothing."""
    there = texts.places > 0
    keys = cameras[there] * len(texts.values) + texts.places[there]
    _, first, key = np.unique(keys, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[first.argsort()] = np.arange(len(first))
    numbers = np.full(len(cameras), -1)
    numbers[there] = order[key]
    return numbers
