"""From the maps or tokens of a backbone to one row of numbers per image."""

from __future__ import annotations

import torch
from torch import nn

from dhcl.models.backbones import Backbone

__all__ = ["POOLINGS", "Pool", "checked_pooling"]

POOLINGS = ("gem", "gem-halves", "avg", "avg-halves", "token")
"""Generalised mean (Radenovic et al., TPAMI 2019) or average over the map, or over its upper and
lower half by itself (doubling the features), or the class token of a transformer."""


class Pool(nn.Module):
    """(B, C, h, w) to (B, C), or (B, 2 C) where halves are pooled by themselves, upper first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.halves = kind.endswith("-halves")
        self.power: nn.Parameter | None
        power = nn.Parameter(torch.tensor(3.0)) if kind.startswith("gem") else None
        self.register_parameter("power", power)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Pool maps of at least 1 row, of 2 where halves are pooled."""
        middle = maps.shape[2] // 2
        parts = [maps[:, :, :middle], maps[:, :, middle:]] if self.halves else [maps]
        return torch.cat([self._mean(part) for part in parts], 1)

    def _mean(self, maps: torch.Tensor) -> torch.Tensor:
        if self.power is None:
            return maps.mean((2, 3))
        return maps.clamp(min=1e-6).pow(self.power).mean((2, 3)).pow(1 / self.power)


def checked_pooling(pooling: str, parts: Backbone) -> str:
    """The pooling, if the backbone can have it.

    Raises:
        ValueError: an unknown pooling, or one that this backbone can't have.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)} (got {pooling!r})")
    if pooling == "token" and not parts.prefix_tokens:
        raise ValueError(f"pooling: {parts.name} has no class token; use gem or avg (got 'token')")
    if pooling.startswith("gem") and parts.prefix_tokens is not None:
        # GeM clamps at 0, and about half of a normalised token is negative.
        raise ValueError(
            f"pooling: tokens of {parts.name} have either sign, for which a generalised mean is "
            f"not defined; use token or avg (got {pooling!r})"
        )
    return pooling
