"""Long work in ranges of rows, so that a caller sees how far it is and can stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], object]

# Rows per call of a stage: short enough to stop for Ctrl-C, long enough to cost nothing.
ROWS = 16384


def slices(
    rows: int, stage: str, progress: Progress | None, size: int = ROWS
) -> Iterator[tuple[int, int]]:
    """Ranges of rows; progress is called as ``progress(stage, rows_done, rows)`` after each."""
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield begin, end
        if progress is not None:
            progress(stage, end, rows)
