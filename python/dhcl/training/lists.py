"""Lists of false negatives in the folder of a memory that lies on several processes.

Each process writes the lists of its own images, by the number of the first; which parts there are
says how many processes wrote. Any number of processes reads them, each what covers its own images.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dhcl.stored import Damaged
from dhcl_ops import FalseNegatives

__all__ = ["lists_to_save", "own_lists", "read_lists"]

_NAME = "lists"
_KINDS = {"counts": torch.int64, "classes": torch.int64, "logs": torch.float32}


def lists_to_save(found: FalseNegatives | None, begin: int) -> dict[str, dict[str, torch.Tensor]]:
    """What a process saves of its images' lists, of which ``begin`` is the first image's."""
    if found is None or len(found.offsets) == 1:
        return {}
    counts = found.offsets.diff()
    return {f"{_NAME}.{begin}": {"counts": counts, "classes": found.classes, "logs": found.logs}}


def own_lists(found: FalseNegatives, part: range) -> FalseNegatives:
    """The lists of some consecutive images."""
    offsets = found.offsets[part.start : part.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return FalseNegatives(offsets - first, found.classes[first:last], found.logs[first:last])


def read_lists(folder: Path, part: range) -> FalseNegatives | None:
    """The lists of these images that processes have saved, None if there are none.

    Raises:
        Damaged: they are not of all these images.
        Exception: as :func:`dhcl.training.parts.load_parts`.
    """
    # Half a second, for those who read none.
    from dhcl.training.parts import load_parts, shapes_of

    shapes = shapes_of(folder)
    ends = {int(m[1]): int(m[1]) + shapes[m[0]].numel() for m in map(_counts_of, shapes) if m}
    if not ends:
        return None
    if not part:
        nothing = (torch.empty(0, dtype=kind) for kind in list(_KINDS.values())[1:])
        return FalseNegatives(torch.zeros(1, dtype=torch.int64), *nothing)
    begins = [b for b in sorted(ends) if b < part.stop and ends[b] > part.start]
    several = [ends[begin] for begin in begins]
    whole = bool(begins) and begins[0] <= part.start and several[-1] >= part.stop
    if not whole or begins[1:] != several[:-1]:
        raise Damaged(f"lists must be those of images {part.start} to {part.stop - 1}")
    parts = {f"{_NAME}.{begin}": _room(shapes, begin, folder) for begin in begins}
    load_parts(parts, folder, alone=True)
    counts, classes, logs = (torch.cat([p[name] for p in parts.values()]) for name in _KINDS)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if bool((counts < 0).any()) or not int(offsets[-1]) == len(classes) == len(logs):
        raise Damaged("lists must have as many entries as they count")
    there = range(part.start - begins[0], part.stop - begins[0])
    return own_lists(FalseNegatives(offsets, classes, logs), there)


def _counts_of(key: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{_NAME}\.(\d+)\.counts", key)


def _room(shapes: dict[str, torch.Size], begin: int, folder: Path) -> dict[str, torch.Tensor]:
    """Empty tensors for a part, of no more bytes than there are files."""
    sizes = {name: shapes[f"{_NAME}.{begin}.{name}"] for name in _KINDS}
    stored = sum(file.stat().st_size for file in folder.iterdir())
    if sum(size.numel() * _KINDS[name].itemsize for name, size in sizes.items()) > stored:
        raise Damaged("lists must be no larger than their files")
    return {name: torch.empty(size, dtype=_KINDS[name]) for name, size in sizes.items()}
