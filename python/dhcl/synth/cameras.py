"""Cameras: what differs between two pictures of one person.

A :class:`Camera` has a scene that people walk through, a light, a place from which it looks, and a
way of turning light into pixels: colour cast, saturation, contrast, gamma, sharpness, noise and
JPEG quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

from dhcl.synth.draw import Image, Point

# Scenes are this many crops wide and high.
_SCENE_WIDTH, _SCENE_HEIGHT = 8, 2
_SCENES = ("bricks", "lawn", "shops", "hall", "fence", "street")
# Where a camera tends to see people from: front, side, back, obliquely, ...
_YAWS = (0.0, math.pi / 2, math.pi, -math.pi / 4, 3 * math.pi / 4, -math.pi / 2)


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera; colours are linear until :meth:`expose`."""

    scene: Image
    """(2 * height, 8 * width, 3), the ground beginning at the middle row."""
    light: Point
    ambient: float
    diffuse: float
    yaw: float
    """What it mostly sees: 0 fronts, pi backs."""
    pitch: float
    mix: NDArray[np.float32]
    """(3, 3) colour matrix, rows are output channels."""
    gamma: float
    contrast: float
    haze: float
    sharpness: float
    """Share of the resolution that is left, in (0, 1]."""
    noise: float
    jpeg_quality: int

    def background(self, rng: np.random.Generator, height: int, width: int) -> Image:
        """A (height, width, 3) piece of the scene, the ground beginning near its middle."""
        left = int(rng.integers(0, self.scene.shape[1] - width + 1))
        top = int(height * rng.uniform(0.42, 0.62))
        piece = self.scene[top : top + height, left : left + width]
        return np.array(piece[:, ::-1] if rng.random() < 0.1 else piece)

    def expose(self, image: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The picture (height, width, 3) this camera takes of linear light."""
        height, width = image.shape[:2]
        # Clouds and automatic exposure: the light is never quite the same.
        gain = math.exp(rng.normal(0.0, 0.16)) * np.exp(rng.normal(0.0, 0.05, 3))
        seen = image @ self.mix.T * gain.astype(np.float32)
        seen = np.clip(seen + self.haze, 0.0, None) ** np.float32(self.gamma / 2.2)
        seen = 0.45 + (seen - 0.45) * self.contrast
        picture = _to_image(seen)
        share = self.sharpness * rng.uniform(0.8, 1.0)
        if share < 0.95:
            small = (max(8, round(width * share)), max(8, round(height * share)))
            picture = picture.resize(small, PILImage.Resampling.BILINEAR)
            picture = picture.resize((width, height), PILImage.Resampling.BICUBIC)
        if rng.random() < 0.15:
            picture = picture.filter(ImageFilter.BoxBlur((rng.uniform(0.5, 1.6), 0.0)))
        pixels = np.asarray(picture, np.float32)
        grain = rng.standard_normal(pixels.shape, np.float32) * np.float32(255 * self.noise)
        taken: NDArray[np.uint8] = np.clip(pixels + grain, 0, 255).astype(np.uint8)
        return taken


def _to_image(pixels: Image) -> PILImage.Image:
    return PILImage.fromarray((np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8))


def _colour_matrix(rng: np.random.Generator) -> NDArray[np.float32]:
    """Colour cast, saturation and a turn of the hues, at about constant brightness."""
    grey = np.full((3, 3), 1 / 3)
    axis = np.ones(3) / math.sqrt(3)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = rng.uniform(-0.25, 0.25)
    rotation = np.eye(3) + math.sin(turn) * cross + (1 - math.cos(turn)) * cross @ cross
    saturation = rng.uniform(0.5, 1.15)
    cast = rng.normal(0.0, 0.28, 3)
    cast = np.exp(cast - cast.mean() + rng.normal(0.0, 0.22))
    mixed = np.diag(cast) @ (grey + saturation * (np.eye(3) - grey)) @ rotation
    return np.asarray(mixed, np.float32)


@lru_cache(maxsize=128)
def make_camera(seed: int, number: int, height: int, width: int, gap: float = 1.0) -> Camera:
    """Camera ``number`` (from 1) of the data set with this seed, for crops of this size.

    ``gap`` is how far it lies from a neutral camera that sees fronts; scenes and light differ
    whatever it is.
    """
    rng = np.random.default_rng([seed, 2, number])
    away = rng.uniform(0.0, 2 * math.pi)
    light = np.array([math.cos(away), rng.uniform(0.4, 1.0), 0.7 + 0.5 * math.sin(away)])
    light /= np.linalg.norm(light)
    ambient = rng.uniform(0.35, 0.8)

    def apart(value: float, neutral: float = 1.0) -> float:
        return float(neutral + gap * (value - neutral))

    return Camera(
        scene=_scene(rng, _SCENES[(number + seed) % len(_SCENES)], height, width),
        light=(float(light[0]), float(light[1]), float(light[2])),
        ambient=float(ambient),
        diffuse=float(1.1 - ambient),
        yaw=apart(_YAWS[(number - 1) % len(_YAWS)] + rng.normal(0.0, 0.25), 0.0),
        pitch=float(rng.uniform(0.03, 0.42)),
        mix=np.asarray(np.eye(3) + gap * (_colour_matrix(rng) - np.eye(3)), np.float32),
        gamma=apart(rng.uniform(0.8, 1.35)),
        contrast=apart(rng.uniform(0.75, 1.15)),
        haze=apart(rng.uniform(0.0, 0.06), 0.0),
        sharpness=apart(rng.uniform(0.5, 1.0)),
        noise=float(rng.uniform(0.008, 0.035)),
        jpeg_quality=int(rng.integers(70, 96)),
    )


# ---- scenes -------------------------------------------------------------------------------------


def _clouds(rng: np.random.Generator, height: int, width: int) -> Image:
    """Smooth noise around 1 with detail at several scales."""
    total = np.zeros((height, width), np.float32)
    for octave, strength in ((4, 0.10), (16, 0.06), (64, 0.05)):
        coarse = rng.standard_normal((max(2, octave // 4), octave)).astype(np.float32)
        layer = PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC)
        total += strength * np.asarray(layer)
    return 1.0 + total[..., None]


def _scene(rng: np.random.Generator, kind: str, height: int, width: int) -> Image:
    """Wall or sky above, ground below, linear colours."""
    rows, columns = _SCENE_HEIGHT * height, _SCENE_WIDTH * width
    horizon = rows // 2
    picture = PILImage.new("RGB", (columns, rows))
    draw = ImageDraw.Draw(picture)

    def tone(low: float, high: float, tint: float = 0.12) -> tuple[int, int, int]:
        r, g, b = rng.uniform(low, high) * np.exp(rng.normal(0.0, tint, 3)) * 255
        return int(min(r, 255)), int(min(g, 255)), int(min(b, 255))

    def block(left: float, top: float, right: float, bottom: float, fill: object) -> None:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill)  # type: ignore[arg-type]

    wall, ground = tone(0.35, 0.75), tone(0.35, 0.65)
    if kind == "lawn":
        ground = (int(rng.uniform(50, 90)), int(rng.uniform(95, 140)), int(rng.uniform(35, 70)))
    block(0, 0, columns, horizon, wall)
    block(0, horizon, columns, rows, ground)
    unit = width / 8
    if kind == "bricks":
        mortar = tone(0.5, 0.8)
        for row, y in enumerate(np.arange(0, horizon, unit)):
            draw.line((0, y, columns, y), fill=mortar)
            for x in np.arange((row % 2) * unit, columns, 2 * unit):
                draw.line((x, y, x, y + unit), fill=mortar)
    elif kind == "lawn":
        for _ in range(40):
            x, y, r = rng.uniform(0, columns), rng.uniform(0, horizon), rng.uniform(2, 6) * unit
            leaves = (int(rng.uniform(20, 70)), int(rng.uniform(60, 110)), int(rng.uniform(15, 50)))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=leaves)
        for x in np.arange(0, columns, 9 * unit):
            block(x, 0, x + 1.2 * unit, horizon, (70, 50, 35))
    elif kind in ("shops", "hall"):
        x = 0.0
        while x < columns:
            span = rng.uniform(5, 12) * unit
            block(x, horizon * 0.25, x + span - unit, horizon, tone(0.1, 0.9, 0.35))
            block(x + unit, horizon * 0.45, x + span - 2 * unit, horizon * 0.9, tone(0.05, 0.35))
            for _ in range(3):
                left = x + rng.uniform(1, 6) * unit
                block(left, horizon * 0.6, left + unit, horizon * 0.85, tone(0.3, 0.9, 0.5))
            x += span
    elif kind == "fence":
        for x in np.arange(0, columns, 1.6 * unit):
            block(x, horizon * 0.4, x + 0.3 * unit, horizon + unit, tone(0.1, 0.3))
        block(0, horizon * 0.5, columns, horizon * 0.5 + 0.4 * unit, tone(0.1, 0.3))
    else:
        for x in np.arange(rng.uniform(0, 6) * unit, columns, rng.uniform(16, 22) * unit):
            paint = tone(0.15, 0.8, 0.4)
            draw.rounded_rectangle(
                (x, horizon - 4 * unit, x + 13 * unit, horizon + unit), 2 * unit, fill=paint
            )
            block(
                x + 2.5 * unit,
                horizon - 3.5 * unit,
                x + 10 * unit,
                horizon - 2 * unit,
                (40, 45, 55),
            )
            for wheel in (2.5, 10.5):
                cx = x + wheel * unit
                draw.ellipse((cx - unit, horizon, cx + unit, horizon + 2 * unit), fill=(25, 25, 25))
    if kind != "lawn":
        # Paving in perspective: joints come closer towards the wall.
        joint = tone(0.2, 0.4)
        y, step = float(horizon), 0.5 * unit
        while y < rows:
            draw.line((0, y, columns, y), fill=joint)
            y, step = y + step, step * 1.35
        for x in np.arange(-columns, 2 * columns, 3 * unit):
            away = (x - columns / 2) * 0.15
            draw.line((x, horizon, x + away, rows), fill=joint)
    pixels = (np.asarray(picture, np.float32) / 255) ** np.float32(2.2)
    return np.asarray(pixels * _clouds(rng, rows, columns), np.float32).clip(0.0, 1.0)
