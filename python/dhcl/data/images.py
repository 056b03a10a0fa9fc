"""Image files to pixels: decoding, and checking that all files of a data set can be decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dhcl.data.limits import check_header, check_size, read_file
from dhcl.data.lists import ImageList
from dhcl.errors import DataError
from dhcl.files import waiting_for
from dhcl.stored import IMAGE_FORMATS
from dhcl.words import first_line, first_ones, show

try:
    from torchvision.io import ImageReadMode, decode_image  # type: ignore[import-untyped]
except ImportError:  # deprecated since torchvision 0.29, to be removed
    decode_image = None

__all__ = [
    "BadImage",
    "ImageReport",
    "as_pixels",
    "check_images",
    "open_image",
    "read_bytes",
    "read_image",
    "thumbnail",
    "upright",
]


def read_image(path: Path) -> torch.Tensor:
    """Decode a file, whole: (3, H, W) uint8, RGB, as Pillow gives it.

    torchvision, where it still has decoders, decodes JPEG and WebP at about twice Pillow's speed;
    Pillow decodes the rest. Images are turned upright as their EXIF says.

    Raises:
        DataError: with the path and the reason: no image, a damaged one, not a regular file, or
            more bytes or pixels than ``DHCL_MAX_IMAGE_BYTES`` and ``DHCL_MAX_PIXELS`` allow
            (256 MiB and 8192 x 8192 where they are not set).
    """
    try:
        return _decode(read_file(path))
    except Exception as error:  # decoders raise nearly anything on bad data
        raise DataError(
            f"image: must be a whole, readable image (got {show(path)}: {_reason(error)})"
        ) from error


def read_bytes(data: bytes) -> torch.Tensor:
    """Decode what a file holds, as :func:`read_image` does.

    Raises:
        DataError: with the reason: no image, a damaged one, or one of too many pixels.
    """
    try:
        return _decode(data)
    except Exception as error:  # decoders raise nearly anything on bad data
        raise DataError(f"image: must be a whole, readable image ({_reason(error)})") from error


def as_pixels(image: Any) -> torch.Tensor:
    """(3, H, W) uint8, RGB, of a file, a Pillow image or an array or tensor (H, W, 3) uint8.

    The same pixels for a file, the same file opened by Pillow, and the array of either. An array
    may have any strides, and be read-only; it is not kept.

    Raises:
        DataError: a file or Pillow image that can't be decoded; a crop without pixels.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        try:
            image = np.asarray(upright(image))
        except Exception as error:  # files are decoded here; decoders raise nearly anything
            raise DataError(f"image: {_reason(error)}") from error
    planes = _planar(image)
    if not planes.numel():
        height, width = planes.shape[1:]
        raise DataError(f"image: there are no pixels in it ({height} x {width})")
    return planes


def upright(image: Image.Image) -> Image.Image:
    """RGB with 8 bits, turned as its EXIF says."""
    _load(image)
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        deep = np.asarray(turned).clip(0, 0xFFFF)
        turned = Image.fromarray((deep >> 8).astype(np.uint8))
    return turned.convert("RGB")


def _is_turned(image: Image.Image) -> bool:
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)


def _load(image: Image.Image) -> None:
    """Decode the image, if it has not been.

    Pillow maps uncompressed rows of a named TIFF into memory as they lie in the file, also where
    its orientation exchanges rows and columns, and then they are torn. Without a name it decodes.
    """
    if isinstance(image, ImageFile):
        check_size(*image.size)
    if not isinstance(image, TiffImageFile):
        image.load()
        return
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def open_image(path: Path) -> ImageFile:
    """A file as Pillow opens it, not decoded yet; to be closed, as in a ``with`` statement.

    Raises:
        Exception: whatever Pillow raises for a file that is no image, and what :func:`read_image`
            refuses of other files.
    """
    return _open(read_file(path))


def _open(data: bytes) -> ImageFile:
    check_header(data)
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    check_size(*image.size)
    return image


def thumbnail(path: Path, height: int) -> Image.Image:
    """A small picture of a file: RGB, upright, at most ``height`` rows and twice as many columns.

    Raises:
        Exception: whatever the decoder raises where the file is gone or no image.
    """
    with open_image(path) as image:
        # JPEG is decoded at a fraction of its size; turned pictures need the rows as columns.
        image.draft("RGB", (2 * height, 2 * height))
        small = upright(image)
    small.thumbnail((2 * height, height), Image.Resampling.BICUBIC)
    return small


def _planar(pixels: Any) -> torch.Tensor:
    """(H, W, 3) uint8 as (3, H, W), on the CPU."""
    if isinstance(pixels, np.ndarray):
        # A copy: torch can share neither negative steps nor memory that is not to be written.
        pixels = torch.from_numpy(np.array(pixels, order="C"))
    planes: torch.Tensor = pixels.cpu().permute(2, 0, 1)
    return planes


def _decode(data: bytes) -> torch.Tensor:
    if not data:
        raise DataError("the file is empty")
    if decode_image is None or not _as_pillow_does(data) or not check_header(data):
        return _decode_with_pillow(data)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image: torch.Tensor = decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:
        return _decode_with_pillow(data)
    # An animation has one dimension more.
    return image if image.dim() == 3 else _decode_with_pillow(data)


def _as_pillow_does(data: bytes) -> bool:
    """Whether torchvision decodes this kind of file to the pixels that Pillow gives.

    And without harm: its decoder of PNG ends the process where the compressed data is damaged.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return True
    # It does not turn a WebP as its EXIF says, of which the header of an extended one tells.
    turned = data[12:16] == b"VP8X" and bool(data[20:21] and data[20] & 8)
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP" and not turned


def _decode_with_pillow(data: bytes) -> torch.Tensor:
    with _open(data) as image:
        _load(image)
        # Most are as they should be, and copies of them take a tenth of the time.
        plain = image.mode == "RGB" and not _is_turned(image)
        return _planar(np.asarray(image if plain else upright(image)))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


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
            left = np.ones(len(images), dtype=bool)
            # In blocks, so that Ctrl-C has little to wait for.
            for start in range(0, len(images), 256):
                block = images.paths[start : start + 256]
                with waiting_for(block[0].parent):
                    reasons = list(pool.map(_problem, block))
                for place, reason in enumerate(reasons):
                    if reason is not None:
                        bad.append(BadImage(split, block[place], reason))
                        left[start + place] = False
                done += len(block)
                if progress:
                    progress(done, total)
            good[split] = images if left.all() else images.select(left)
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
        _decode(read_file(path))
    except Exception as error:  # decoders raise nearly anything on bad data
        return _reason(error)
    return None
