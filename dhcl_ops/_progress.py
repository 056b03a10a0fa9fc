"""Long work in ranges of rows, so that a caller sees how far it is and can stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Progress = Callable[[str, int, int], object]

# Rows per call of a stage: short enough to stop for Ctrl-C, long enough to cost nothing.
ROWS = 16384
# On CUDA a range costs a wait for the device, and its rows less.
_CUDA_ROWS = 65536


def rows_at_once(device: torch.device) -> int:
    """Rows per call of a stage that makes rows of lists, on this device."""
    return _CUDA_ROWS if device.type == "cuda" else ROWS


def slices(
    rows: int, stage: str, progress: Progress | None, size: int = ROWS
) -> Iterator[tuple[int, int]]:
    """Ranges of rows; progress is called as ``progress(stage, rows_done, rows)`` after each."""
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield begin, end
        if progress is not None:
            progress(stage, end, rows)
