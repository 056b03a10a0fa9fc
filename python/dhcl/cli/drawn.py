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
from dhcl.words import say, show

__all__ = ["demo", "pretrain", "synth"]


@dataclass(frozen=True)
class SynthArguments:
    """Draw pedestrians in several cameras: a data set in Market-1501's layout."""

    out: tyro.conf.Positional[Path]
    """Folder that is made for the data set."""
    ids: int = 200
    """Number of pedestrians; half of them are for testing."""
    cameras: int = 4
    """Number of cameras, each with its colours, light, background, blur and viewpoint."""
    images_per_camera: int = 4
    """Mean number of images of a pedestrian in a camera."""
    image_size: tuple[int, int] = (128, 64)
    """Height and width of an image in pixels."""
    camera_gap: float = 1.0
    """How much cameras differ in colour, contrast, sharpness and viewpoint, from 0 to 1."""
    seed: int = 0
    """Seed of the drawing; the same one gives the same pictures."""
    junk: int | None = None
    """Number of boxes in the gallery that miss most of a person."""
    distractors: int | None = None
    """Number of boxes in the gallery that are empty or hold other people."""
    workers: int = os.cpu_count() or 1
    """Number of processes that draw."""
    overwrite: bool = False
    """Whether to replace the data set of an earlier call."""
    sheet: Path | None = None
    """File to write a contact sheet of the pictures to, a PNG."""


def synth(given: SynthArguments) -> None:
    """Draw a data set."""
    options = dataclasses.asdict(given)
    out = options.pop("out")
    summary = draw(out, **options)
    say(
        f"{show(out)}: {summary.train_images} images of {summary.train_ids} people to train on, "
        f"{summary.query_images} queries, {summary.gallery_images} in the gallery\n"
        f"train on it: dhcl train --data market1501 --root {show(out)} --backbone small "
        f"--image-size 64 32 --camera-bn"
    )


def demo(given: Demo) -> None:
    """Draw, train and compare."""
    run_demo(given)


def pretrain(given: Pretrain) -> None:
    """Draw pedestrians and learn who they are."""
    learn(given)
