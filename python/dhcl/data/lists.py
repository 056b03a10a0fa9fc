"""What a list of images is, and what a data set is: files, with what is known of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dhcl.data.paths import Paths

__all__ = [
    "ImageList",
    "Integers",
    "ReIDData",
    "identifier",
    "image_list",
    "matches_across_cameras",
]

Integers = NDArray[np.int64]

# Stands for as many -1 as there are images.
_UNKNOWN: Integers = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images with what is known of them.

    Attributes:
        paths: N files; any sequence of paths may be given, and becomes a column.
        ids: (N,) int64 identities, -1 for junk or unknown.
        cameras: (N,) int64 cameras from 0 in the order of the data set's own numbers, -1 unknown.
        tracks: (N,) int64, equal for images of one camera that a tracker followed, -1 for others;
            by default all are.
        frames: (N,) int64, equal for images that one camera saw at once, -1 unknown; by default
            all are. See :class:`dhcl.data.tracks.Tracklets`.
    """

    paths: Paths
    ids: Integers
    cameras: Integers
    tracks: Integers = field(default_factory=lambda: _UNKNOWN)
    frames: Integers = field(default_factory=lambda: _UNKNOWN)

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Paths):
            object.__setattr__(self, "paths", Paths(self.paths))
        for name in ("tracks", "frames"):
            if getattr(self, name) is _UNKNOWN:
                object.__setattr__(self, name, np.full(len(self.paths), -1, np.int64))
        for name in ("ids", "cameras", "tracks", "frames"):
            values = np.asarray(getattr(self, name))
            if values.shape != (len(self.paths),) or values.dtype.kind != "i":
                raise ValueError(
                    f"ImageList: {name} must be {len(self.paths)} integers, one per path "
                    f"(got shape {values.shape}, {values.dtype})"
                )
            object.__setattr__(self, name, values.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_ids(self) -> int:
        """How many identities occur, junk and unknown not counted."""
        return len(np.unique(self.ids[self.ids >= 0]))

    @property
    def num_cameras(self) -> int:
        """The highest camera plus one, so that a table of this length has a row for each."""
        return int(np.max(self.cameras, initial=-1)) + 1

    def select(self, indices: Sequence[int] | NDArray[Any]) -> ImageList:
        """The images at these indices (integers, or N booleans), in that order."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]
        return ImageList(
            self.paths.take(chosen),
            self.ids[chosen],
            self.cameras[chosen],
            self.tracks[chosen],
            self.frames[chosen],
        )


def image_list(paths: Iterable[Path], ids: Iterable[int], cameras: Iterable[int]) -> ImageList:
    """A list of images from plain values, one of each per image."""
    column = paths if isinstance(paths, Paths) else Paths(paths)
    return ImageList(column, np.fromiter(ids, dtype=np.int64), np.fromiter(cameras, dtype=np.int64))


def identifier(text: str | None) -> int | str:
    """An identity or camera as a path, a file or a command line has it.

    A whole number for its digits (``7`` for ``007``), other texts as they are, -1 for none.
    """
    digits = (text or "").strip()
    if not text or not digits:
        return -1
    return int(digits) if re.fullmatch(r"-?[0-9]{1,18}", digits) else text


def matches_across_cameras(
    query_ids: Integers, gallery_ids: Integers, query_cameras: Integers, gallery_cameras: Integers
) -> bool:
    """Whether some query has a right match that another, or an unknown, camera saw.

    Args:
        query_ids, gallery_ids: (Q,) and (G,) int64, -1 for junk or unknown.
        query_cameras, gallery_cameras: (Q,) and (G,) int64, negative for unknown.
    """
    queries = len(query_ids)
    people, ids = np.unique(np.concatenate((query_ids, gallery_ids)), return_inverse=True)
    places = np.concatenate((query_cameras, gallery_cameras))
    cameras, seen_by = np.unique(places, return_inverse=True)
    images = np.bincount(ids[queries:], minlength=len(people))
    pairs, pair = np.unique(ids * len(cameras) + seen_by, return_inverse=True)
    own = np.bincount(pair[queries:], minlength=len(pairs))[pair[:queries]]
    others = images[ids[:queries]] - np.where(query_cameras >= 0, own, 0)
    return bool(((query_ids >= 0) & (others > 0)).any())


@dataclass
class ReIDData:
    """A data set: what to train on, and, where there is any, what to evaluate on.

    Attributes:
        name: as given to :func:`load_data`, with the version found (``msmt17_v1``).
        root: the folder the paths lie in.
        train, query, gallery: images; query and gallery are empty where the data has none.
        description: text for the log, with counts beside the published ones.
    """

    name: str
    root: Path
    train: ImageList
    query: ImageList
    gallery: ImageList
    description: str

    @property
    def has_identities(self) -> bool:
        """Whether identities of training images are known (to look at, never to train with)."""
        return self.train.num_ids > 0

    @property
    def can_evaluate(self) -> bool:
        """Whether some query identity is in the gallery."""
        known = self.query.ids[self.query.ids >= 0]
        return bool(np.isin(known, self.gallery.ids).any())

    @property
    def across_cameras(self) -> bool:
        """Whether some query has a right match that another, or an unknown, camera saw."""
        query, gallery = self.query, self.gallery
        return matches_across_cameras(query.ids, gallery.ids, query.cameras, gallery.cameras)

    def compared(self) -> tuple[ImageList, ImageList]:
        """Query and gallery as evaluation takes them.

        Right matches in a query's own camera do not count. Where there are no others, as with a
        single camera, they do: then every camera is unknown here.
        """
        if self.across_cameras:
            return self.query, self.gallery
        query, gallery = (
            replace(images, cameras=np.full(len(images), -1, np.int64))
            for images in (self.query, self.gallery)
        )
        return query, gallery

    @property
    def unlabeled(self) -> ImageList:
        """The training images with every identity -1: all that a trainer may see."""
        return replace(self.train, ids=np.full(len(self.train), -1, np.int64))
