"""The commands that draw pedestrians: ``dhcl synth``, ``dhcl demo`` and ``dhcl pretrain``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from dhcl.demo import Demo, run_demo
from dhcl.pretrain import Pretrain
from dhcl.pretrain import pretrain as learn
from dhcl.synth.progress import draw

__all__ = ["demo", "pretrain", "synth"]


@dataclass(frozen=True)
class SynthArguments:
    """Draw pedestrians in several cameras: a data set in Market-1501's layout."""

    out: tyro.conf.Positional[Path]
    """Folder to make."""
    ids: int = 200
    """Pedestrians; half of them are for testing."""
    cameras: int = 4
    """Cameras, each with its colours, light, background, blur and viewpoint."""
    images_per_camera: int = 4
    """Mean number of images of a pedestrian in a camera."""
    image_size: tuple[int, int] = (128, 64)
    """Height and width in pixels."""
    camera_gap: float = 1.0
    """How much cameras differ in colour, contrast, sharpness and viewpoint, from 0 to 1."""
    seed: int = 0
    """The same seed gives the same pictures."""
    junk: int | None = None
    """Boxes that miss most of a person, in the gallery."""
    distractors: int | None = None
    """Other people and empty boxes, in the gallery."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    overwrite: bool = False
    """Replace an earlier output."""
    sheet: Path | None = None
    """Also write a contact sheet, a PNG."""


def synth(given: SynthArguments) -> None:
    """Draw a data set."""
    options = dataclasses.asdict(given)
    out = options.pop("out")
    summary = draw(out, **options)
    print(
        f"{out}: {summary.train_images} images of {summary.train_ids} people to train on, "
        f"{summary.query_images} queries, {summary.gallery_images} in the gallery\n"
        f"train on it: dhcl train --data market1501 --root {out} --backbone small "
        f"--image-size 64 32 --camera-bn"
    )


def demo(given: Demo) -> None:
    """Draw, train and compare."""
    run_demo(given)


def pretrain(given: Pretrain) -> None:
    """Draw pedestrians and learn who they are."""
    learn(given)
