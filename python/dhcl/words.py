"""Text for people: printable names, the nearest known name, lists that end early, durations."""

from __future__ import annotations

import difflib
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "counted",
    "csv_cell",
    "did_you_mean",
    "duration",
    "first_line",
    "first_ones",
    "plain",
    "say",
    "show",
    "show_lines",
]


def show(name: Path | str) -> str:
    """A name as one line of text that can always be printed and does nothing to a terminal.

    Whatever bytes it holds: line breaks, escape sequences and other controls, and marks that
    override the direction of writing, are written as in a Python string, ``\\n``, ``\\x1b``,
    ``\\u202e``. Marks that scripts need, such as joiners, stay.
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _shown(letter: str) -> str:
    acts = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
    if acts or unicodedata.bidirectional(letter) in _OVERRIDES:
        return letter.encode("unicode_escape").decode()
    return letter


def show_lines(text: str) -> str:
    """:func:`show` of each line: for a whole message, which has line breaks of its own."""
    return "\n".join(map(show, text.split("\n")))


def say(text: str, to: TextIO | None = None) -> None:
    """Print a message, by default to standard output, whatever its letters and its encoding."""
    file = sys.stdout if to is None else to
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(show_lines(text).encode(encoding, "backslashreplace").decode(encoding), file=file)


def csv_cell(value: Any) -> Any:
    """A value as a cell of a CSV file: a text that a spreadsheet can't take for a formula.

    Such a text gets ``./`` before it, so that a path names the same file as before; line breaks and
    the like are written as :func:`show` has them. Numbers stay as they are.
    """
    if not isinstance(value, (str, Path)):
        return value
    text = show(value)
    # Full-width signs count as what they are a width of.
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])
    return f"./{text}" if first and first in "=+-@" else text


def counted(count: int, what: str) -> str:
    """``1 image``, ``2,000 images``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str], *, before: str = "; ") -> str:
    """``; did you mean 'x'?`` with the known name that is nearest, or nothing if none is near.

    Case and punctuation do not count.
    """
    names = {plain(each): each for each in known}
    near = difflib.get_close_matches(plain(name), names, 1, 0.4)
    return f"{before}did you mean {names[near[0]]!r}?" if near else ""


def plain(name: str) -> str:
    """Letters and digits of a name alone, in lower case."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def first_ones(lines: Sequence[str], count: int = 10) -> list[str]:
    """The first lines, and ``and 7 more`` in place of those beyond ``count``."""
    more = len(lines) - count
    return [*lines[:count], *([f"and {more:,} more"] if more > 0 else [])]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its type if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def duration(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
