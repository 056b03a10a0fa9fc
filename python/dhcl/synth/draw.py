"""Drawing a pedestrian: a walking body of tubes, ray-cast into a z-buffer.

Every body part is a tube around a straight axis with an elliptical cross-section and a texture
wrapped around it. Seen from any side, a pixel of the tube is a closed formula: how far along the
axis, how far across, and from that the depth, the normal and the column of the texture. So one
short routine draws heads, sleeves, skirts and bags, with their occlusions and shading, from all
viewpoints.

Coordinates of the body, in metres: x to a side, y up from the ground, z to the person's front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dhcl.synth.appearance import Appearance, Colour, Texture, Wardrobe, plain, wardrobe

Image = NDArray[np.float32]
Point = tuple[float, float, float]

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Tube:
    """A body part from ``start`` to ``end`` (its upper end first).

    ``profile``: (position along the axis in [0, 1], half-width in metres). ``flatness``: thickness
    from front to back over width. Ends are rounded; ``foot`` is the depth of the lower rounding
    as a share of its half-width.
    """

    start: Point
    end: Point
    profile: tuple[tuple[float, float], ...]
    texture: Texture
    flatness: float = 1.0
    foot: float = 1.0


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image; angles in radians."""

    phase: float
    swing: float
    arms: str
    lean: float = 0.0


@dataclass(frozen=True)
class View:
    """From where, how large and in which light a person is seen.

    ``yaw``: 0 sees the front, pi the back. ``pitch``: how far the camera looks down. ``scale``:
    pixels of the finished image per metre. ``feet``: (x, y) of the point between the feet.
    ``light``: direction to the light (right, up, towards the camera), of length 1.
    """

    yaw: float
    pitch: float
    scale: float
    feet: tuple[float, float]
    light: Point
    ambient: float
    diffuse: float


# ---- the body -----------------------------------------------------------------------------------


def _limb(start: Point, length: float, forward: float, sideways: float = 0.0) -> Point:
    """The end of a limb that hangs down and is turned by these angles."""
    x, y, z = start
    down = length * math.cos(forward)
    return (
        x + down * math.sin(sideways),
        y - down * math.cos(sideways),
        z + length * math.sin(forward),
    )


def body(a: Appearance, pose: Pose) -> list[Tube]:
    """The tubes of this person in this pose, feet at y = 0."""
    clothes = wardrobe(a)
    h, b = a.height, a.height * a.build
    legs, lowest = _legs(a, pose, clothes)
    thick = 1.25 if a.upper in ("open jacket", "coat") else 1.0
    shoulder = 0.104 * b * (0.9 + 0.1 * thick)
    waist = 0.088 * b * thick
    neck = (0.0, 0.84 * h, 0.02 * h + pose.lean * h)
    trunk = _trunk(a, clothes, neck, shoulder, waist)
    arms, hands = _arms(a, pose, clothes, neck, shoulder, thick)
    head = _head(a, (0.0, neck[1], neck[2]), clothes.neck, clothes.head)
    bag = _bag(a, hands[a.bag_side], waist, neck[2])
    return [_raised(tube, -lowest) for tube in (*legs, *trunk, *arms, *head, *bag)]


def _legs(a: Appearance, pose: Pose, clothes: Wardrobe) -> tuple[list[Tube], float]:
    """Both legs, and the height of the lower sole."""
    h, b = a.height, a.height * a.build
    wide_legs = 1.0 if a.lower == "trousers" and a.upper != "dress" else 0.85
    tubes: list[Tube] = []
    hips = 0.52 * h
    swing = pose.swing * (1.0 if clothes.skirt is None else 0.55)
    lowest = h
    for side in (-1, 1):
        angle = swing * math.sin(pose.phase) * side
        bend = swing * (0.25 + max(0.0, math.cos(pose.phase) * side)) * 1.1
        hip = (side * 0.047 * b, hips, 0.0)
        knee = _limb(hip, 0.245 * h, angle)
        ankle = _limb(knee, 0.235 * h, angle - bend)
        toe = (ankle[0] + side * 0.015 * h, ankle[1] - 0.012 * h, ankle[2] + 0.085 * h)
        r = 0.047 * b * (0.7 + 0.3 * wide_legs)
        flare = 0.030 * b * wide_legs
        tubes += [
            Tube(hip, knee, ((0, r * 1.1), (1, 0.036 * b)), clothes.thigh),
            Tube(knee, ankle, ((0, 0.036 * b), (0.3, 0.036 * b), (1, flare)), clothes.shin),
            Tube(ankle, toe, ((0, 0.022 * h), (1, 0.021 * h)), plain(a.shoes)),
        ]
        lowest = min(lowest, toe[1] - 0.021 * h)
    return tubes, lowest


def _trunk(
    a: Appearance, clothes: Wardrobe, neck: Point, shoulder: float, waist: float
) -> list[Tube]:
    """Chest and belly, and a skirt if there is one."""
    h = a.height
    crotch = (0.0, 0.49 * h, 0.0)
    profile = (
        (0.0, 0.036 * h),
        (0.05, 0.62 * shoulder),
        (0.10, 0.92 * shoulder),
        (0.16, shoulder),
        (0.35, 0.98 * shoulder),
        (0.68, waist),
        (0.88, 1.04 * waist),
        (1.0, 0.9 * waist),
    )
    tubes = [Tube(neck, crotch, profile, clothes.torso, 0.62 * max(1.0, a.build), 0.3)]
    if clothes.skirt is not None:
        top = (0.0, 0.60 * h, 0.0)
        length = 0.17 + 0.20 * a.hem
        width = waist * (1.1 if a.upper == "coat" else 1.35)
        hem = (0.0, (0.60 - length) * h, 0.0)
        fall = ((0.0, waist), (0.3, width), (1.0, 1.2 * width))
        tubes.append(Tube(top, hem, fall, clothes.skirt, 0.8, 0.15))
    return tubes


def _arms(
    a: Appearance, pose: Pose, clothes: Wardrobe, neck: Point, shoulder: float, thick: float
) -> tuple[list[Tube], dict[int, Point]]:
    """Both arms, and where the hands are by side."""
    h, b = a.height, a.height * a.build
    tubes: list[Tube] = []
    hands: dict[int, Point] = {}
    for side in (-1, 1):
        root = (side * (shoulder + 0.004 * h), 0.795 * h, neck[2] * 0.8)
        angle = -0.75 * pose.swing * math.sin(pose.phase) * side
        bend = 0.35
        if pose.arms == "phone" and side == 1:
            angle, bend = 0.35, 1.9
        elif pose.arms == "pockets":
            angle, bend = -0.25, 0.7
        elif pose.arms == "carry" and side == a.bag_side:
            angle, bend = 0.1, 0.15
        elbow = _limb(root, 0.165 * h, angle, 0.12 * side)
        wrist = _limb(elbow, 0.14 * h, angle + bend)
        r = 0.029 * b * thick
        tubes += [
            Tube(root, elbow, ((0, r * 1.1), (1, r * 0.9)), clothes.upper_arm),
            Tube(elbow, wrist, ((0, r * 0.9), (1, r * 0.68)), clothes.forearm),
        ]
        hand = _limb(wrist, 0.035 * h, angle + bend)
        tubes.append(Tube(wrist, hand, ((0, 0.019 * h), (1, 0.021 * h)), plain(a.skin)))
        hands[side] = hand
    return tubes, hands


def _raised(tube: Tube, by: float) -> Tube:
    (x0, y0, z0), (x1, y1, z1) = tube.start, tube.end
    return replace(tube, start=(x0, y0 + by, z0), end=(x1, y1 + by, z1))


def _head(a: Appearance, neck: Point, skin: Texture, face: Texture) -> list[Tube]:
    h, z = a.height, neck[2] + 0.008 * a.height
    crown, chin = (0.0, 0.962 * h, z), (0.0, 0.893 * h, z + 0.006 * h)
    r = 0.050 * h
    tubes = [
        Tube((0.0, 0.90 * h, z), neck, ((0, 0.03 * h), (1, 0.034 * h)), skin),
        Tube(crown, chin, ((0, r), (0.5, r * 1.04), (1, 0.034 * h)), face, 1.18),
    ]
    hair = plain(a.hair_colour)
    if a.hair == "long":
        fall = (0.0, (0.80 - 0.06 * a.hem) * h, z - 0.055 * h)
        top = (0.0, 0.955 * h, z - 0.018 * h)
        tubes.append(Tube(top, fall, ((0, r), (0.6, 1.1 * r), (1, 0.9 * r)), hair, 0.6))
    elif a.hair == "ponytail":
        tail = (0.0, 0.85 * h, z - 0.085 * h)
        top = (0.0, 0.96 * h, z - 0.055 * h)
        tubes.append(Tube(top, tail, ((0, 0.017 * h), (0.5, 0.02 * h), (1, 0.01 * h)), hair))
    elif a.hair == "bun":
        top = (0.0, 1.02 * h, z - 0.025 * h)
        tubes.append(Tube(top, (0.0, 1.015 * h, z - 0.03 * h), ((0, 0.023 * h),), hair))
    elif a.hair == "cap":
        brim = (0.0, 0.955 * h, z + 0.085 * h)
        top = (0.0, 0.965 * h, z + 0.03 * h)
        tubes.append(Tube(top, brim, ((0, 0.012 * h), (1, 0.010 * h)), plain(a.second_colour), 3.0))
    elif a.hair == "hood":
        top = (0.0, 0.955 * h, z - 0.02 * h)
        tubes.append(
            Tube(top, (0.0, 0.86 * h, z - 0.03 * h), ((0, r), (1, 1.2 * r)), plain(a.upper_colour))
        )
    return tubes


def _bag(a: Appearance, hand: Point, waist: float, lean: float) -> list[Tube]:
    h, colour = a.height, a.bag_colour
    if a.bag == "none":
        return []
    sheet = np.tile(plain(colour), (8, 16, 1))
    # A lid or pocket, so that a bag has something to recognise.
    sheet[3] *= 0.45
    sheet[4:, ::4] *= 0.7
    if a.bag == "backpack":
        back = -0.105 * h * a.build + lean
        size = (0.055 + 0.02 * a.hem) * h
        return [
            Tube(
                (0.0, 0.775 * h, back),
                (0.0, 0.615 * h, back - 0.01 * h),
                ((0, 0.9 * size), (0.6, 1.15 * size), (1, size)),
                sheet,
                0.75,
            )
        ]
    if a.bag == "shoulder bag":
        x = a.bag_side * (waist + 0.035 * h)
        return [
            Tube(
                (x, 0.545 * h, 0.0),
                (x, 0.465 * h, 0.0),
                ((0, 0.024 * h), (1, 0.028 * h)),
                sheet,
                2.8,
            )
        ]
    x, y, z = hand
    return [
        Tube(
            (x, y + 0.01 * h, z),
            (x, y - 0.05 * h, z),
            ((0, 0.006 * h), (1, 0.008 * h)),
            plain(colour),
        ),
        Tube(
            (x, y - 0.06 * h, z),
            (x, y - 0.135 * h, z),
            ((0, 0.018 * h), (1, 0.026 * h)),
            sheet,
            2.4,
        ),
    ]


# ---- the ray-caster -----------------------------------------------------------------------------

_CAP = tuple((math.cos(q), math.sin(q)) for q in np.linspace(0.0, math.pi / 2, 5)[:-1])


class Canvas:
    """Colours (height, width, 3), coverage and depth of what has been drawn, supersampled."""

    def __init__(self, height: int, width: int) -> None:
        shape = (height * SUPERSAMPLING, width * SUPERSAMPLING)
        self.colour = np.zeros((*shape, 3), np.float32)
        self.depth = np.full(shape, -np.inf, np.float32)

    def finish(self) -> tuple[Image, Image]:
        """Colours multiplied by coverage (height, width, 3), and coverage (height, width, 1)."""
        s = SUPERSAMPLING
        rows, columns = self.depth.shape
        cover = np.isfinite(self.depth).astype(np.float32)[..., None]
        both = np.concatenate((self.colour, cover), axis=2)
        both = both.reshape(rows // s, s, columns // s, s, 4).mean(axis=(1, 3))
        return both[..., :3], both[..., 3:]

    def draw(self, tubes: list[Tube], view: View) -> None:
        """Draw these body parts; the nearest surface stays."""
        for tube in tubes:
            self._tube(tube, view)

    def _project(self, point: Point, view: View) -> tuple[float, float, float]:
        x, y, z = point
        towards = z * math.cos(view.yaw) - x * math.sin(view.yaw)
        k = view.scale * SUPERSAMPLING
        across = x * math.cos(view.yaw) + z * math.sin(view.yaw)
        up = y * math.cos(view.pitch) - towards * math.sin(view.pitch)
        depth = y * math.sin(view.pitch) + towards * math.cos(view.pitch)
        # Seen from above, the head is nearer and larger than the feet.
        near = 1.0 + 0.12 * math.sin(view.pitch) * (y - 0.9)
        return (
            view.feet[0] * SUPERSAMPLING + k * across * near,
            view.feet[1] * SUPERSAMPLING - k * up,
            k * depth,
        )

    def _tube(self, tube: Tube, view: View) -> None:
        x0, y0, d0 = self._project(tube.start, view)
        x1, y1, d1 = self._project(tube.end, view)
        length = math.hypot(x1 - x0, y1 - y0)
        ex, ey = ((x1 - x0) / length, (y1 - y0) / length) if length > 1e-3 else (0.0, 1.0)
        length = max(length, 1e-3)

        # The silhouette of the ellipse with half-axes 1 and flatness, turned by the yaw.
        c, s = math.cos(view.yaw), math.sin(view.yaw) * tube.flatness
        wide = math.hypot(c, s)
        bulge = tube.flatness / wide
        skew = (tube.flatness**2 - 1.0) * math.sin(view.yaw) * math.cos(view.yaw) / wide
        first_azimuth = math.atan2(s, c)

        k = view.scale * SUPERSAMPLING
        widths = [(at, r * k * wide) for at, r in tube.profile]
        (_, top), (_, bottom) = widths[0], widths[-1]
        above = [(-top * p / length, top * q) for p, q in _CAP]
        below = [(1.0 + tube.foot * bottom * p / length, bottom * q) for p, q in reversed(_CAP)]
        if len(widths) == 1:
            widths = [(0.0, top), (1.0, top)]
        stations, radii = zip(*(above + widths + below), strict=True)

        reach = max(radii)
        rows, columns = self.depth.shape
        left, right = int(min(x0, x1) - reach), int(max(x0, x1) + reach) + 2
        upper, lower = int(min(y0, y1) - reach), int(max(y0, y1) + reach) + 2
        left, upper = max(left, 0), max(upper, 0)
        right, lower = min(right, columns), min(lower, rows)
        if left >= right or upper >= lower:
            return
        box = (slice(upper, lower), slice(left, right))
        gx = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - x0)
        gy = np.arange(upper, lower, dtype=np.float32)[:, None] + np.float32(0.5 - y0)
        along = (gx * (ex / length) + gy * (ey / length)).astype(np.float32)
        radius = np.interp(along, stations, radii, left=0.0, right=0.0).astype(np.float32)
        across = (gx * ey - gy * ex) / np.maximum(radius, 1e-3)
        hit = np.abs(across) < 1.0
        if not hit.any():
            return
        row, column = np.nonzero(hit)
        t, v, r = across[row, column], along[row, column].clip(0.0, 1.0), radius[row, column]
        q = np.sqrt(1.0 - t * t)
        depth = d0 + v * (d1 - d0) + (r / wide) * (bulge * q + skew * t)
        target = self.depth[box]
        seen = depth > target[row, column]
        row, column, t, v, q = row[seen], column[seen], t[seen], v[seen], q[seen]
        target[row, column] = depth[seen]

        high, around = tube.texture.shape[:2]
        turn = (first_azimuth + np.arccos(t)) / (2.0 * math.pi)
        texel = tube.texture[
            (v * (high - 0.01)).astype(np.intp), (turn * around).astype(np.intp) % around
        ]
        lx, ly, lz = view.light
        light = view.ambient + view.diffuse * np.maximum(0.0, t * (lx * ey + ly * ex) + q * lz)
        # Silhouettes and folds between parts get less of the sky's light.
        light = light * (0.72 + 0.28 * q)
        self.colour[box][row, column] = texel * light[:, None].astype(np.float32)


def random_pose(rng: np.random.Generator, a: Appearance) -> Pose:
    """A moment of this person's walk."""
    arms = str(rng.choice(["swing", "phone", "pockets"], p=[0.72, 0.12, 0.16]))
    if a.bag == "handbag" and arms != "phone":
        arms = "carry"
    swing = a.stride * rng.uniform(0.15, 0.6)
    phase = rng.uniform(0.0, 2.0 * math.pi)
    return Pose(phase=float(phase), swing=float(swing), arms=arms, lean=float(rng.uniform(0, 0.03)))


__all__ = ["Canvas", "Colour", "Pose", "Tube", "View", "body", "random_pose"]
