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
from PIL import ImageFilter

from dhcl.synth.draw import Image, Point
from dhcl.synth.scenes import SCENES, paint_scene

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
        scene=paint_scene(rng, SCENES[(number + seed) % len(SCENES)], height, width),
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
