"""Text for people: printable names, the nearest known name, lists that end early, durations."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["counted", "did_you_mean", "duration", "first_line", "first_ones", "plain", "show"]


def show(path: Path | str) -> str:
    """The path as text that can always be printed, on one line, whatever its name holds."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(letter: str) -> str:
    """A line break or another control character as Python writes it; marks of writing stay."""
    control = unicodedata.category(letter) in ("Cc", "Zl", "Zp")
    return letter.encode("unicode_escape").decode() if control else letter


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
