"""Ranked lists as text, JSON and PNG; `dhcl.report.ranked` makes a page of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dhcl.config import ConfigError
from dhcl.data.images import thumbnail
from dhcl.files import write_atomic
from dhcl.words import show

__all__ = [
    "Listed",
    "RankedList",
    "Shown",
    "about_image",
    "as_json",
    "as_table",
    "shown_picture",
    "write_png",
]

_HEIGHT = 160
_MAX_PNG_ROWS = 100


@dataclass(frozen=True)
class Shown:
    """An image with what is known of it; -1 is unknown."""

    path: Path
    id: int | str = -1
    camera: int | str = -1


@dataclass(frozen=True)
class Listed:
    """A place in a ranked list: its image, cosine, and distance if re-ranked.

    ``right`` is None where an identity is unknown.
    """

    image: Shown
    similarity: float
    distance: float | None
    right: bool | None


@dataclass(frozen=True)
class RankedList:
    """What was found for a query, best first."""

    query: Shown
    results: tuple[Listed, ...]


def about_image(image: Shown) -> str:
    """``id 7, camera 2``, as far as known."""
    parts = [("id", image.id), ("camera", image.camera)]
    return ", ".join(f"{name} {show(str(value))}" for name, value in parts if value != -1)


_MARKS = {True: "+", False: "-", None: " "}


def as_table(lists: Sequence[RankedList]) -> str:
    """A block of lines per query; ``+`` marks a right result, ``-`` a wrong one."""
    blocks = []
    for one in lists:
        about = about_image(one.query)
        lines = [show(one.query.path) + (f"  ({about})" if about else "")]
        cameras = [about_image(each.image) for each in one.results]
        width = max(map(len, cameras), default=0)
        for rank, (each, text) in enumerate(zip(one.results, cameras, strict=True), 1):
            distance = "" if each.distance is None else f"  {each.distance:.3f}"
            mark = f" {_MARKS[each.right]}" if one.query.id != -1 else ""
            label = f"  {text:<{width}}" if width else ""
            lines.append(
                f"{rank:>5}{mark}  {each.similarity:6.3f}{distance}{label}  {show(each.image.path)}"
            )
        if not one.results:
            lines.append("       nothing")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_json(lists: Sequence[RankedList], about: dict[str, Any]) -> str:
    """``about`` with a list ``queries``; what is unknown is null."""

    def known(image: Shown) -> dict[str, Any]:
        return {
            "path": str(image.path),
            "id": None if image.id == -1 else image.id,
            "camera": None if image.camera == -1 else image.camera,
        }

    queries = [
        {
            **known(one.query),
            "results": [
                {
                    "rank": rank,
                    **known(each.image),
                    "similarity": round(each.similarity, 6),
                    "distance": None if each.distance is None else round(each.distance, 6),
                    "right": each.right,
                }
                for rank, each in enumerate(one.results, 1)
            ],
        }
        for one in lists
    ]
    # The one control character that JSON may hold as it is.
    return json.dumps({**about, "queries": queries}, indent=1).replace("\x7f", "\\u007f")


# ---- pictures -----------------------------------------------------------------------------------


def shown_picture(path: Path) -> Image.Image | None:
    """The image, not larger than is shown; None where it can't be read any more."""
    try:
        return thumbnail(path, _HEIGHT)
    except Exception:  # decoders raise nearly anything
        return None


_CELL, _GAP, _BORDER, _LINE = 104, 12, 4, 15
_COLORS = {True: "#1a7f37", False: "#cf222e", None: "#ffffff"}


def write_png(path: Path, lists: Sequence[RankedList]) -> None:
    """A picture with a row per query; whole, or not at all.

    Under an image are its rank, cosine and, if re-ranked, distance. Green frames and ``+`` are
    right results, red ones and ``-`` wrong ones.

    Raises:
        ConfigError: more than 100 queries.
    """
    if len(lists) > _MAX_PNG_ROWS:
        raise ConfigError(
            f"png: at most {_MAX_PNG_ROWS} queries fit a picture (got {len(lists)}); --html takes "
            "any number"
        )
    font = _font(12)
    columns = 1 + max((len(one.results) for one in lists), default=0)
    row = _HEIGHT + 2 * _BORDER + 4 * _LINE + _GAP
    size = (columns * (_CELL + _GAP) + 2 * _GAP, len(lists) * row + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(lists):
        top = _GAP + number * row
        _cell(sheet, draw, font, (_GAP, top), one.query, "query", "#888888")
        for place, each in enumerate(one.results, 1):
            left = 2 * _GAP + place * (_CELL + _GAP)
            numbers = f"{each.similarity:.3f}"
            if each.distance is not None:
                numbers = f"{each.similarity:.2f} · {each.distance:.2f}"
            head = f"{place} · {numbers} {_MARKS[each.right]}"
            _cell(sheet, draw, font, (left, top), each.image, head, _COLORS[each.right])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: Any,
    place: tuple[int, int],
    image: Shown,
    head: str,
    color: str,
) -> None:
    left, top = place
    room = (_CELL - 2 * _BORDER, _HEIGHT)
    picture = ImageOps.contain(shown_picture(image.path) or Image.new("RGB", room, "#dddddd"), room)
    frame = (left, top, left + picture.width + 2 * _BORDER, top + picture.height + 2 * _BORDER)
    draw.rectangle(frame, fill=color)
    sheet.paste(picture, (left + _BORDER, top + _BORDER))
    below = top + _HEIGHT + 2 * _BORDER
    name = show(image.path.name)
    fits = next(n for n in range(len(name), 0, -1) if n == 1 or _fits(draw, font, name[:n]))
    texts = [head, about_image(image), name[:fits], name[fits:]]
    for line, text in enumerate(text for text in texts if text):
        shade = "#666666" if line else "#1a1a1a"
        draw.text((left, below + line * _LINE), _fitting(draw, font, text), fill=shade, font=font)


def _fits(draw: ImageDraw.ImageDraw, font: Any, text: str) -> bool:
    return bool(draw.textlength(text, font=font) <= _CELL)


def _fitting(draw: ImageDraw.ImageDraw, font: Any, text: str) -> str:
    """The text, its middle left out where it is too wide for a cell."""
    keep = len(text)
    shown = text
    while keep > 1 and not _fits(draw, font, shown):
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return shown


def _font(size: int) -> Any:
    """A font of the system that knows more letters than Pillow's own, if there is one."""
    for name in ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
