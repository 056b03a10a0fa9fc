"""Scenes that people walk through: a wall, a lawn, shops, a fence or a street above the ground."""

from __future__ import annotations

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from dhcl.synth.draw import Image

__all__ = ["SCENES", "paint_scene"]

SCENES = ("bricks", "lawn", "shops", "hall", "fence", "street")
"""Every kind that :func:`paint_scene` takes."""

# Scenes are this many crops wide and high.
_WIDTH, _HEIGHT = 8, 2

Colour = tuple[int, int, int]


def paint_scene(rng: np.random.Generator, kind: str, height: int, width: int) -> Image:
    """Wall or sky above, ground below: (2 * height, 8 * width, 3) linear colours.

    Args:
        rng: what it looks like.
        kind: one of :data:`SCENES`.
        height, width: of a crop, in pixels.
    """
    painter = _Painter(rng, height, width)
    wall, ground = painter.tone(0.35, 0.75), painter.tone(0.35, 0.65)
    if kind == "lawn":
        ground = (int(rng.uniform(50, 90)), int(rng.uniform(95, 140)), int(rng.uniform(35, 70)))
    painter.block(0, 0, painter.columns, painter.horizon, wall)
    painter.block(0, painter.horizon, painter.columns, painter.rows, ground)
    paint = {
        "bricks": painter.bricks,
        "lawn": painter.lawn,
        "shops": painter.shops,
        "hall": painter.shops,
        "fence": painter.fence,
        "street": painter.cars,
    }
    paint[kind]()
    if kind != "lawn":
        painter.paving()
    pixels = (np.asarray(painter.picture, np.float32) / 255) ** np.float32(2.2)
    lit = pixels * _clouds(rng, painter.rows, painter.columns)
    return np.asarray(lit, np.float32).clip(0.0, 1.0)


class _Painter:
    """Draws the parts of a scene; lengths are in units of an eighth of a crop."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.rows, self.columns = _HEIGHT * height, _WIDTH * width
        self.horizon = self.rows // 2
        self.unit = width / 8
        self.picture = PILImage.new("RGB", (self.columns, self.rows))
        self.draw = ImageDraw.Draw(self.picture)

    def tone(self, low: float, high: float, tint: float = 0.12) -> Colour:
        """A colour of a brightness between these."""
        r, g, b = self.rng.uniform(low, high) * np.exp(self.rng.normal(0.0, tint, 3)) * 255
        return int(min(r, 255)), int(min(g, 255)), int(min(b, 255))

    def block(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """A rectangle, also where it would have no width."""
        self.draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill)

    def bricks(self) -> None:
        """A wall of bricks."""
        mortar, unit = self.tone(0.5, 0.8), self.unit
        for row, y in enumerate(np.arange(0, self.horizon, unit)):
            self.draw.line((0, y, self.columns, y), fill=mortar)
            for x in np.arange((row % 2) * unit, self.columns, 2 * unit):
                self.draw.line((x, y, x, y + unit), fill=mortar)

    def lawn(self) -> None:
        """Bushes and trunks."""
        rng, unit = self.rng, self.unit
        for _ in range(40):
            x, y = rng.uniform(0, self.columns), rng.uniform(0, self.horizon)
            r = rng.uniform(2, 6) * unit
            leaves = (int(rng.uniform(20, 70)), int(rng.uniform(60, 110)), int(rng.uniform(15, 50)))
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=leaves)
        for x in np.arange(0, self.columns, 9 * unit):
            self.block(x, 0, x + 1.2 * unit, self.horizon, (70, 50, 35))

    def shops(self) -> None:
        """Fronts with windows and what is in them."""
        rng, unit, horizon = self.rng, self.unit, self.horizon
        x = 0.0
        while x < self.columns:
            span = rng.uniform(5, 12) * unit
            front = self.tone(0.1, 0.9, 0.35)
            self.block(x, horizon * 0.25, x + span - unit, horizon, front)
            pane = self.tone(0.05, 0.35)
            self.block(x + unit, horizon * 0.45, x + span - 2 * unit, horizon * 0.9, pane)
            for _ in range(3):
                left = x + rng.uniform(1, 6) * unit
                thing = self.tone(0.3, 0.9, 0.5)
                self.block(left, horizon * 0.6, left + unit, horizon * 0.85, thing)
            x += span

    def fence(self) -> None:
        """Posts, each of its own grey, and a rail."""
        unit, horizon = self.unit, self.horizon
        for x in np.arange(0, self.columns, 1.6 * unit):
            self.block(x, horizon * 0.4, x + 0.3 * unit, horizon + unit, self.tone(0.1, 0.3))
        rail = self.tone(0.1, 0.3)
        self.block(0, horizon * 0.5, self.columns, horizon * 0.5 + 0.4 * unit, rail)

    def cars(self) -> None:
        """Parked cars."""
        rng, unit, horizon = self.rng, self.unit, self.horizon
        for x in np.arange(rng.uniform(0, 6) * unit, self.columns, rng.uniform(16, 22) * unit):
            paint = self.tone(0.15, 0.8, 0.4)
            body = (x, horizon - 4 * unit, x + 13 * unit, horizon + unit)
            self.draw.rounded_rectangle(body, 2 * unit, fill=paint)
            top, bottom = horizon - 3.5 * unit, horizon - 2 * unit
            self.block(x + 2.5 * unit, top, x + 10 * unit, bottom, (40, 45, 55))
            for wheel in (2.5, 10.5):
                cx = x + wheel * unit
                tyre = (cx - unit, horizon, cx + unit, horizon + 2 * unit)
                self.draw.ellipse(tyre, fill=(25, 25, 25))

    def paving(self) -> None:
        """Paving in perspective: joints come closer towards the wall."""
        joint, unit = self.tone(0.2, 0.4), self.unit
        y, step = float(self.horizon), 0.5 * unit
        while y < self.rows:
            self.draw.line((0, y, self.columns, y), fill=joint)
            y, step = y + step, step * 1.35
        for x in np.arange(-self.columns, 2 * self.columns, 3 * unit):
            away = (x - self.columns / 2) * 0.15
            self.draw.line((x, self.horizon, x + away, self.rows), fill=joint)


def _clouds(rng: np.random.Generator, height: int, width: int) -> Image:
    """Smooth noise around 1 with detail at several scales."""
    total = np.zeros((height, width), np.float32)
    for octave, strength in ((4, 0.10), (16, 0.06), (64, 0.05)):
        coarse = rng.standard_normal((max(2, octave // 4), octave)).astype(np.float32)
        layer = PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC)
        total += strength * np.asarray(layer)
    return 1.0 + total[..., None]
