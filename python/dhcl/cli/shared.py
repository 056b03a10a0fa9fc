"""What several commands share: options about images, lines about what was left out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dhcl.errors import ConfigError
from dhcl.words import first_ones, say, show

if TYPE_CHECKING:
    import torch

    from dhcl.inference.reid import ReID

__all__ = [
    "Reading",
    "Which",
    "check_cameras",
    "extracted",
    "hint_cameras",
    "op_progress",
    "options_checked",
    "print_left_out",
    "print_other_kinds",
]

Which = Literal["last", "best"]


@dataclass(frozen=True)
class Reading:
    """How images are read and features extracted."""

    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do if image files can't be read: refuse to go on, or skip them."""
    batch_size: int = 128
    """Number of images that the network takes at a time."""
    workers: int = min(4, os.cpu_count() or 1)
    """Number of processes that load images; 0 is the main one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Processor that the network runs on: auto takes a GPU where there is one."""

    def options(self) -> dict[str, Any]:
        """Of :meth:`dhcl.ReID.batches`."""
        return {
            "on_bad": self.on_bad,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "progress": True,
        }


@contextmanager
def options_checked() -> Iterator[None]:
    """What the ops refuse comes from the command line."""
    try:
        yield
    except (TypeError, ValueError, MemoryError) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def op_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress line for the ops, if someone looks at it: takes (stage, done, total)."""
    from tqdm import tqdm

    with tqdm(leave=False, disable=None) as bar:

        def show_stage(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield show_stage


def print_left_out(lines: Sequence[str]) -> None:
    """Name the images that were left out, to stderr."""
    if lines:
        head = f"left out, {len(lines):,} images that can't be read:"
        say("\n  ".join(map(show, [head, *first_ones(lines)])), sys.stderr)


def print_other_kinds(places: Sequence[Path]) -> None:
    """Count the files of folders that are of no kind that is read, to stderr."""
    from dhcl.data.folders import look_below, other_kinds

    for place in places:
        if place.is_dir():
            for line in other_kinds(look_below(place)[1]):
                say(f"{show(place)}: {line}", sys.stderr)


def check_cameras(pattern: str | None, trained_cameras: bool) -> None:
    """Refuse to take statistics of cameras that no pattern tells apart."""
    if trained_cameras and "(?P<camera>" not in (pattern or ""):
        raise ConfigError(
            "trained_cameras: --pattern must say where the camera stands, in a group named camera "
            f"(got {pattern!r})"
        )


def hint_cameras(model: ReID, pattern: str | None, trained_cameras: bool) -> None:
    """Say that the model has statistics of cameras which are not used."""
    if model.num_cameras and not trained_cameras:
        what = (
            "--trained-cameras uses the statistics"
            if pattern
            else "--pattern and --trained-cameras use the statistics"
        )
        say(
            f"hint: the model has statistics of {model.num_cameras} cameras; if the images are of "
            f"these, {what} of each"
        )


def extracted(
    model: ReID, paths: Sequence[Path], cameras: list[int] | None, reading: Reading
) -> tuple[torch.Tensor, list[int]]:
    """Features (n, d), and which n of the files they are of; the others are named, to stderr."""
    import torch

    bad: list[tuple[int, str]] = []
    with options_checked():
        batches = list(model.batches(paths, cameras, bad=bad, **reading.options()))
    print_left_out([f"{show(paths[i])}: {reason}" for i, reason in bad])
    return torch.cat([b.features for b in batches]), [i for b in batches for i in b.indices]
