"""Which images a drawn data set has: who is seen by which camera, how often, and where it goes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dhcl.synth.crops import STRANGERS

__all__ = ["GALLERY", "QUERY", "TRAIN", "Job", "plan", "whole_number"]

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


class Job(NamedTuple):
    """One image: file within the data set, whose it is, and what kind of box."""

    file: str
    identity: int
    camera: int
    image: int
    kind: str


def plan(
    seed: int, ids: int, cameras: int, images_per_camera: int, junk: int, distractors: int
) -> list[Job]:
    """Every image of a data set; arguments as of :func:`dhcl.synth.render_dataset`."""
    frames = [0] * (cameras + 1)

    def name(identity: int, camera: int, box: int) -> str:
        frames[camera] += 25
        label = "-1" if identity < 0 else f"{identity:04d}"
        return f"{label}_c{camera}s1_{frames[camera]:06d}_{box:02d}.jpg"

    jobs = []
    for identity in range(1, ids + 1):
        rng = np.random.default_rng([seed, 4, identity])
        # Not everyone passes every camera, but everyone passes two, and stays for two images.
        seen = rng.random(cameras) < 0.9
        seen[rng.permutation(cameras)[:2]] = True
        counts = rng.integers(2, 2 * images_per_camera - 1, cameras)
        for camera in (np.nonzero(seen)[0] + 1).tolist():
            for image in range(int(counts[camera - 1])):
                folder = TRAIN
                if identity > ids // 2:
                    folder = QUERY if image == 0 else GALLERY
                file = f"{folder}/{name(identity, camera, 0)}"
                jobs.append(Job(file, identity, camera, image, "person"))
    test_ids = range(ids // 2 + 1, ids + 1)
    for i in range(junk):
        identity, camera = test_ids[i % len(test_ids)], i % cameras + 1
        # Image numbers beyond those of the good boxes.
        jobs.append(Job(f"{GALLERY}/{name(-1, camera, 1)}", identity, camera, 10_000 + i, "junk"))
    for i in range(distractors):
        camera = i % cameras + 1
        kind = "scene" if i % 3 == 2 else "person"
        number = STRANGERS + 1000 + i
        jobs.append(Job(f"{GALLERY}/{name(0, camera, 0)}", number, camera, 0, kind))
    return jobs


def whole_number(name: str, value: object, low: int, why: str = "") -> int:
    """The value, if it is a whole number and not below ``low``.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"synth: {name} must be an integer (got {value!r})")
    if value < low:
        raise ValueError(f"synth: {name} must be >= {low}{why} (got {value})")
    return value
