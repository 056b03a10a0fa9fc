"""Checkpoints that are whole or not there, and the state of random generators."""

from __future__ import annotations

import errno
import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhcl.errors import CheckpointError
from dhcl.files import write_atomic

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "random_state",
    "save_checkpoint",
    "set_random_state",
]


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values.

    It is serialised in memory first: a full disk then is a plain ``OSError``.

    Raises:
        CheckpointError: it could not be written; an earlier checkpoint is as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getbuffer())
    except OSError as error:
        size = f"{len(buffer.getbuffer()) / 2**20:.1f} MiB"
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        kept = "the one before is whole" if path.exists() else "there is none before it"
        raise CheckpointError(f"checkpoint: {path} of {size} not written, {why}; {kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU. Code in the file is not run.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint: there is none at {path}") from error
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(f"checkpoint: {path} can't be read ({error})") from error
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
