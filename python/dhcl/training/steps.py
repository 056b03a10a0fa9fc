"""What training steps were worth, kept on the device until someone looks: looking waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["StepValues"]


class StepValues:
    """Values of the steps since the last look.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._zero = torch.zeros((), device=device)
        self._iterations: list[int] = []
        self._rows: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, iteration: int, values: Sequence[torch.Tensor | None]) -> None:
        """Keep copies of a step's values, () floating each; None counts as 0."""
        numbers = [self._zero if value is None else value.detach() for value in values]
        self._iterations.append(iteration)
        self._rows.append(torch.stack(numbers).float())

    def take(self) -> tuple[list[int], torch.Tensor]:
        """Iterations, and their values (steps, values) float32, still on the device; forgets them.

        There must be some.
        """
        taken = self._iterations, torch.stack(self._rows)
        self._iterations, self._rows = [], []
        return taken
