"""One crop of a person as a camera sees them, cut as a detector would."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from dhcl.synth.appearance import Appearance, sample_appearance
from dhcl.synth.cameras import Camera, make_camera
from dhcl.synth.draw import SUPERSAMPLING, Canvas, Image, View, body, random_pose

__all__ = ["STRANGERS", "render_crop"]

STRANGERS = 1_000_000
"""Identities from here on are of strangers, distractors and passers-by, beyond the data set's."""


def _view(
    rng: np.random.Generator, camera: Camera, a: Appearance, height: int, width: int, box: str
) -> View:
    """Where the person stands in the crop, as a detector would cut it."""
    share = rng.uniform(0.80, 0.95)
    x, y = 0.5 + rng.normal(0.0, 0.045), 0.5 + share / 2 + rng.normal(0.0, 0.02)
    if box == "cut":
        # Too close, as where someone leaves the picture or stands behind something.
        share *= rng.uniform(1.15, 1.5)
        y, x = share * rng.uniform(0.97, 1.05) + 0.03, x + rng.uniform(-0.12, 0.12)
    elif box == "junk":
        share *= rng.choice([0.5, 1.9])
        x, y = x + rng.choice([-0.4, 0.4]), y + rng.uniform(-0.3, 0.6)
    # People walk both ways, most of them one way.
    turn = camera.yaw + (math.pi if rng.random() < 0.2 else 0.0) + rng.normal(0.0, 0.45)
    tallness = a.height * math.cos(camera.pitch) + 0.2 * math.sin(camera.pitch)
    return View(
        yaw=float(turn),
        pitch=camera.pitch,
        scale=float(share * height / tallness),
        feet=(float(x * width), float(y * height)),
        light=camera.light,
        ambient=camera.ambient,
        diffuse=camera.diffuse,
    )


def _over(image: Image, canvas: Canvas) -> Image:
    colour, cover = canvas.finish()
    return colour + image * (1.0 - cover)


def _shadow(image: Image, view: View) -> None:
    """Darken the ground around the feet, on the side away from the light."""
    height, width = image.shape[:2]
    reach = 0.35 * view.scale
    x, y = view.feet[0] - view.light[0] * reach, view.feet[1] - 0.02 * view.scale
    gy, gx = np.ogrid[:height, :width]
    square = ((gx - x) / (1.3 * reach)) ** 2 + ((gy - y) / (0.35 * reach)) ** 2
    image *= (1.0 - 0.5 * view.diffuse * np.exp(-1.5 * square))[..., None].astype(np.float32)


def _thing(rng: np.random.Generator, image: Image, light: float) -> Image:
    """Something between camera and person: a pole, a box, or a bicycle."""
    height, width = image.shape[:2]
    s = SUPERSAMPLING
    mask = PILImage.new("L", (width * s, height * s))
    draw = ImageDraw.Draw(mask)
    kind = rng.choice(["pole", "box", "bicycle"])
    if kind == "pole":
        left = rng.uniform(0.1, 0.8) * width * s
        draw.rectangle((left, 0, left + rng.uniform(0.06, 0.16) * width * s, height * s), fill=255)
    elif kind == "box":
        top, left = rng.uniform(0.62, 0.85) * height * s, rng.uniform(-0.4, 0.5) * width * s
        right = left + rng.uniform(0.5, 1.0) * width * s
        draw.rectangle((left, top, right, height * s), fill=255)
    else:
        r, y = 0.26 * width * s, 0.84 * height * s
        x = rng.uniform(0.1, 0.6) * width * s
        hub, front = (x, y), (x + 2.4 * r, y)
        seat, bar = (x + 0.7 * r, y - 1.3 * r), (x + 2.1 * r, y - 1.5 * r)
        for cx, cy in (hub, front):
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), outline=255, width=s)
        draw.line((*hub, *seat, *bar, *front), fill=255, width=s)
        draw.line((*seat, x + 1.2 * r, y, *bar), fill=255, width=s)
    cover = np.asarray(mask.resize((width, height), PILImage.Resampling.BOX), np.float32) / 255
    paint = rng.uniform(0.03, 0.5) * np.exp(rng.normal(0.0, 0.25, 3)) * light
    return image + cover[..., None] * (paint.astype(np.float32) - image)


def _stranger(seed: int, number: int) -> Appearance:
    return sample_appearance(np.random.default_rng([seed, 1, STRANGERS + number]))


def render_crop(
    seed: int,
    identity: int,
    camera: int,
    image: int,
    size: tuple[int, int],
    kind: str = "person",
    camera_gap: float = 1.0,
) -> PILImage.Image:
    """One crop; a function of its arguments alone.

    Args:
        seed: of the data set.
        identity: >= 0.
        camera: from 1.
        image: number of this image among those of the identity in this camera.
        size: (height, width) in pixels.
        kind: ``person``; ``junk`` for a box that misses most of the person; ``scene`` for a
            detection where nobody is.
        camera_gap: how much cameras differ, see :func:`dhcl.synth.render_dataset`.
    """
    height, width = size
    rng = np.random.default_rng([seed, 3, identity, camera, image])
    view_of = make_camera(seed, camera, height, width, camera_gap)
    picture = view_of.background(rng, height, width)
    light = view_of.ambient + view_of.diffuse
    if kind != "scene":
        a = sample_appearance(np.random.default_rng([seed, 1, identity]))
        box = kind if kind == "junk" else ("cut" if rng.random() < 0.12 else "whole")
        view = _view(rng, view_of, a, height, width, box)
        if rng.random() < 0.06:
            # Someone behind, at the edge of the crop.
            other = _stranger(seed, int(rng.integers(500)))
            picture = _passer_by(rng, picture, view, other, view.scale * 0.85)
        _shadow(picture, view)
        canvas = Canvas(height, width)
        canvas.draw(body(a, random_pose(rng, a)), view)
        picture = _over(picture, canvas)
        chance = rng.random()
        if chance < 0.04:
            other = _stranger(seed, int(rng.integers(500)))
            picture = _passer_by(rng, picture, view, other, view.scale * 1.1)
        elif chance < 0.14:
            picture = _thing(rng, picture, light)
    elif rng.random() < 0.5:
        picture = _thing(rng, picture, light)
    return PILImage.fromarray(view_of.expose(picture, rng))


def _passer_by(
    rng: np.random.Generator, image: Image, view: View, other: Appearance, scale: float
) -> Image:
    height, width = image.shape[:2]
    canvas = Canvas(height, width)
    x = view.feet[0] + rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.6) * width
    there = View(
        yaw=float(view.yaw + rng.normal(0.0, 1.0)),
        pitch=view.pitch,
        scale=scale,
        feet=(float(x), view.feet[1] + (scale - view.scale) * 0.4),
        light=view.light,
        ambient=view.ambient,
        diffuse=view.diffuse,
    )
    canvas.draw(body(other, random_pose(rng, other)), there)
    return _over(image, canvas)
