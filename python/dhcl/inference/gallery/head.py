"""``index.json`` of an index in a folder: what it says of itself, and which state of it counts.

It is replaced as a whole when a change is whole, so that an index is the old one or the new one,
whatever happens; what a change that was interrupted has left is nothing to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, StrictBool, ValidationError

from dhcl.errors import DataError
from dhcl.files import write_atomic
from dhcl.inference.gallery.schema import About
from dhcl.stored import Damaged, checksum, read_json
from dhcl.words import show

__all__ = [
    "HEAD",
    "OLD_FORMAT",
    "Approximate",
    "Head",
    "damaged",
    "first_wrong",
    "read_about",
    "read_head",
]

HEAD = "index.json"

_FORMAT: Literal[2] = 2

OLD_FORMAT = 1
"""Of indexes which were files of our own, see :mod:`dhcl.inference.gallery.old`."""

# What people may edit where the gallery or the run has moved.
_EDITABLE = ("run", "roots", "checksum")

_KNOWN = ConfigDict(extra="forbid")
# Not `str`, of which pydantic takes no names of files that are not UTF-8.
_Text = InstanceOf[str]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class Approximate(BaseModel):
    """What is known of an index for approximate search.

    ``recall`` is the mean share, in [0, 1], of the nearest other rows that it found when it was
    built, of so many ``queries`` out of the gallery; ``files`` are the checksums of its files.
    """

    model_config = _KNOWN

    recall: Annotated[float, Field(strict=True, ge=0, le=1)]
    queries: _Count
    files: dict[_Text, _Count]


class Head(BaseModel):
    """What ``index.json`` says.

    ``generation`` counts changes; ``version`` and ``neighbours`` are those of the tables that
    belong to it, ``files`` the checksums of what describes these tables, by name, ``approximate``
    what is known of an index for approximate search, if there is one; ``checksum`` is of all but
    what may be edited.
    """

    model_config = _KNOWN

    format: Literal[2] = _FORMAT
    generation: _Count
    images: _Count
    dim: Annotated[int, Field(strict=True, ge=1, lt=2**31)]
    next_row: _Count
    version: _Count
    neighbours: _Count | None
    model: _Text
    run: _Text
    which: Literal["last", "best"]
    pattern: _Text | None
    trained_cameras: StrictBool
    roots: list[_Text]
    files: dict[_Text, _Count]
    approximate: Approximate | None = None
    checksum: _Count | None = None

    @property
    def about(self) -> About:
        """The part that every kind of store has."""
        return About(
            model=self.model,
            run=self.run,
            which=self.which,
            pattern=self.pattern,
            trained_cameras=self.trained_cameras,
            roots=tuple(self.roots),
            width=self.dim,
        )

    def with_about(self, about: About) -> Head:
        """Another one that says this of itself."""
        return self.model_copy(
            update={
                "model": about.model,
                "run": about.run,
                "which": about.which,
                "pattern": about.pattern,
                "trained_cameras": about.trained_cameras,
                "roots": list(about.roots),
            }
        )

    def said(self) -> dict[str, Any]:
        """All of it; an index for approximate search is named where there is one alone.

        So indexes without one are written, and summed, as before there could be any.
        """
        return self.model_dump(exclude=None if self.approximate else {"approximate"})

    def write(self, folder: Path) -> None:
        """Make it the folder's."""
        said = self.said()
        text = json.dumps({**said, "checksum": _sum(said)}, indent=1) + "\n"
        write_atomic(folder / HEAD, text.encode())


def _sum(said: Mapping[str, Any]) -> int:
    """Of what ``index.json`` says, however it is laid out."""
    fixed = {name: value for name, value in said.items() if name not in _EDITABLE}
    return checksum(json.dumps(fixed, sort_keys=True).encode())


def read_about(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says, of any format.

    Raises:
        DataError: there is none, or it is damaged.
    """
    file = folder / HEAD
    try:
        if not file.is_file():
            what = f"it has no {HEAD}" if folder.is_dir() else "there is no such folder"
            raise DataError(f"index: {show(folder)} is not an index, {what}")
        said = read_json(file)
    except OSError as error:
        raise DataError(f"index: {show(folder)} can't be read ({error.strerror})") from error
    except Damaged as error:
        raise damaged(folder, str(error)) from error
    if not isinstance(said, dict) or said.get("format") not in (OLD_FORMAT, _FORMAT):
        got = said.get("format") if isinstance(said, dict) else type(said).__name__
        raise DataError(
            f"index: {show(folder)} must be of format {_FORMAT} (got {show(repr(got)[:40])}); "
            "make it anew"
        )
    return said


def read_head(folder: Path) -> Head:
    """What ``index.json`` says, checked.

    Raises:
        DataError: as :func:`read_about`; of the format before, or not as it was written.
    """
    said = read_about(folder)
    if said["format"] == OLD_FORMAT:
        raise DataError(
            f"index: {show(folder)} is of format {OLD_FORMAT}, which earlier versions wrote; "
            f"`dhcl index --convert --out {show(folder)}` makes it one of format {_FORMAT}, "
            "without looking at an image"
        )
    try:
        head = Head.model_validate(said)
    except ValidationError as error:
        raise damaged(folder, first_wrong(error)) from error
    if head.checksum != _sum(head.said()):
        raise damaged(folder, f"{HEAD} is not as it was written, beyond run and roots")
    return head


def first_wrong(error: ValidationError) -> str:
    """What pydantic says first, with the place: a line and a field, or a field of the head."""
    first = error.errors(include_url=False, include_context=False)[0]
    place: tuple[Any, ...] = first["loc"]
    if place and isinstance(place[0], int):
        place = (f"line {place[0] + 1}", *place[1:])
    said = first["msg"].removeprefix("Value error, ")
    return show(f"{', '.join(map(str, place))}: {said[:1].lower()}{said[1:]}")


def damaged(folder: Path | str, why: str) -> DataError:
    """The error of an index that is not as it was written."""
    return DataError(
        f"index: {show(folder)} is damaged ({why}); make it anew: remove the folder, then "
        "`dhcl index`"
    )
