"""Images in any form a user has them, one by one, and what to say of those that can't be read."""

from __future__ import annotations

import contextlib
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
from dhcl.files import waiting_for
from dhcl.words import first_ones, show

__all__ = [
    "Images",
    "Source",
    "as_images",
    "bad_images",
    "has_no_pixels",
    "list_of_bad",
    "missing_files",
]

Images: TypeAlias = Any
"""A folder, a file, or files, PIL images or uint8 (H, W, 3) RGB arrays or tensors in any sequence,
array or generator; or all of them in one (N, H, W, 3) array or tensor."""


def as_images(images: Images) -> Sequence[Any]:
    """Images, in any form :meth:`dhcl.ReID.features` takes, one by one.

    A sequence may be empty, as the crops of a frame may be; a folder may not.

    Raises:
        DataError: no such folder, or no images in it.
        TypeError, ValueError: something else than images.
    """
    if isinstance(images, (str, os.PathLike)):
        path = Path(images).expanduser()
        one = path.is_file() or path.suffix.lower() in IMAGE_SUFFIXES
        return [path] if one and not path.is_dir() else image_files(path)
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (torch.Tensor, np.ndarray)) and not _holds_images(images):
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[3] != 3 or not _is_uint8(images):
            raise ValueError(
                f"images: must be (N, H, W, 3) uint8, RGB "
                f"(got {shape} {images.dtype}{_advice(shape[1:], images)})"
            )
        listed: Sequence[Any] = images  # type: ignore[assignment]
        return listed
    if not isinstance(images, Iterable):
        raise TypeError(f"images: must be files or images (got {type(images).__name__})")
    listed = list(images)
    for index, image in enumerate(listed):
        _check_one(index, image)
    return listed


def _holds_images(images: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether this is an array of file names or images, or one without a place for any."""
    one_by_one = isinstance(images, np.ndarray) and images.dtype.kind in "OU"
    return tuple(images.shape) == (0,) or (one_by_one and images.ndim == 1)


def _check_one(index: int, image: Any) -> None:
    if isinstance(image, (str, os.PathLike, Image.Image)):
        return
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise TypeError(
            "images: must be files, PIL images or uint8 (H, W, 3) arrays "
            f"(got {type(image).__name__} at {index})"
        )
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[2] != 3 or not _is_uint8(image):
        raise ValueError(
            "images: an array must be (H, W, 3) uint8, RGB "
            f"(got {shape} {image.dtype} at {index}{_advice(shape, image)})"
        )


def _is_uint8(image: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    return str(image.dtype) in ("uint8", "torch.uint8")


def _advice(shape: tuple[int, ...], image: torch.Tensor | np.ndarray[Any, Any]) -> str:
    """What makes an image of an array of another kind; numbers do not tell what is white."""
    if not _is_uint8(image):
        return "; scale it to 0..255 and convert it to uint8"
    if len(shape) == 3 and shape[0] == 3:
        return "; planes go last: permute(1, 2, 0) of a tensor, transpose(1, 2, 0) of an array"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 2, 4)):
        return "; Pillow's Image.fromarray makes an image of grey values and of RGBA"
    return ""


def has_no_pixels(image: Any) -> bool:
    """Whether this is a crop in memory of no height or no width."""
    if isinstance(image, Image.Image):
        return 0 in image.size
    return isinstance(image, (torch.Tensor, np.ndarray)) and 0 in image.shape


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

    @property
    def place(self) -> Path | None:
        """A folder that images are read from; None where the first one is in memory."""
        return _place(self._images)

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
    place = _place(images)
    with waiting_for(place) if place else contextlib.nullcontext():
        return [
            (index, "no such file")
            for index, image in enumerate(images)
            if isinstance(image, (str, os.PathLike)) and not Path(image).expanduser().exists()
        ]


def _place(images: Sequence[Any]) -> Path | None:
    first = images[0] if len(images) else None
    return Path(first).parent if isinstance(first, (str, os.PathLike)) else None


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
        named = f" {show(os.fspath(image))}" if isinstance(image, (str, os.PathLike)) else ""
        # read_image names the file itself.
        itself = named and named.strip() in reason
        lines.append(reason if itself else f"{index}{named}: {reason.removeprefix('image: ')}")
    return "\n".join(f"  {line}" for line in first_ones(lines))
