"""Batches of P classes with K images each, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

__all__ = ["Key", "PKSampler"]

Key: TypeAlias = tuple[int, int]
"""An image's index, and the position of this draw in the run."""

# A position is the epoch, then the place in the epoch in this many bits.
_PLACE_BITS = 32


class PKSampler(Sampler[list[Key]]):
    """Batches of ``classes_per_batch`` slots of ``images_per_class`` images.

    A slot is one cluster, its images side by side. Un-clustered images are classes of their own
    with one image each, so a slot holds ``images_per_class`` of them: a batch always has the same
    number of images, and chunks of a few slots (ghost batch norm) are whole classes.

    The rule, for an epoch:

    - A pass visits every cluster and every un-clustered image once, in random order. When it is
      used up, the next pass begins, within a batch if need be.
    - A batch takes a class it already has only when the pass has no other of that kind left. So
      with too few classes for a batch it wraps round: all of them, then again, with images drawn
      anew.
    - Of a cluster, a random image comes first; then, at random, images of other known cameras;
      then others of its camera. Images repeat only when the cluster has too few.
    - Un-clustered images that do not fill a slot share it with a cluster, which then has fewer
      images; without clusters, they are filled up with others of their kind.

    SpCL's sampler (Ge et al. 2020) makes the same stream of classes, and cuts it into batches
    without regard to classes.

    Every rank computes the whole batch and takes its own consecutive slots, so the batch does not
    depend on ``world_size``. An epoch's batches follow from ``seed`` and the epoch only.

    Args:
        labels: (N,) integers, the cluster of each image, or -1 for un-clustered ones.
        cameras: (N,) integers, -1 unknown.
        classes_per_batch: slots in the batch of all ranks; a multiple of ``world_size``.
        images_per_class: images in a slot.
        iterations: batches in an epoch.
        seed: at least 0.
        outliers: whether un-clustered images take part (SpCL) or are left out (Cluster Contrast).
        rank, world_size: this process and the number of all.

    Raises:
        ValueError: an argument out of range, or no class to sample.
    """

    def __init__(
        self,
        labels: NDArray[Any] | torch.Tensor,
        cameras: NDArray[Any] | torch.Tensor,
        *,
        classes_per_batch: int,
        images_per_class: int,
        iterations: int,
        seed: int,
        outliers: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        sizes = {
            "classes_per_batch": classes_per_batch,
            "images_per_class": images_per_class,
            "iterations": iterations,
            "world_size": world_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"PKSampler: {name} must be at least 1 (got {value})")
        if seed < 0:
            raise ValueError(f"PKSampler: seed must be at least 0 (got {seed})")
        if not 0 <= rank < world_size:
            raise ValueError(f"PKSampler: rank must be in [0, {world_size}) (got {rank})")
        if classes_per_batch % world_size:
            raise ValueError(
                f"PKSampler: classes_per_batch must be a multiple of world_size "
                f"(got {classes_per_batch} and {world_size})"
            )
        numbers = _integers("labels", labels)
        self._cameras = _integers("cameras", cameras)
        if len(numbers) != len(self._cameras):
            raise ValueError(
                f"PKSampler: labels and cameras must have equal length "
                f"(got {len(numbers)} and {len(self._cameras)})"
            )
        if len(numbers) and np.min(numbers) < -1:
            raise ValueError(f"PKSampler: labels must be at least -1 (got {np.min(numbers)})")
        order = np.argsort(numbers, kind="stable")
        alone = int((numbers < 0).sum())
        self._outliers = order[: alone if outliers else 0]
        # Images by cluster, and where each cluster begins and ends among them.
        self._members = order[alone:]
        begins = np.flatnonzero(np.diff(numbers[self._members], prepend=-1))
        self._bounds = np.append(begins, len(self._members))
        self._clusters = len(begins)
        if not self._clusters and not len(self._outliers):
            what = "no images" if not len(numbers) else "no clusters, and outliers are left out"
            raise ValueError(f"PKSampler: there must be a class to sample (got {what})")
        self._slots, self._images = classes_per_batch, images_per_class
        self._iterations = iterations
        share = classes_per_batch // world_size
        self._mine = range(rank * share, (rank + 1) * share)
        self._seed, self._epoch, self._start = seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; it begins at its first batch."""
        if not 0 <= epoch < 1 << 31:
            raise ValueError(f"PKSampler: epoch must be in [0, 2**31) (got {epoch})")
        self._epoch, self._start = epoch, 0

    def start(self, iteration: int) -> None:
        """Begin this epoch at the batch of this number, as if those before had been drawn."""
        if not 0 <= iteration <= self._iterations:
            raise ValueError(
                f"PKSampler: iteration must be in [0, {self._iterations}] (got {iteration})"
            )
        self._start = iteration

    def __len__(self) -> int:
        return self._iterations - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng([self._seed, self._epoch])
        left = _Pass()
        epoch, start = self._epoch, self._start
        for iteration in range(self._iterations):
            slots = self._draw(left, rng)
            if iteration < start:
                continue
            batch = []
            for number in self._mine:
                place = (iteration * self._slots + number) * self._images
                first = (epoch << _PLACE_BITS) + place
                batch += [(index, first + i) for i, index in enumerate(slots[number])]
            yield batch

    def _draw(self, left: _Pass, rng: np.random.Generator) -> list[list[int]]:
        """The images of each slot of the next batch."""
        slots: list[list[int]] = []
        clusters: Counter[int] = Counter()
        outliers: Counter[int] = Counter()
        for _ in range(self._slots):
            alone = next(left.kinds, None)
            if alone is None:
                self._refill(left, rng)
                alone = next(left.kinds)
            images = [left.outliers.take(outliers) for _ in range(alone)]
            missing = self._images - len(images)
            if missing and self._clusters:
                images += self._images_of(left.clusters.take(clusters), missing, rng)
            elif missing:
                others = _Queue(rng.permutation(self._outliers))
                images += [
                    others.take(outliers) if len(others) else images[0] for _ in range(missing)
                ]
            slots.append(images)
        return slots

    def _refill(self, left: _Pass, rng: np.random.Generator) -> None:
        """Begin a pass: every class once, and in which order slots are of which kind."""
        left.clusters = _Queue(rng.permutation(self._clusters))
        left.outliers = _Queue(rng.permutation(self._outliers))
        full, rest = divmod(len(self._outliers), self._images)
        kinds = np.zeros(full + max(self._clusters, bool(rest)), np.int64)
        kinds[:full] = self._images
        kinds[full : full + bool(rest)] = rest
        left.kinds = iter(rng.permutation(kinds))

    def _images_of(self, cluster: int, count: int, rng: np.random.Generator) -> list[int]:
        begin, end = self._bounds[cluster : cluster + 2]
        shuffled = rng.permutation(self._members[begin:end])
        anchor, others = shuffled[0], shuffled[1:]
        cameras, camera = self._cameras[others], self._cameras[anchor]
        elsewhere = (cameras != camera) & (cameras >= 0) & (camera >= 0)
        ranked = np.concatenate(([anchor], others[elsewhere], others[~elsewhere]))
        # np.resize repeats from the beginning when there are too few.
        return [int(index) for index in np.resize(ranked, count)]


class _Queue:
    """Distinct numbers in an order, taken one by one; ten million are no more than their array."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self._values, self._next = values, 0
        self._passed: list[int] = []  # earlier ones that are still here

    def __len__(self) -> int:
        return len(self._passed) + len(self._values) - self._next

    def take(self, used: Counter[int]) -> int:
        """Remove the first of those that this batch has least often, mostly not at all."""
        place = next((i for i, item in enumerate(self._passed) if not used[item]), None)
        while place is None and self._next < len(self._values):
            self._passed.append(int(self._values[self._next]))
            self._next += 1
            if not used[self._passed[-1]]:
                place = len(self._passed) - 1
        if place is None:
            place = min(range(len(self._passed)), key=lambda i: used[self._passed[i]])
        item = self._passed.pop(place)
        used[item] += 1
        return item


class _Pass:
    """What a pass has not visited yet."""

    def __init__(self) -> None:
        nothing = np.zeros(0, np.int64)
        self.kinds: Iterator[int] = iter(nothing)  # of slots to come, how many outliers each holds
        self.clusters, self.outliers = _Queue(nothing), _Queue(nothing)


def _integers(name: str, values: NDArray[Any] | torch.Tensor) -> NDArray[np.int64]:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind != "i"):
        raise ValueError(
            f"PKSampler: {name} must be (N,) integers (got shape {array.shape}, {array.dtype})"
        )
    return array.astype(np.int64)
