"""A rendered data set on disk, in the layout of Market-1501 (Zheng et al., ICCV 2015)."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image as PILImage
from PIL import ImageDraw

from dhcl.synth.appearance import Appearance, sample_appearance
from dhcl.synth.cameras import Camera, make_camera
from dhcl.synth.draw import SUPERSAMPLING, Canvas, Image, View, body, random_pose

__all__ = ["SynthSummary", "contact_sheet", "render_crop", "render_dataset"]

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MANIFEST = "synth.json"
# Raised when the same seed gives other pictures.
VERSION = 1
_MADE_BY = "dhcl synth"
# Identities of strangers (distractors and passers-by), beyond those of the data set.
_STRANGERS = 1_000_000


@dataclass(frozen=True)
class SynthSummary:
    """What :func:`render_dataset` wrote: numbers of images and identities."""

    train_images: int
    query_images: int
    gallery_images: int
    """All of the gallery, with distractors and junk."""
    distractors: int
    junk: int
    train_ids: int
    test_ids: int
    cameras: int


class _Job(NamedTuple):
    """One image: file within the data set, whose it is, and what kind of box."""

    file: str
    identity: int
    camera: int
    image: int
    kind: str


# ---- one image ----------------------------------------------------------------------------------


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
    return sample_appearance(np.random.default_rng([seed, 1, _STRANGERS + number]))


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
        camera_gap: how much cameras differ, see :func:`render_dataset`.
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


# ---- the plan -----------------------------------------------------------------------------------


def _plan(
    seed: int, ids: int, cameras: int, images_per_camera: int, junk: int, distractors: int
) -> list[_Job]:
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
                jobs.append(_Job(file, identity, camera, image, "person"))
    test_ids = range(ids // 2 + 1, ids + 1)
    for i in range(junk):
        identity, camera = test_ids[i % len(test_ids)], i % cameras + 1
        # Image numbers beyond those of the good boxes.
        jobs.append(_Job(f"{GALLERY}/{name(-1, camera, 1)}", identity, camera, 10_000 + i, "junk"))
    for i in range(distractors):
        camera = i % cameras + 1
        kind = "scene" if i % 3 == 2 else "person"
        number = _STRANGERS + 1000 + i
        jobs.append(_Job(f"{GALLERY}/{name(0, camera, 0)}", number, camera, 0, kind))
    return jobs


def _render_all(root: str, seed: int, size: tuple[int, int], gap: float, jobs: list[_Job]) -> int:
    for job in jobs:
        crop = render_crop(seed, job.identity, job.camera, job.image, size, job.kind, gap)
        quality = make_camera(seed, job.camera, *size).jpeg_quality
        crop.save(os.path.join(root, job.file), quality=quality)
    return len(jobs)


# ---- the data set -------------------------------------------------------------------------------


def _integer(name: str, value: object, low: int, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"synth: {name} must be an integer (got {value!r})")
    if value < low:
        raise ValueError(f"synth: {name} must be >= {low}{why} (got {value})")
    return value


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier output."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise FileExistsError(f"synth: the output must be a folder (got {out}, which is not one)")
    there = {entry.name for entry in out.iterdir()}
    if not there:
        return
    if not _is_own(out):
        raise FileExistsError(
            f"synth: the output folder must be new, empty or an earlier output of dhcl synth "
            f"(got {out}, which holds {min(there)} and no {MANIFEST} of ours)"
        )
    foreign = there - {TRAIN, QUERY, GALLERY, MANIFEST}
    if foreign:
        raise FileExistsError(
            f"synth: an output folder to replace must hold nothing else "
            f"(got {out} with {min(foreign)})"
        )
    if not overwrite:
        raise FileExistsError(
            f"synth: the output folder holds an earlier data set; pass overwrite to replace it "
            f"(got {out})"
        )


def _is_own(out: Path) -> bool:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("made_by") == _MADE_BY


def _pieces(jobs: list[_Job], length: int) -> Iterator[list[_Job]]:
    for start in range(0, len(jobs), length):
        yield jobs[start : start + length]


def render_dataset(
    out: Path | str,
    *,
    ids: int = 200,
    cameras: int = 4,
    images_per_camera: int = 4,
    image_size: tuple[int, int] = (128, 64),
    camera_gap: float = 1.0,
    seed: int = 0,
    junk: int | None = None,
    distractors: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SynthSummary:
    """Render pedestrians into ``out``, in the layout of Market-1501.

    The first half of the identities (rounded down) is for training, the rest for testing. One
    image per test identity and camera is a query, the others are the gallery. The gallery also
    holds distractors (identity 0: other people, and boxes where nobody is) and junk (identity -1:
    boxes that miss most of a test identity). ``synth.json`` records arguments and versions.

    The same arguments give the same bits, whatever ``workers`` is, on one machine with one version
    of NumPy and Pillow. The folder appears under its name only when complete.

    Args:
        out: folder to make. An earlier output is replaced with ``overwrite``; a folder that holds
            anything else is never touched.
        ids: number of identities, >= 4.
        cameras: number of cameras, >= 2.
        images_per_camera: mean images per identity in a camera that sees it, >= 2; the number is
            uniform in [2, 2 * images_per_camera - 2].
        image_size: (height, width) in pixels, at least (32, 16).
        camera_gap: how much cameras differ in colour, contrast, sharpness and in the side from
            which they see people, in [0, 1].
        seed: >= 0.
        junk: number of junk boxes; default: one per 4 test identities.
        distractors: number of distractors; default: one per test identity.
        workers: processes. More than one are started afresh ("spawn"), so that a script needs the
            usual ``if __name__ == "__main__"``.
        overwrite: see ``out``.
        progress: called with (images done, images in all), from time to time.

    Raises:
        TypeError, ValueError: an argument is out of its range.
        FileExistsError: the folder is not ours to replace.
    """
    _integer("ids", ids, 4)
    _integer("cameras", cameras, 2, ", as people are looked for in another camera")
    _integer("images_per_camera", images_per_camera, 2, ", for a query and a gallery image")
    if len(image_size) != 2:
        raise ValueError(f"synth: image_size must be (height, width) (got {image_size!r})")
    height = _integer("the height of image_size", image_size[0], 32)
    width = _integer("the width of image_size", image_size[1], 16)
    if isinstance(camera_gap, bool) or not isinstance(camera_gap, (int, float)):
        raise TypeError(f"synth: camera_gap must be a number (got {camera_gap!r})")
    if not 0.0 <= camera_gap <= 1.0:
        raise ValueError(f"synth: camera_gap must be in [0, 1] (got {camera_gap})")
    _integer("seed", seed, 0)
    _integer("workers", workers, 1)
    test_ids = ids - ids // 2
    junk = test_ids // 4 if junk is None else _integer("junk", junk, 0)
    distractors = test_ids if distractors is None else _integer("distractors", distractors, 0)

    out = Path(out)
    _check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = _plan(seed, ids, cameras, images_per_camera, junk, distractors)
    folders = [job.file.split("/")[0] for job in jobs]
    summary = SynthSummary(
        train_images=folders.count(TRAIN),
        query_images=folders.count(QUERY),
        gallery_images=folders.count(GALLERY),
        distractors=distractors,
        junk=junk,
        train_ids=ids // 2,
        test_ids=test_ids,
        cameras=cameras,
    )
    manifest = {
        "made_by": _MADE_BY,
        "version": VERSION,
        "arguments": {
            "ids": ids,
            "cameras": cameras,
            "images_per_camera": images_per_camera,
            "image_size": [height, width],
            "camera_gap": float(camera_gap),
            "seed": seed,
            "junk": junk,
            "distractors": distractors,
        },
        "counts": asdict(summary),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    # A sibling, so that the final rename stays within one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        for folder in (TRAIN, QUERY, GALLERY):
            (partial / folder).mkdir()
        _run(partial, seed, (height, width), float(camera_gap), jobs, workers, progress)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.chmod(0o777 & ~_umask())
        _check_target(out, overwrite)
        _put(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put(partial: Path, out: Path) -> None:
    """Rename the finished folder into place; an earlier one is removed after that."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        try:
            out.rename(old / "old")
            try:
                partial.rename(out)
            except BaseException:
                (old / "old").rename(out)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(out)


def _run(
    root: Path,
    seed: int,
    size: tuple[int, int],
    gap: float,
    jobs: list[_Job],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    pieces = list(_pieces(jobs, 64))
    if workers == 1:
        for piece in pieces:
            done += _render_all(str(root), seed, size, gap, piece)
            if progress:
                progress(done, len(jobs))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=context) as pool:
        tasks = [pool.submit(_render_all, str(root), seed, size, gap, piece) for piece in pieces]
        try:
            for task in tasks:
                done += task.result()
                if progress:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- looking at it ------------------------------------------------------------------------------


def contact_sheet(folder: Path | str, out_png: Path | str, ids: int = 12, columns: int = 8) -> Path:
    """Write a PNG with one row per identity and its images by camera, from left to right.

    Args:
        folder: a folder of Market-1501 names, such as ``OUT/bounding_box_train``.
        out_png: file to write.
        ids: how many identities, spread evenly over those in the folder.
        columns: images per identity, spread evenly over the cameras.

    Returns the path written. Raises ``ValueError`` where the folder has no image of an identity.
    """
    _integer("ids", ids, 1)
    _integer("columns", columns, 1)
    of_identity: dict[int, dict[int, list[Path]]] = {}
    for path in sorted(Path(folder).glob("*.jpg")):
        identity, camera = path.stem.split("_")[:2]
        if int(identity) > 0:
            number = int(camera[1:].split("s")[0])
            of_identity.setdefault(int(identity), {}).setdefault(number, []).append(path)
    if not of_identity:
        raise ValueError(f"synth: the folder must hold images of identities (got none in {folder})")
    everyone = sorted(of_identity)
    chosen = [
        everyone[i * len(everyone) // min(ids, len(everyone))]
        for i in range(min(ids, len(everyone)))
    ]
    rows = [_in_turn(of_identity[identity], columns) for identity in chosen]
    with PILImage.open(rows[0][0]) as first:
        width, height = first.size
    gap = 2
    sheet = PILImage.new("RGB", (columns * (width + gap), len(rows) * (height + gap)), "white")
    for r, row in enumerate(rows):
        for c, path in enumerate(row):
            with PILImage.open(path) as image:
                sheet.paste(image.resize((width, height)), (c * (width + gap), r * (height + gap)))
    sheet.save(out_png, format="PNG")
    return Path(out_png)


def _in_turn(by_camera: dict[int, list[Path]], columns: int) -> list[Path]:
    """Up to ``columns`` images, as many from each camera as there are, ordered by camera."""
    taken: list[tuple[int, Path]] = []
    for i in range(max(map(len, by_camera.values()))):
        taken += [(camera, paths[i]) for camera, paths in by_camera.items() if i < len(paths)]
    return [path for _, path in sorted(taken[:columns], key=lambda entry: entry[0])]
