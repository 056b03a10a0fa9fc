"""Thumbnails as data URIs, bounded in size and number."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import features

from dhcl.data.images import thumbnail

__all__ = ["BUDGET", "Pictures"]

# Characters of all thumbnails of a page; with Plotly's 5 MB a page stays below 20 MB.
BUDGET = 12_000_000


class Pictures:
    """Collects thumbnails; a picture asked for twice is kept once.

    Args:
        budget: characters of all data URIs together; pictures beyond are left out.

    Attributes:
        uris: data URIs by number.
        left_out: pictures that the budget had no room for.
        unreadable: files that are gone or no images.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.uris: list[str] = []
        self.left_out: set[Path] = set()
        self.unreadable: set[Path] = set()
        self._room = budget
        self._numbers: dict[Path, int] = {}
        self._format = "WEBP" if features.check("webp") else "JPEG"

    def add(self, path: Path, height: int = 128) -> int:
        """Number of the file's thumbnail of at most this many pixels, -1 if it has none.

        A picture that is there keeps the height it was first asked for with, so the larger ones
        are to be asked for first.
        """
        if path in self._numbers:
            return self._numbers[path]
        if path in self.left_out or path in self.unreadable:
            return -1
        try:
            uri = self._encode(path, height)
        except Exception:  # decoders raise nearly anything on bad data
            self.unreadable.add(path)
            return -1
        if len(uri) > self._room:
            self.left_out.add(path)
            return -1
        self._room -= len(uri)
        self.uris.append(uri)
        self._numbers[path] = len(self.uris) - 1
        return self._numbers[path]

    def _encode(self, path: Path, height: int) -> str:
        out = io.BytesIO()
        thumbnail(path, height).save(out, self._format, quality=80)
        text = base64.b64encode(out.getvalue()).decode()
        return f"data:image/{self._format.lower()};base64,{text}"
