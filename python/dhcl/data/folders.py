"""Folders of images of any shape: the files in them, and what a pattern reads off their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dhcl.data.description import reid_data
from dhcl.data.lists import ReIDData, identifier, image_list
from dhcl.errors import DataError
from dhcl.words import show

__all__ = ["IMAGE_SUFFIXES", "files_below", "image_files", "load_folder", "path_reader"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Names of folders that are the splits, if at least two of them are there.
_SPLIT_FOLDERS = (
    ("train", "bounding_box_train"),
    ("query",),
    ("gallery", "bounding_box_test"),
)


def files_below(folder: Path) -> list[Path]:
    """Images below a folder, sorted by path; hidden files and what macOS leaves are skipped."""
    found: list[Path] = []
    seen: set[str] = set()
    for where, inside, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round in circles.
        real = os.path.realpath(where)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(d for d in inside if not d.startswith(".") and d != "__MACOSX")
        found += (
            Path(where, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
    return sorted(found, key=Path.as_posix)


def image_files(folder: str | Path) -> list[Path]:
    """Images on all levels below a folder, in sorted order, without hidden files.

    Raises:
        DataError: no such folder, or no images in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"images: must be a folder (got {what} at {show(folder)})")
    files = files_below(folder)
    if not files:
        raise DataError(
            f"images: none in {show(folder)} (looked for {' '.join(IMAGE_SUFFIXES)} on all levels)"
        )
    return files


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


def load_folder(root: Path, pattern: str | None) -> ReIDData:
    """The data set ``folder`` of :func:`dhcl.data.load_data`."""
    folders = [
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in _SPLIT_FOLDERS
    ]
    if sum(folder is not None for folder in folders) < 2:
        folders = [root, None, None]
    files = [files_below(folder) if folder else [] for folder in folders]
    every = [path for split in files for path in split]
    if not every:
        raise DataError(
            f"folder: no images in {show(root)} (looked for {' '.join(IMAGE_SUFFIXES)} "
            "on all levels)"
        )
    notes: list[str] = []
    ids = cameras = [-1] * len(every)
    if pattern is not None:
        texts = _matched(pattern, root, every, notes)
        ids = _numbered(texts["id"], keep_numbers=True)
        cameras = _numbered(texts["camera"], keep_numbers=False)
    splits, start = [], 0
    for split in files:
        part = slice(start, start := start + len(split))
        splits.append(image_list(split, ids[part], cameras[part]))
    return reid_data("folder", root, splits, notes)


def _matched(
    pattern: str, root: Path, paths: list[Path], notes: list[str]
) -> dict[str, list[str | None]]:
    """What the groups ``id`` and ``camera`` hold for each path, None where there is nothing."""
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
    texts: dict[str, list[str | None]] = {"id": [None] * len(paths), "camera": [None] * len(paths)}
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
    if not expression.groupindex.keys() & {"id", "camera"}:
        raise DataError(
            f"pattern: must have a group (?P<id>...) or (?P<camera>...) (got {pattern!r})"
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
