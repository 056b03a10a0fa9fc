"""Checkpoints that are whole or not there: their progress, and the state of random generators."""

from __future__ import annotations

import errno
import io
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhcl.errors import CheckpointError
from dhcl.files import write_atomic
from dhcl.torch_files import load_plain
from dhcl.words import first_line, show

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Progress",
    "how_to_go_on",
    "load_checkpoint",
    "random_state",
    "save_checkpoint",
    "set_random_state",
]


FORMAT = 2
"""Of the checkpoints that are written."""


@dataclass
class Progress:
    """Where a run is, in plain values.

    Attributes:
        epoch: the epoch under way, from 0.
        iteration: steps of it that are done.
        clustered: whether its images have their labels and the memory is filled with them.
        dropped: whether its outliers are left out.
        threshold: of the self-paced criterion, set once.
        barren: epochs on end without a cluster.
        totals: sums over the epoch's steps, of what the log says the average of.
        entry: what the log will say of this epoch; the training does not look at it.
        best: metrics of the model that looked best along the way, and its epoch.
        seconds: of all epochs before this one.
    """

    epoch: int = 0
    iteration: int = 0
    clustered: bool = False
    dropped: bool = False
    threshold: float | None = None
    barren: int = 0
    totals: list[float] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.iteration = self.epoch + 1, 0
        self.clustered, self.dropped, self.entry = False, False, {}

    @classmethod
    def of(cls, state: Mapping[str, Any], path: Path) -> Progress:
        """That of a checkpoint, which was read from this file.

        Raises:
            CheckpointError: its format is not known.
        """
        values = dict(state["progress"])
        if state["format"] == 1:  # which had no fields for what the entry says
            values["clustered"] = bool(values["entry"])
            values["dropped"] = values["entry"].get("dropped", False)
        elif state["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint: {show(path)} is of another version of dhcl, in format "
                f"{state['format']} (known: 1 and {FORMAT})"
            )
        return cls(**values)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values.

    It is serialised in memory first: a full disk then is a plain ``OSError``.

    Raises:
        CheckpointError: it could not be written; an earlier checkpoint is as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        write_atomic(path, buffer.getbuffer())
    except OSError as error:
        size = f"{len(buffer.getbuffer()) / 2**20:.1f} MiB"
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        kept = "the one before is whole" if path.exists() else "there is none before it"
        raise CheckpointError(
            f"checkpoint: {show(path)} of {size} not written, {why}; {kept}"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU. Code in the file is not run.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    try:
        state: dict[str, Any] = load_plain(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint: there is none at {show(path)}") from error
    except Exception as error:  # damaged files raise nearly anything
        why = first_line(error)
        raise CheckpointError(f"checkpoint: {show(path)} can't be read ({why})") from error
    return state


def random_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy, torch and CUDA, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def how_to_go_on(run: Path) -> str:
    """The command by which a run that ended early goes on, for whoever reads why it ended."""
    there = (run / "checkpoints" / "last.pt").exists()
    what = "go on from the last checkpoint" if there else "no checkpoint yet; start again"
    world = os.environ.get("WORLD_SIZE", "1")
    launcher = "dhcl"
    if world != "1":
        launcher = f"torchrun --nproc-per-node {world} -m dhcl"
        if os.environ.get("LOCAL_WORLD_SIZE", world) != world:
            what, launcher = f"{what}, all {world} processes started as before,", "-m dhcl"
    return f"{what} with: {launcher} train --resume {show(run)}"
