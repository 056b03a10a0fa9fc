"""Images in any form a user has them, one by one, and what to say of those that can't be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dhcl.data import image_files
from dhcl.data.folders import IMAGE_SUFFIXES
from dhcl.data.images import as_pixels
from dhcl.errors import DataError
from dhcl.words import first_ones, show

__all__ = ["Images", "Source", "as_images", "bad_images", "list_of_bad", "missing_files"]

Images: TypeAlias = Any
"""A folder, a file, or a sequence of files, PIL images or uint8 (H, W, 3) RGB arrays or tensors; or
all of them in one (N, H, W, 3) array or tensor."""


def as_images(images: Images) -> Sequence[Any]:
    """Images, in any form :meth:`dhcl.ReID.features` takes, one by one.

    Raises:
        DataError: no folder, no images. TypeError, ValueError: something else than images.
    """
    if isinstance(images, (str, os.PathLike)):
        path = Path(images).expanduser()
        one = path.is_file() or path.suffix.lower() in IMAGE_SUFFIXES
        return [path] if one and not path.is_dir() else image_files(path)
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (torch.Tensor, np.ndarray)):
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[3] != 3 or str(images.dtype) not in ("uint8", "torch.uint8"):
            raise ValueError(
                f"images: must be (N, H, W, 3) uint8, RGB (got {shape} {images.dtype})"
            )
        listed: Sequence[Any] = images  # type: ignore[assignment]
    else:
        if not isinstance(images, Iterable):
            raise TypeError(f"images: must be files or images (got {type(images).__name__})")
        listed = list(images)
        for index, image in enumerate(listed):
            _check_one(index, image)
    if not len(listed):
        raise DataError("images: there must be at least one (got none)")
    return listed


def _check_one(index: int, image: Any) -> None:
    if isinstance(image, (str, os.PathLike, Image.Image)):
        return
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise TypeError(
            "images: must be files, PIL images or uint8 (H, W, 3) arrays "
            f"(got {type(image).__name__} at {index})"
        )
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[2] != 3 or str(image.dtype) not in ("uint8", "torch.uint8"):
        raise ValueError(
            f"images: an array must be (H, W, 3) uint8, RGB (got {shape} {image.dtype} at {index})"
        )


class Source(Dataset[Any]):
    """Items ``(pixels (3, H, W), index, reason)``; where there is a reason, pixels are zeros."""

    def __init__(
        self,
        images: Sequence[Any],
        transform: Callable[[torch.Tensor], torch.Tensor],
        size: tuple[int, int],
        skip: set[int],
    ) -> None:
        self._images, self._transform, self._size, self._skip = images, transform, size, skip

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        if index not in self._skip:
            try:
                return self._transform(as_pixels(self._images[index])), index, ""
            except DataError as error:
                reason = str(error)
        else:
            reason = "not there"
        return torch.zeros(3, *self._size), index, reason


def missing_files(images: Sequence[Any]) -> list[tuple[int, str]]:
    """Files that are not there."""
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return []
    return [
        (index, "no such file")
        for index, image in enumerate(images)
        if isinstance(image, (str, os.PathLike)) and not Path(image).expanduser().is_file()
    ]


def bad_images(images: Sequence[Any], bad: list[tuple[int, str]]) -> DataError:
    """An error that names the images that can't be read, with their reasons."""
    return DataError(
        f"images: {len(bad):,} can't be read\n{list_of_bad(images, bad)}\n"
        "Repair or remove them, or leave them out with on_bad='skip' (--on-bad skip)."
    )


def list_of_bad(images: Sequence[Any], bad: list[tuple[int, str]]) -> str:
    """The first ten with their reasons."""
    lines = []
    for index, reason in bad:
        image = images[index]
        named = show(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else ""
        # read_image names the file itself.
        lines.append(reason if named and named in reason else f"{index} {named}: {reason}")
    return "\n".join(f"  {line}" for line in first_ones(lines))
