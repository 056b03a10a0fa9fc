"""``dhcl crops``: from a video and a tracker's boxes to a folder of images with track numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dhcl.words import say, show

__all__ = ["crops"]


@dataclass(frozen=True)
class CropArguments:
    """Cut a tracker's boxes out of a video: a folder of images with track numbers."""

    boxes: tyro.conf.Positional[Path]
    """File of boxes in the format of MOTChallenge: frame,track,left,top,width,height,..."""
    frames: Path
    """Folder of the frames, with their numbers at the end of their names; or the video."""
    out: Path
    """Folder that the images are written to, below a folder for the camera."""
    camera: int = 1
    """Number of the camera; several cameras can share a folder."""
    every: int = 1
    """Number of frames from one that is used to the next; neighbours look alike."""


def crops(given: CropArguments) -> None:
    """Write the crops, and say how to train on them."""
    from tqdm import tqdm

    from dhcl.data.mot import CROP_PATTERN, read_mot, write_crops

    boxes = read_mot(given.boxes)
    with tqdm(desc="crops", unit="frame", leave=False, disable=None) as bar:
        report = write_crops(
            boxes,
            given.frames,
            given.out,
            camera=given.camera,
            every=given.every,
            progress=lambda _: bar.update(),
        )
    left_out = f"; {report.without_pixels:,} boxes have no pixels" if report.without_pixels else ""
    say(
        f"{show(given.out)}: {report.crops:,} images of {report.tracks:,} tracks from "
        f"{report.frames:,} frames of camera {given.camera}{left_out}\n"
        f"dhcl train --data folder --root {show(given.out)} --pattern '{CROP_PATTERN}'"
    )
