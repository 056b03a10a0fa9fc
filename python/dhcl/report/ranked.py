"""``dhcl search --html``: ranked lists as a page that holds its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dhcl.files import write_atomic
from dhcl.inference.ranked import Listed, RankedList, Shown, about_image, shown_picture
from dhcl.report.pages import render
from dhcl.words import show

__all__ = ["ranked_page", "write_ranked"]


@dataclass(frozen=True)
class _Figure:
    """A picture with what is said of it; without an address if it can't be read any more."""

    kind: str
    head: str
    about: str
    name: str
    path: str
    uri: str


def write_ranked(path: Path, lists: Sequence[RankedList], title: str, about: str) -> None:
    """Write a page with a row per query, pictures inside; whole, or not at all."""
    write_atomic(path, ranked_page(lists, title, about))


def ranked_page(lists: Sequence[RankedList], title: str, about: str) -> bytes:
    """The page."""
    rows = [
        {
            "query": _figure(one.query, "query", "query"),
            "places": [_result(rank, each) for rank, each in enumerate(one.results, 1)],
        }
        for one in lists
    ]
    known = any(each.right is not None for one in lists for each in one.results)
    return render("ranked.html", title=title, about=about, known=known, lists=rows)


def _result(rank: int, each: Listed) -> _Figure:
    kind = {True: "right", False: "wrong", None: ""}[each.right]
    mark = {True: " ✓", False: " ✗", None: ""}[each.right]
    distance = "" if each.distance is None else f" · {each.distance:.3f}"
    return _figure(each.image, kind, f"{rank} · {each.similarity:.3f}{distance}{mark}")


def _figure(image: Shown, kind: str, head: str) -> _Figure:
    picture, uri = shown_picture(image.path), ""
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return _Figure(kind, head, about_image(image), show(image.path.name), show(image.path), uri)
