"""Batches of P classes with K images each, the same on every rank."""

from __future__ import annotations

from collections import Counter, deque
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
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-2))
        groups = np.split(order, starts[1:]) if len(order) else []
        self._clusters = [group for group in groups if numbers[group[0]] >= 0]
        self._outliers = order[numbers[order] < 0] if outliers else order[:0]
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
            if not left.slots:
                self._refill(left, rng)
            images = [_take(left.outliers, outliers) for _ in range(left.slots.popleft())]
            missing = self._images - len(images)
            if missing and self._clusters:
                images += self._members(_take(left.clusters, clusters), missing, rng)
            elif missing:
                others = deque(rng.permutation(self._outliers).tolist())
                images += [_take(others, outliers) if others else images[0] for _ in range(missing)]
            slots.append(images)
        return slots

    def _refill(self, left: _Pass, rng: np.random.Generator) -> None:
        """Begin a pass: every class once, and in which order slots are of which kind."""
        left.clusters.extend(rng.permutation(len(self._clusters)).tolist())
        left.outliers.extend(rng.permutation(self._outliers).tolist())
        full, rest = divmod(len(self._outliers), self._images)
        kinds = [self._images] * full + [rest] * bool(rest)
        kinds += [0] * (len(self._clusters) - bool(rest))
        left.slots.extend(rng.permutation(kinds).tolist())

    def _members(self, cluster: int, count: int, rng: np.random.Generator) -> list[int]:
        shuffled = rng.permutation(self._clusters[cluster])
        anchor, others = shuffled[0], shuffled[1:]
        cameras, camera = self._cameras[others], self._cameras[anchor]
        elsewhere = (cameras != camera) & (cameras >= 0) & (camera >= 0)
        ranked = np.concatenate(([anchor], others[elsewhere], others[~elsewhere]))
        # np.resize repeats from the beginning when there are too few.
        return [int(index) for index in np.resize(ranked, count)]


class _Pass:
    """What a pass has not visited yet."""

    def __init__(self) -> None:
        self.slots: deque[int] = deque()  # of each slot to come, how many outliers it holds
        self.clusters: deque[int] = deque()
        self.outliers: deque[int] = deque()


def _take(queue: deque[int], used: Counter[int]) -> int:
    """Remove the first of those that this batch has least often, mostly not at all."""
    item = next((x for x in queue if not used[x]), None)
    if item is None:
        item = min(queue, key=lambda x: used[x])
    queue.remove(item)
    used[item] += 1
    return item


def _integers(name: str, values: NDArray[Any] | torch.Tensor) -> NDArray[np.int64]:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind != "i"):
        raise ValueError(
            f"PKSampler: {name} must be (N,) integers (got shape {array.shape}, {array.dtype})"
        )
    return array.astype(np.int64)
