"""Crops from the frames of a video and a tracker's boxes, in the format of MOTChallenge.

The format is that of Milan et al., "MOT16: A benchmark for multi-object tracking" (2016): lines of
``frame, track, left, top, width, height, confidence, class, visibility``, frames from 1.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dhcl.data.folders import image_files
from dhcl.data.images import read_image
from dhcl.errors import DataError
from dhcl.files import new_file, new_folder
from dhcl.stored import Damaged, open_stored
from dhcl.words import first_line, show

__all__ = ["CROP_PATTERN", "Box", "CropReport", "read_mot", "write_crops"]

CROP_PATTERN = r"(?P<track>\d+)_c(?P<camera>\d+)_f(?P<frame>\d+)"
"""What a pattern for the crops' names is; ``track`` and ``frame`` count within the camera."""

Pixels = NDArray[np.uint8]

# Numbers of frames and tracks are below this, up to which every whole number is one of fp64's.
_MOST = 2**53


@dataclass(frozen=True)
class Box:
    """A line of the file: which frame, from 1, whose track, and where in pixels."""

    frame: int
    track: int
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class CropReport:
    """What :func:`write_crops` did.

    Attributes:
        crops: files written.
        tracks: tracklets they are of.
        frames: frames they are from.
        without_pixels: boxes left out because nothing of them lies in their frame.
    """

    crops: int
    tracks: int
    frames: int
    without_pixels: int


def read_mot(path: Path) -> list[Box]:
    """The boxes in a file of MOTChallenge's format, ground truth or a tracker's.

    Lines of a ground truth that are not to be counted (their confidence is 0) are left out.

    Raises:
        DataError: no such file; a line that is not of the format; boxes without track numbers, as a
            detector writes them.
    """
    if not path.is_file():
        raise DataError(f"boxes: no such file: {show(path)}")
    boxes, number = [], 0
    try:
        with io.TextIOWrapper(open_stored(path), "utf-8", "replace", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not any(cell.strip() for cell in row):
                    continue
                box = _box(path, number, row)
                if len(row) < 7 or float(row[6]) != 0:
                    boxes.append(box)
    except (OSError, csv.Error, Damaged) as error:
        raise DataError(
            f"boxes: {show(path)} can't be read ({first_line(error)} after line {number})"
        ) from error
    if not boxes:
        raise DataError(f"boxes: there are none in {show(path)}")
    return boxes


def _box(path: Path, number: int, row: list[str]) -> Box:
    try:
        frame, track, *place = (float(cell) for cell in row[:6])
        left, top, width, height = place
        float(row[6] if len(row) > 6 else 0)
        whole = frame == int(frame) and track == int(track) and max(frame, track) < _MOST
        whole = whole and bool(np.isfinite(place).all())
    except (ValueError, OverflowError):
        whole = False
    if not whole:
        raise DataError(
            f"boxes: a line must be frame,track,left,top,width,height,... (got {','.join(row)!r} "
            f"in line {number} of {show(path)})"
        )
    if track < 0 or frame < 0:
        raise DataError(
            f"boxes: a box must have a track number (got {int(track)} in line {number} of "
            f"{show(path)}); a detector's boxes go through a tracker first"
        )
    return Box(int(frame), int(track), left, top, width, height)


def write_crops(
    boxes: list[Box],
    frames: Path,
    out: Path,
    *,
    camera: int = 1,
    every: int = 1,
    progress: Callable[[int], object] | None = None,
) -> CropReport:
    """Cut boxes out of their frames and write them as ``0004_c1_f000012.png`` below a folder.

    Boxes are rounded to whole pixels and cut at the border.

    Args:
        boxes: as of :func:`read_mot`.
        frames: folder of images whose names end in the frame's number, as ``img1`` of MOTChallenge;
            or a video, which needs OpenCV.
        out: folder; the crops go to ``c1`` in it, whole or not at all.
        camera: number of the camera, of which ``out`` must hold no crops yet.
        every: take each n-th frame alone; neighbours look alike.
        progress: told how many frames are done.

    Raises:
        DataError: no frames, or not those of the boxes; crops of that camera are there already; no
            box with pixels; no OpenCV.
    """
    if every < 1 or camera < 0:
        raise DataError(
            f"every and camera: must be at least 1 and 0 (got every {every} and camera {camera})"
        )
    by_frame: dict[int, list[Box]] = {}
    for box in boxes:
        by_frame.setdefault(box.frame, []).append(box)
    wanted = sorted(by_frame)[::every]
    home = out / f"c{camera}"
    if home.exists():
        raise DataError(f"out: there are crops of camera {camera} in {show(out)} already")
    crops, without, tracks = 0, 0, set()
    with new_folder(home) as partial, _open(frames) as read:
        for done, frame in enumerate(wanted, 1):
            image = read(frame)
            for box in by_frame[frame]:
                crop = _cut(image, box)
                if not crop.size:
                    without += 1
                    continue
                name = f"{box.track:04d}_c{camera}_f{frame:06d}.png"
                with new_file(partial / name) as file:
                    Image.fromarray(crop).save(file, "PNG")
                crops += 1
                tracks.add(box.track)
            if progress:
                progress(done)
        if not crops:
            raise DataError(f"boxes: none of {without:,} has pixels in its frame")
    return CropReport(crops, len(tracks), len(wanted), without)


def _cut(image: Pixels, box: Box) -> Pixels:
    """The part of an image (H, W, 3) that lies in the box."""
    height, width = image.shape[:2]
    corners = np.array([box.left, box.top, box.left + box.width, box.top + box.height])
    left, top, right, bottom = np.rint(corners).clip(0, [width, height, width, height]).astype(int)
    return np.ascontiguousarray(image[top:bottom, left:right])


@contextmanager
def _open(frames: Path) -> Iterator[Callable[[int], Pixels]]:
    """What gives the pixels (H, W, 3) RGB of a frame by its number, asked for in rising order."""
    if frames.is_dir():
        yield _from_folder(frames)
    elif frames.is_file():
        capture = _capture(frames)
        try:
            yield _from_video(frames, capture)
        finally:
            capture.release()
    else:
        raise DataError(f"frames: there is neither a folder nor a video at {show(frames)}")


def _from_folder(folder: Path) -> Callable[[int], Pixels]:
    files = {}
    for path in image_files(folder):
        if number := re.search(r"(\d+)$", path.stem):
            files[int(number[1])] = path

    def read(frame: int) -> Pixels:
        if frame not in files:
            span = f"has {min(files)} to {max(files)}" if files else "has no numbers in its names"
            raise DataError(f"frames: there is no frame {frame} in {show(folder)}, which {span}")
        pixels: Pixels = read_image(files[frame]).permute(1, 2, 0).numpy()
        return pixels

    return read


def _capture(video: Path) -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise DataError(
            "frames: a video needs OpenCV: pip install opencv-python-headless; or give a folder of "
            "its frames (ffmpeg -i VIDEO frames/%06d.png)"
        ) from error
    capture = cv2.VideoCapture(str(video))
    if not capture.isOpened():
        raise DataError(f"frames: {show(video)} can't be read as a video")
    return capture


def _from_video(video: Path, capture: Any) -> Callable[[int], Pixels]:
    at = 0

    def read(frame: int) -> Pixels:
        nonlocal at
        image = None
        while at < frame:  # frames count from 1, and seeking is not exact in every format
            whole, image = capture.read()
            if not whole:
                raise DataError(f"frames: {show(video)} ends before frame {frame}, at {at}")
            at += 1
        assert image is not None
        return np.ascontiguousarray(image[:, :, ::-1])

    return read
