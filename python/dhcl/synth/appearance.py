"""What a rendered pedestrian looks like: everything that stays the same from image to image.

An :class:`Appearance` is drawn once per identity. Clothes are textures wrapped around the body:
row 0 is the upper end of a body part, and columns go once around it, with the person's front at a
quarter and the back at three quarters. A front that is hidden from behind (an open jacket, a
printed logo, a face) is therefore nothing special, only columns that cannot be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Texture = NDArray[np.float32]

ROWS, COLUMNS = 48, 64
FRONT, BACK = COLUMNS // 4, 3 * COLUMNS // 4

# Reflectance of common clothes, and how common they are.
_CLOTHES: dict[str, tuple[Colour, float]] = {
    "black": ((0.06, 0.06, 0.07), 1.6),
    "charcoal": ((0.17, 0.17, 0.19), 1.0),
    "grey": ((0.45, 0.45, 0.46), 1.2),
    "white": ((0.92, 0.91, 0.89), 1.4),
    "navy": ((0.08, 0.11, 0.26), 1.1),
    "blue": ((0.15, 0.33, 0.68), 1.0),
    "sky": ((0.50, 0.70, 0.88), 0.8),
    "red": ((0.75, 0.12, 0.13), 1.0),
    "maroon": ((0.36, 0.07, 0.11), 0.7),
    "green": ((0.14, 0.45, 0.22), 0.8),
    "olive": ((0.34, 0.34, 0.17), 0.8),
    "yellow": ((0.91, 0.76, 0.17), 0.7),
    "orange": ((0.88, 0.45, 0.12), 0.6),
    "pink": ((0.90, 0.55, 0.64), 0.7),
    "purple": ((0.38, 0.20, 0.50), 0.6),
    "teal": ((0.10, 0.46, 0.48), 0.6),
    "brown": ((0.34, 0.21, 0.13), 0.8),
    "beige": ((0.78, 0.68, 0.52), 0.9),
}
_TROUSERS: dict[str, tuple[Colour, float]] = {
    "black": ((0.07, 0.07, 0.08), 1.6),
    "jeans": ((0.20, 0.29, 0.46), 1.6),
    "pale jeans": ((0.46, 0.56, 0.70), 0.9),
    "grey": ((0.38, 0.38, 0.39), 1.0),
    "beige": ((0.72, 0.62, 0.46), 1.0),
    "white": ((0.88, 0.87, 0.84), 0.6),
    "olive": ((0.31, 0.31, 0.18), 0.7),
    "maroon": ((0.38, 0.10, 0.13), 0.5),
    "navy": ((0.09, 0.12, 0.25), 0.8),
}
_SKIN: tuple[Colour, ...] = (
    (0.93, 0.77, 0.66),
    (0.85, 0.66, 0.52),
    (0.72, 0.52, 0.38),
    (0.54, 0.36, 0.25),
    (0.36, 0.23, 0.16),
)
_HAIR: tuple[Colour, ...] = (
    (0.05, 0.04, 0.04),
    (0.16, 0.10, 0.07),
    (0.34, 0.21, 0.12),
    (0.72, 0.55, 0.30),
    (0.55, 0.54, 0.53),
    (0.52, 0.22, 0.10),
)
_SHOES: tuple[Colour, ...] = (
    (0.06, 0.06, 0.06),
    (0.90, 0.90, 0.90),
    (0.32, 0.20, 0.12),
    (0.65, 0.12, 0.12),
    (0.15, 0.25, 0.55),
)

UPPERS = {"tshirt": 3.0, "long sleeves": 2.5, "open jacket": 2.0, "coat": 1.2, "dress": 1.2}
PATTERNS = {
    "plain": 2.2,
    "stripes": 1.6,
    "columns": 0.8,
    "checks": 1.1,
    "two tone": 1.4,
    "logo": 1.6,
    "yoke": 0.8,
    "sash": 0.7,
}
LOWERS = {"trousers": 4.0, "shorts": 1.6, "skirt": 1.2}
HAIRS = {
    "short": 3.0,
    "long": 2.0,
    "bald": 0.7,
    "ponytail": 1.0,
    "bun": 0.7,
    "cap": 1.3,
    "hood": 0.6,
}
BAGS = {"none": 2.2, "backpack": 1.8, "shoulder bag": 1.3, "handbag": 1.0}


@dataclass(frozen=True)
class Appearance:
    """One identity. Lengths in metres, colours as linear RGB reflectance in [0, 1]."""

    height: float
    build: float
    skin: Colour
    hair: str
    hair_colour: Colour
    beard: bool
    upper: str
    pattern: str
    upper_colour: Colour
    second_colour: Colour
    period: int
    contrast_sleeves: bool
    lower: str
    lower_colour: Colour
    side_stripe: bool
    hem: float
    shoes: Colour
    bag: str
    bag_colour: Colour
    bag_side: int
    stride: float


def _pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    shares = np.array(list(weights.values()))
    return str(rng.choice(list(weights), p=shares / shares.sum()))


def _dye(rng: np.random.Generator, cloth: dict[str, tuple[Colour, float]]) -> Colour:
    """A common colour, a little off, as no two blacks are the same."""
    base = cloth[_pick(rng, {name: weight for name, (_, weight) in cloth.items()})][0]
    jittered = np.array(base) * rng.uniform(0.85, 1.15) * rng.uniform(0.92, 1.08, 3)
    return _colour(jittered)


def _colour(values: NDArray[np.floating]) -> Colour:
    r, g, b = (float(v) for v in np.clip(values, 0.02, 0.97))
    return r, g, b


def _unlike(rng: np.random.Generator, colour: Colour) -> Colour:
    """A colour of clothes that one can tell from this one."""
    while True:
        other = _dye(rng, _CLOTHES)
        if np.abs(np.sqrt(other) - np.sqrt(colour)).max() > 0.25:
            return other


def sample_appearance(rng: np.random.Generator) -> Appearance:
    """Draw one identity."""
    upper_colour = _dye(rng, _CLOTHES)
    return Appearance(
        height=float(np.clip(rng.normal(1.72, 0.10), 1.45, 2.0)),
        build=float(np.clip(rng.normal(1.0, 0.13), 0.75, 1.4)),
        skin=_colour(np.array(_SKIN[rng.integers(len(_SKIN))]) * rng.uniform(0.93, 1.07)),
        hair=_pick(rng, HAIRS),
        hair_colour=_colour(np.array(_HAIR[rng.integers(len(_HAIR))]) * rng.uniform(0.9, 1.1)),
        beard=bool(rng.random() < 0.15),
        upper=_pick(rng, UPPERS),
        pattern=_pick(rng, PATTERNS),
        upper_colour=upper_colour,
        second_colour=_unlike(rng, upper_colour),
        period=int(rng.integers(4, 8)),
        contrast_sleeves=bool(rng.random() < 0.25),
        lower=_pick(rng, LOWERS),
        lower_colour=_dye(rng, _TROUSERS),
        side_stripe=bool(rng.random() < 0.15),
        hem=float(rng.uniform(0.25, 0.8)),
        shoes=_SHOES[rng.integers(len(_SHOES))],
        bag=_pick(rng, BAGS),
        bag_colour=_dye(rng, _CLOTHES),
        bag_side=int(rng.choice([-1, 1])),
        stride=float(rng.uniform(0.75, 1.15)),
    )


# ---- textures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wardrobe:
    """The textures (rows, columns, 3) of one identity, by body part."""

    head: Texture
    neck: Texture
    torso: Texture
    skirt: Texture | None
    upper_arm: Texture
    forearm: Texture
    thigh: Texture
    shin: Texture


def plain(colour: Colour) -> Texture:
    """A texture of one colour."""
    return np.full((1, 1, 3), colour, np.float32)


def _sheet(colour: Colour) -> Texture:
    return np.tile(plain(colour), (ROWS, COLUMNS, 1))


def _around(centre: int, half: int) -> NDArray[np.intp]:
    """Columns within ``half`` of a centre, going around."""
    return np.arange(centre - half, centre + half + 1) % COLUMNS


def _patterned(a: Appearance, first: Colour, second: Colour) -> Texture:
    sheet = _sheet(first)
    row, column = np.mgrid[:ROWS, :COLUMNS]
    if a.pattern == "stripes":
        sheet[(row // a.period) % 2 == 1] = second
    elif a.pattern == "columns":
        sheet[column % (a.period + 1) < (a.period + 1) // 2] = second
    elif a.pattern == "checks":
        over = ((row // a.period) % 2).astype(int) + (column // a.period) % 2
        mixed = (np.array(first) + np.array(second)) / 2
        sheet[over == 1] = mixed
        sheet[over == 2] = second
    elif a.pattern == "two tone":
        sheet[row > ROWS * (0.25 + 0.05 * a.period)] = second
    elif a.pattern == "yoke":
        sheet[row < ROWS * 0.30] = second
    elif a.pattern == "sash":
        sheet[(row > 16) & (row < 16 + 2 * a.period)] = second
    elif a.pattern == "logo":
        for centre, top, half, rows in ((FRONT, 10, 5, 11), (BACK, 8, 7, 6 + a.period)):
            sheet[top : top + rows, _around(centre, half)] = second
    return sheet


def _torso(a: Appearance) -> Texture:
    if a.upper == "open jacket":
        sheet = _sheet(a.upper_colour)
        half = 3 + a.period // 2
        front = _around(FRONT, half)
        sheet[:, front] = _patterned(a, a.second_colour, a.upper_colour)[:, front]
        lapel = _colour(np.array(a.upper_colour) * 0.55)
        sheet[:, [front[0] - 1, front[-1] + 1]] = lapel
    else:
        sheet = _patterned(a, a.upper_colour, a.second_colour)
        if a.upper == "coat":
            sheet[:, FRONT] *= 0.4
    if a.upper in ("tshirt", "long sleeves"):
        # The shirt ends, and trousers begin.
        sheet[int(ROWS * 0.9) :] = a.lower_colour
        sheet[: 3 + a.period // 3, _around(FRONT, 4)] = a.skin
    strap = _colour(np.array(a.bag_colour) * 0.8)
    if a.bag == "backpack":
        for side in (-7, 7):
            sheet[: ROWS // 2, _around(FRONT + side, 1)] = strap
    elif a.bag == "shoulder bag":
        # From one shoulder to the other hip, in front and behind.
        for row in range(int(ROWS * 0.9)):
            lean = round((row / (ROWS * 0.9) - 0.5) * 26) * a.bag_side
            sheet[row, _around(FRONT - lean, 1)] = strap
            sheet[row, _around(BACK + lean, 1)] = strap
    return sheet


def _head(a: Appearance) -> Texture:
    sheet = _sheet(a.skin)
    hair = a.upper_colour if a.hair == "hood" else a.hair_colour
    behind = _around(BACK, 17 if a.hair in ("short", "cap") else 19)
    if a.hair != "bald":
        sheet[: int(ROWS * 0.26)] = hair
        sheet[: int(ROWS * (0.72 if a.hair in ("short", "cap") else 1.0)), behind] = hair
    if a.hair == "hood":
        sheet[:, _around(BACK, 24)] = hair
    elif a.hair == "cap":
        sheet[: int(ROWS * 0.36)] = a.second_colour
    for side in (-4, 4):
        sheet[int(ROWS * 0.48) : int(ROWS * 0.56), _around(FRONT + side, 1)] = (0.05, 0.04, 0.04)
        sheet[int(ROWS * 0.41) : int(ROWS * 0.45), _around(FRONT + side, 2)] *= 0.55
    if a.beard:
        sheet[int(ROWS * 0.68) :, _around(FRONT, 11)] = a.hair_colour
    sheet[int(ROWS * 0.76) : int(ROWS * 0.81), _around(FRONT, 3)] = (0.55, 0.25, 0.22)
    return sheet


@lru_cache(maxsize=64)
def wardrobe(a: Appearance) -> Wardrobe:
    """The textures of this identity."""
    sleeve = a.second_colour if a.contrast_sleeves else a.upper_colour
    upper_arm, forearm = _sheet(sleeve), _sheet(sleeve)
    if a.pattern in ("stripes", "checks") and a.upper != "open jacket":
        upper_arm = _patterned(a, a.upper_colour, a.second_colour)[: ROWS // 2]
        forearm = upper_arm
    if a.upper in ("tshirt", "dress"):
        upper_arm = upper_arm.copy()
        upper_arm[int(len(upper_arm) * 0.65) :] = a.skin
        forearm = _sheet(a.skin)

    thigh, shin = _sheet(a.lower_colour), _sheet(a.lower_colour)
    skirt = None
    bare = a.lower != "trousers" or a.upper == "dress"
    if bare:
        shin = _sheet(a.skin)
        if a.lower == "shorts" and a.upper != "dress":
            thigh[int(ROWS * (0.55 + 0.4 * a.hem)) :] = a.skin
        else:
            thigh = _sheet(a.skin)
    elif a.side_stripe:
        for side in (0, COLUMNS // 2):
            thigh[:, _around(side, 4)] = a.second_colour
            shin[:, _around(side, 4)] = a.second_colour
    if a.upper == "dress":
        skirt = _patterned(a, a.upper_colour, a.second_colour)
        if a.pattern in ("two tone", "yoke", "sash", "logo"):
            skirt = _sheet(a.second_colour if a.pattern == "two tone" else a.upper_colour)
    elif a.upper == "coat":
        skirt = _sheet(a.upper_colour)
        if a.pattern in ("stripes", "columns", "checks"):
            skirt = _patterned(a, a.upper_colour, a.second_colour)
        skirt[:, FRONT] *= 0.4
    elif a.lower == "skirt":
        skirt = _sheet(a.lower_colour)
    if bare and a.bag_side > 0:
        # Socks or boots.
        shin[int(ROWS * (0.9 - 0.5 * a.hem)) :] = a.shoes
    return Wardrobe(
        head=_head(a),
        neck=plain(a.upper_colour if a.hair == "hood" else a.skin),
        torso=_torso(a),
        skirt=skirt,
        upper_arm=upper_arm,
        forearm=forearm,
        thigh=thigh,
        shin=shin,
    )
