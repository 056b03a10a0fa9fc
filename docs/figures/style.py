"""The look of the figures: readable on white and on black."""

from __future__ import annotations

from typing import Any

INK = "#7d8590"
COLOURS = ("#e5484d", "#d99000", "#3b82f6", "#2f9e6b")


def apply(name: str) -> None:
    """Set matplotlib up; ``name`` makes the ids in an SVG the same each time."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": name,
            "font.family": "sans-serif",
            "font.size": 11,
            **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
            "axes.edgecolor": INK,
        }
    )


def frame(axes: Any) -> None:
    """A faint grid, no box, no background."""
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
