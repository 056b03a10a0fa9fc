"""Tracklets: images of one person in one camera that a tracker followed through its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dhcl.data.lists import ImageList, Integers
from dhcl.errors import DataError
from dhcl_ops import prototypes

__all__ = ["Tracklets"]


@dataclass(frozen=True, eq=False)
class Tracklets:
    """Which of N images belong together, as T tracklets, and which of these are not one person.

    An image that no tracker followed is a tracklet by itself.

    Attributes:
        of: (N,) int64 tracklet of each image, from 0 in the order of their first images.
        cameras: (T,) int64, -1 unknown.
        ids: (T,) int64 identities, -1 for junk or unknown.
        apart: (P, 2) int64 pairs of tracklets that one camera saw in one frame, each once: two
            people, whatever they look like.
    """

    of: Integers
    cameras: Integers
    ids: Integers
    apart: Integers

    @classmethod
    def of_images(
        cls, tracks: Any, cameras: Any = None, *, frames: Any = None, ids: Any = None
    ) -> Tracklets:
        """Tracklets from numbers that each image has.

        Args:
            tracks: (N,) whole numbers, equal within a camera for images of one tracklet; negative
                for none.
            cameras: (N,) whole numbers, -1 for unknown ones, which are taken for one camera; by
                default all are.
            frames: (N,) whole numbers, equal within a camera for what it saw at once; negative for
                unknown. They must count the frames of the camera, not those of a tracklet.
            ids: (N,) identities.

        Raises:
            ValueError: numbers of another shape or kind. DataError: a tracklet of two identities.
        """
        tracks = _integers("tracks", tracks, None)
        n = len(tracks)
        known = {"cameras": cameras, "frames": frames, "ids": ids}
        cameras, frames, ids = (_integers(name, each, n) for name, each in known.items())
        of, first = _numbered(cameras, tracks)
        if len(wrong := np.flatnonzero(ids != ids[first][of])):
            image = int(wrong[0])
            raise DataError(
                f"tracks: images of a tracklet must have one identity (got {ids[image]} and "
                f"{ids[first][of[image]]} in tracklet {tracks[image]} of camera {cameras[image]})"
            )
        return cls(of, cameras[first], ids[first], _seen_at_once(of, cameras, frames))

    @classmethod
    def of_list(cls, images: ImageList) -> Tracklets | None:
        """Those of a data set's images; None where neither tracks nor frames are known."""
        if (images.tracks < 0).all() and (images.frames < 0).all():
            return None
        return cls.of_images(images.tracks, images.cameras, frames=images.frames, ids=images.ids)

    def __len__(self) -> int:
        return len(self.cameras)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Features (T, d) of the tracklets: the mean of their images', of length 1.

        The pooling of the MARS benchmark (Zheng et al., ECCV 2016). Sums have a fixed order.

        Args:
            features: (N, d) float32.
        """
        if len(features) != len(self.of):
            raise ValueError(
                f"features: must have {len(self.of)} rows, one per image (got {len(features)})"
            )
        there = torch.from_numpy(self.of).to(features.device)
        return prototypes(features, there, len(self), normalize=True)

    def spread(self, labels: torch.Tensor, *, alone: bool = False) -> torch.Tensor:
        """Labels (N,) of the images from those of the tracklets.

        Args:
            labels: (T,) int64, -1 for outliers.
            alone: give an outlier that has several images a cluster of its own, numbered after the
                others: they are known to be of one person.
        """
        labels = labels.cpu()
        if alone:
            several = torch.from_numpy(np.bincount(self.of, minlength=len(self)) > 1)
            own = (labels < 0) & several
            labels = torch.where(own, int(labels.max()) + own.cumsum(0), labels)
        return labels[torch.from_numpy(self.of)]


def _integers(name: str, values: Any, count: int | None) -> Integers:
    """(N,) whole numbers, -1 where none are given."""
    if values is None:
        return np.full(count or 0, -1, np.int64)
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or count not in (None, len(array)):
        many = "N" if count is None else count
        raise ValueError(
            f"{name}: must be ({many},) whole numbers, one per image (got shape {array.shape}, "
            f"{array.dtype})"
        )
    return array.astype(np.int64)


def _numbered(cameras: Integers, tracks: Integers) -> tuple[Integers, Integers]:
    """The tracklet of each image, (N,), and the first image of each tracklet, (T,)."""
    images = np.arange(len(tracks))
    # What has no track is alone: its own number stands for it, below those of tracks.
    rows = np.stack((cameras, np.where(tracks >= 0, tracks, -1 - images)))
    order = np.lexsort(rows)
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(rows[:, order]) != 0).any(0)
    # The sort is stable, so the first of equal ones is the first image.
    firsts = order[begins]
    number = np.empty(len(firsts), np.int64)
    number[firsts.argsort()] = np.arange(len(firsts))
    of = np.empty(len(order), np.int64)
    of[order] = number[begins.cumsum() - 1]
    return of, np.sort(firsts)


def _seen_at_once(of: Integers, cameras: Integers, frames: Integers) -> Integers:
    """Pairs (P, 2) of tracklets that share a frame of a camera, ascending, each once."""
    there = frames >= 0
    seen = np.unique(np.stack((cameras[there], frames[there], of[there]), 1), axis=0)
    pairs, apart = [np.zeros((0, 2), np.int64)], 1
    # In a frame every tracklet is beside those that stand 1, 2, ... places behind it.
    while True:
        beside = (seen[apart:, :2] == seen[:-apart, :2]).all(1)
        if not beside.any():
            return np.unique(np.concatenate(pairs), axis=0)
        pairs.append(np.stack((seen[:-apart][beside, 2], seen[apart:][beside, 2]), 1))
        apart += 1
