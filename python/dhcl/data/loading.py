"""Lists of images as batches: data sets that decode and transform, and their loaders.

What is random in an augmentation depends on a seed and the place of the image in the run, and on
nothing else: not on the number of workers, not on a resumption, not on the number of processes.
"""

from __future__ import annotations

import math
import mmap
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision.transforms import v2  # type: ignore[import-untyped]

from dhcl.data.images import read_image
from dhcl.data.lists import ImageList
from dhcl.data.sampler import Key, PKSampler
from dhcl.data.steady import SteadyLoader

__all__ = ["EvalImages", "Item", "TrainImages", "eval_loader", "train_loader"]

# Seconds for a batch, where nobody says another number.
WAIT = 300.0
Item: TypeAlias = tuple[torch.Tensor, int, int]
"""An image (3, H, W), its index in the list, and its camera."""


class _Cache:
    """Resized images, kept when first used. Forked workers share it and fill it together.

    The memory is anonymous rather than of ``/dev/shm``, which is small in containers. Workers that
    are not forked begin with an empty cache of their own.
    """

    def __init__(self, count: int, shape: tuple[int, ...], budget: int) -> None:
        self._made_of = (count, shape, budget)
        row = math.prod(shape)
        rows = min(count, budget // (row + 1))
        memory = torch.frombuffer(mmap.mmap(-1, max(1, rows * (row + 1))), dtype=torch.uint8)
        self._filled, pixels = memory[:rows], memory[rows : rows * (row + 1)]
        self._pixels = pixels.view(rows, *shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cache, self._made_of

    def get(self, index: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if index >= len(self._filled):
            return make()
        if not self._filled[index]:
            # Two workers may write the same bytes; the mark comes after them.
            self._pixels[index] = make()
            self._filled[index] = 1
        return self._pixels[index]


class _Images(Dataset[Item]):
    def __init__(
        self, images: ImageList, transform: Callable[[torch.Tensor], torch.Tensor], cache: int
    ) -> None:
        self.images = images
        self._resize: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._transform = transform
        self._cache: _Cache | None = None
        if cache < 0:
            raise ValueError(f"cache_bytes: must be at least 0 (got {cache})")
        if not cache:
            return
        first = transform.transforms[0] if isinstance(transform, v2.Compose) else None
        if not isinstance(first, v2.Resize) or len(first.size) != 2:
            raise ValueError("cache_bytes: the transform must begin with a resize to fixed size")
        self._resize = first
        self._cache = _Cache(len(images), (3, *first.size), cache)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def place(self) -> Path | None:
        """A folder that images are read from."""
        return self.images.paths[0].parent if len(self.images) else None

    def _pixels(self, index: int) -> torch.Tensor:
        path = self.images.paths[index]
        if self._cache is None or self._resize is None:
            return read_image(path)
        resize = self._resize
        # A transform that finds the size as wanted changes nothing.
        return self._cache.get(index, lambda: resize(read_image(path)))


class TrainImages(_Images):
    """Augmented images. An item is asked for by ``(index, position)``, as a sampler yields them.

    ``position`` is a number that no other draw of the run has; all that is random in the transform
    follows from ``seed`` and it. The process's own random state is left as it was.

    Args:
        images: N images; their identities are not looked at.
        transform: uint8 (3, h, w) to float32 (3, H, W), see :func:`train_transform`. It may draw
            from torch's CPU generator only.
        seed: at least 0.
        cache_bytes: keep up to this much of the resized images in memory (0: none). An image takes
            3·H·W bytes.

    An item is ``(image, index, camera)``.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[torch.Tensor], torch.Tensor],
        seed: int = 0,
        *,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(images, transform, cache_bytes)
        if seed < 0:
            raise ValueError(f"TrainImages: seed must be at least 0 (got {seed})")
        self.seed = seed

    def __getitem__(self, key: Key) -> Item:
        index, position = key
        pixels = self._pixels(index)
        state = np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)
        # devices=[] and the CPU generator alone: torch.manual_seed would reseed CUDA as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            image = self._transform(pixels)
        return image, index, int(self.images.cameras[index])


class EvalImages(_Images):
    """Images as they are, resized and normalised; item ``index`` is ``(image, index, camera)``.

    Arguments as of :class:`TrainImages`.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(images, transform, cache_bytes)

    def __getitem__(self, index: int) -> Item:
        return self._transform(self._pixels(index)), index, int(self.images.cameras[index])

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


def train_loader(
    dataset: TrainImages,
    sampler: PKSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    persistent: bool = True,
    seconds: float = WAIT,
) -> DataLoader[Item]:
    """Batches of the sampler as ``(images (B, 3, H, W), indices (B,), cameras (B,))``.

    The same for any number of workers. Workers load ahead: count batches where they are used, not
    in the sampler. ``persistent`` keeps workers between epochs. A worker that is killed, or does
    not answer for ``seconds``, is replaced, three times an epoch; then there is a
    :class:`dhcl.errors.WorkerLost`.
    """
    return _loader(dataset, sampler, workers, pin_memory, persistent, seconds)


def eval_loader(
    dataset: Dataset[Item],
    *,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
    persistent: bool = False,
    seconds: float = WAIT,
) -> DataLoader[Item]:
    """All images in order, in batches as of :func:`train_loader`; the last may be smaller."""
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)  # type: ignore[arg-type]
    return _loader(dataset, batches, workers, pin_memory, persistent, seconds)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; without its workers no step could be finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _loader(
    dataset: Dataset[Item],
    batches: Iterable[Any],
    workers: int,
    pin_memory: bool,
    persistent: bool,
    seconds: float,
) -> DataLoader[Item]:
    return SteadyLoader(
        dataset,
        batches,
        seconds=seconds,
        place=getattr(dataset, "place", None),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
        # Its own, so that starting workers draws nothing from the random state of the training.
        generator=torch.Generator().manual_seed(0),
    )
