"""What a data set holds, in words: counts beside the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dhcl.data.layouts import LAYOUTS, SPLITS, Layout
from dhcl.data.lists import ImageList, ReIDData
from dhcl.words import show

__all__ = ["reid_data"]


def reid_data(key: str, home: Path, splits: list[ImageList], notes: list[str]) -> ReIDData:
    """The data set of these lists, one for each of ``SPLITS``, with its description.

    Args:
        key: name of the layout, or ``folder``.
        home: folder of the images.
        splits: training images, queries and gallery.
        notes: further lines of the description.
    """
    layout = LAYOUTS.get(key)
    text = _describe(layout, key, home, splits, notes)
    return ReIDData(key, home, splits[0], splits[1], splits[2], text)


def _describe(
    layout: Layout | None, key: str, home: Path, splits: list[ImageList], notes: list[str]
) -> str:
    """A table of what was found, beside what is published."""
    rows = [["", "images", "ids", "cameras"]]
    if layout:
        rows[0] = ["", "images", "published", "ids", "published", "cameras"]
    differs = False
    for split, images in zip(SPLITS, splits, strict=True):
        if not len(images) and not layout:
            continue
        cameras = len(np.unique(images.cameras[images.cameras >= 0]))
        # Published counts of a gallery leave junk out.
        known = int((images.ids >= 0).sum()) if layout else len(images)
        cells = [split, f"{known:,}", f"{images.num_ids:,}", f"{cameras:,}"]
        if layout:
            published = layout.counts[split]
            off = (known, images.num_ids) != published
            differs |= off
            cells[2:2] = [f"{published[0]:,}"]
            cells[4:4] = [f"{published[1]:,}"]
            cells[0] += " *" if off else ""
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += _tracks(splits)
    everyone = np.concatenate([images.cameras for images in splits])
    cameras = len(np.unique(everyone[everyone >= 0]))
    title = "Folder of images"
    if layout:
        title = f"{layout.title} ({key})"
        if differs:
            lines.append("* differs from the published count.")
        if cameras != layout.cameras:
            lines.append(f"{cameras} cameras where {layout.cameras} are published.")
        if not differs and cameras == layout.cameras:
            lines.append("All counts are as published.")
        junk = sum(int((images.ids < 0).sum()) for images in splits)
        if junk:
            lines.append(f"{junk:,} junk images (id -1) besides.")
        notes = [*notes, *layout.notes]
    else:
        if not any(images.num_ids for images in splits):
            lines.append("No identities are known: it can be trained on, not evaluated.")
        if not cameras:
            lines.append("No cameras are known.")
    return "\n".join([f"{title} in {show(home)}", *lines, *notes])


def _tracks(splits: list[ImageList]) -> list[str]:
    """How many tracklets there are, and what follows from it; nothing where there are none."""
    counts = [
        f"{len(np.unique(images.tracks[images.tracks >= 0])):,} of {split}"
        for split, images in zip(SPLITS, splits, strict=True)
        if (images.tracks >= 0).any()
    ]
    if not counts:
        return []
    lines = [f"Tracklets: {', '.join(counts)}. Each counts as one, by the mean of its features."]
    if (splits[0].frames >= 0).any():
        lines.append("Training images that one camera saw in one frame are different people.")
    return lines
