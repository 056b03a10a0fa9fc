"""Image files to tensors: checking, decoding, augmentation, loaders.

Everything up to normalisation is uint8, which is where most of the time is saved. What is random
in an augmentation depends on a seed and the place of the image in the run, and on nothing else:
not on the number of workers, not on a resumption, not on the number of processes.
"""

from __future__ import annotations

import io
import math
import mmap
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2  # type: ignore[import-untyped]

from dhcl.data.datasets import ImageList
from dhcl.data.sampler import Key, PKSampler
from dhcl.errors import DataError
from dhcl.words import first_ones, show

try:
    from torchvision.io import ImageReadMode, decode_image  # type: ignore[import-untyped]
except ImportError:  # deprecated since torchvision 0.29, to be removed
    decode_image = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Item: TypeAlias = tuple[torch.Tensor, int, int]


# ---- decoding -----------------------------------------------------------------------------------


def read_image(path: Path) -> torch.Tensor:
    """Decode a file, whole: (3, H, W) uint8, RGB, as Pillow gives it.

    torchvision, where it still has decoders, decodes JPEG, PNG and WebP at about twice Pillow's
    speed; Pillow decodes the rest. JPEG, PNG and TIFF are turned upright as their EXIF says.
    Raises ``DataError`` with the path and the reason.
    """
    try:
        return _decode(path.read_bytes())
    except Exception as error:  # decoders raise nearly anything on bad data
        raise DataError(
            f"image: must be a whole, readable image (got {show(path)}: {_reason(error)})"
        ) from error


def _decode(data: bytes) -> torch.Tensor:
    if not data:
        raise DataError("the file is empty")
    if decode_image is None:
        return _decode_with_pillow(data)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image: torch.Tensor = decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:
        return _decode_with_pillow(data)
    if image.dim() != 3:  # an animation
        return _decode_with_pillow(data)
    if image.dtype != torch.uint8:  # PNG with 16 bits
        image = v2.functional.to_dtype(image, torch.uint8, scale=True)
    return image


def _decode_with_pillow(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# ---- checking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadImage:
    """A file that can't be used, and why."""

    split: str
    path: Path
    reason: str


@dataclass(frozen=True)
class ImageReport:
    """What :func:`check_images` saw; ``str()`` is a text for the log."""

    checked: int
    bad: tuple[BadImage, ...]

    def __str__(self) -> str:
        if not self.bad:
            return f"All {self.checked:,} images can be read."
        head = f"{len(self.bad):,} of {self.checked:,} images can't be read:"
        lines = first_ones([f"{b.split}: {show(b.path)}: {b.reason}" for b in self.bad])
        return "\n  ".join([head, *lines])


def check_images(
    lists: Mapping[str, ImageList],
    *,
    on_bad: Literal["refuse", "skip"] = "refuse",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, ImageList], ImageReport]:
    """Open and decode every file, so that nothing stops a run later.

    Args:
        lists: images by name of split.
        on_bad: ``refuse`` raises if any file is missing, truncated or no image; ``skip`` leaves
            such files out.
        workers: threads.
        progress: called now and then with the number of images done and of all.

    Returns:
        the lists, without bad images, and a report that names these.

    Raises:
        DataError: bad images and ``refuse`` (the first ten are named), or a list of which nothing
            is left.
    """
    if on_bad not in ("refuse", "skip"):
        raise ValueError(f"check_images: on_bad must be 'refuse' or 'skip' (got {on_bad!r})")
    if workers < 1:
        raise ValueError(f"check_images: workers must be at least 1 (got {workers})")
    total = sum(len(images) for images in lists.values())
    bad: list[BadImage] = []
    good: dict[str, ImageList] = {}
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for split, images in lists.items():
            reasons: list[str | None] = []
            # In blocks, so that Ctrl-C has little to wait for.
            for start in range(0, len(images), 256):
                block = images.paths[start : start + 256]
                reasons += pool.map(_problem, block)
                done += len(block)
                if progress:
                    progress(done, total)
            pairs = zip(images.paths, reasons, strict=True)
            bad += (BadImage(split, path, reason) for path, reason in pairs if reason is not None)
            good[split] = images.select([i for i, reason in enumerate(reasons) if reason is None])
    report = ImageReport(total, tuple(bad))
    if bad and on_bad == "refuse":
        raise DataError(f"{report}\nRepair or remove them, or leave them out with on_bad: skip.")
    empty = [split for split, images in lists.items() if len(images) and not len(good[split])]
    if empty or not total:
        where = f" in {', '.join(empty)}" if empty else ""
        raise DataError(f"images: there must be at least one that can be read{where}\n{report}")
    return good, report


def _problem(path: Path) -> str | None:
    try:
        _decode(path.read_bytes())
    except Exception as error:  # decoders raise nearly anything on bad data
        return _reason(error)
    return None


# ---- transforms ---------------------------------------------------------------------------------


class _Planar(nn.Module):
    """Channel after channel: decoders mix them, and all that follows the resize is faster so."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.contiguous()


class _Normalize(nn.Module):
    """uint8 (3, H, W) to float32, ``(x / 255 - mean) / std``, in two passes over the pixels."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"normalisation: mean and std must be three numbers, std positive "
                f"(got {mean}, {std})"
            )
        self.mean = (torch.tensor(mean, dtype=torch.float64) * 255).float().view(3, 1, 1)
        self.std = (torch.tensor(std, dtype=torch.float64) * 255).float().view(3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.sub(image, self.mean).div_(self.std)


def train_transform(
    size: tuple[int, int],
    *,
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    color_jitter: float = 0.0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> v2.Compose:
    """Augmentation of the field: resize, flip, pad and crop, normalise, erase.

    Takes uint8 (3, h, w), gives float32 (3, H, W). Defaults are SpCL's (Ge et al. 2020).

    Args:
        size: (H, W) in pixels.
        flip: probability of mirroring left and right.
        pad: black pixels added on each side before a random crop to ``size``.
        erase: probability of erasing a rectangle of 2 to 40 % of the area, aspect 0.3 to 3.3
            (Zhong et al. 2020), to the mean colour.
        color_jitter: s; brightness, contrast and saturation change by up to ±s, hue by ±s/4.
            Hue is slow (milliseconds an image).
        mean, std: of normalised channels, in units of 1.
    """
    _check_size(size)
    for name, value in (("flip", flip), ("erase", erase), ("color_jitter", color_jitter)):
        if not 0 <= value <= 1:
            raise ValueError(f"train_transform: {name} must be in [0, 1] (got {value})")
    if pad < 0:
        raise ValueError(f"train_transform: pad must be at least 0 (got {pad})")
    s = color_jitter
    steps = [
        _resize(size),
        _Planar(),
        v2.RandomHorizontalFlip(flip) if flip else None,
        v2.RandomCrop(size, padding=pad) if pad else None,
        v2.ColorJitter(s, s, s, s / 4) if s else None,
        _Normalize(mean, std),
        v2.RandomErasing(erase, scale=(0.02, 0.4), ratio=(0.3, 3.3)) if erase else None,
    ]
    return v2.Compose([step for step in steps if step is not None])


def eval_transform(
    size: tuple[int, int],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> v2.Compose:
    """Resize to (H, W) and normalise: uint8 (3, h, w) to float32 (3, H, W)."""
    _check_size(size)
    return v2.Compose([_resize(size), _Planar(), _Normalize(mean, std)])


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: must be height and width in pixels (got {size})")


def _resize(size: tuple[int, int]) -> v2.Resize:
    return v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


# ---- data sets ----------------------------------------------------------------------------------


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


# ---- loaders ------------------------------------------------------------------------------------


def train_loader(
    dataset: TrainImages,
    sampler: PKSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    persistent: bool = True,
) -> DataLoader[Item]:
    """Batches of the sampler as ``(images (B, 3, H, W), indices (B,), cameras (B,))``.

    The same for any number of workers. Workers load ahead: count batches where they are used, not
    in the sampler. ``persistent`` keeps workers between epochs.
    """
    return _loader(dataset, workers, pin_memory, persistent, batch_sampler=sampler)


def eval_loader(
    dataset: Dataset[Item],
    *,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
    persistent: bool = False,
) -> DataLoader[Item]:
    """All images in order, in batches as of :func:`train_loader`; the last may be smaller."""
    return _loader(dataset, workers, pin_memory, persistent, batch_size=batch_size)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; without its workers no step could be finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _loader(
    dataset: Dataset[Item], workers: int, pin_memory: bool, persistent: bool, **batches: Any
) -> DataLoader[Item]:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
        # Its own, so that starting workers draws nothing from the random state of the training.
        generator=torch.Generator().manual_seed(0),
        **batches,
    )
