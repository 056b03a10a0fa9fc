"""A rendered data set on disk, in the layout of Market-1501 (Zheng et al., ICCV 2015)."""

from __future__ import annotations

import json
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

from dhcl.files import new_file, write_atomic
from dhcl.stored import read_json
from dhcl.synth.cameras import make_camera
from dhcl.synth.crops import render_crop
from dhcl.synth.plan import GALLERY, QUERY, TRAIN, Job, plan, whole_number
from dhcl.words import show

__all__ = ["SynthSummary", "render_dataset"]

MANIFEST = "synth.json"
# Raised when the same seed gives other pictures.
VERSION = 1
_MADE_BY = "dhcl synth"


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


class _Asked(NamedTuple):
    """The arguments that decide every bit of a data set, checked; the manifest lists them so."""

    ids: int
    cameras: int
    images_per_camera: int
    image_size: tuple[int, int]
    camera_gap: float
    seed: int
    junk: int
    distractors: int

    @classmethod
    def of(
        cls,
        ids: int,
        cameras: int,
        images_per_camera: int,
        image_size: tuple[int, int],
        camera_gap: float,
        seed: int,
        junk: int | None,
        distractors: int | None,
    ) -> _Asked:
        whole_number("ids", ids, 4)
        whole_number("cameras", cameras, 2, ", as people are looked for in another camera")
        whole_number("images_per_camera", images_per_camera, 2, ", for a query and a gallery image")
        if len(image_size) != 2:
            raise ValueError(f"synth: image_size must be (height, width) (got {image_size!r})")
        height = whole_number("the height of image_size", image_size[0], 32)
        width = whole_number("the width of image_size", image_size[1], 16)
        if isinstance(camera_gap, bool) or not isinstance(camera_gap, (int, float)):
            raise TypeError(f"synth: camera_gap must be a number (got {camera_gap!r})")
        if not 0.0 <= camera_gap <= 1.0:
            raise ValueError(f"synth: camera_gap must be in [0, 1] (got {camera_gap})")
        whole_number("seed", seed, 0)
        test_ids = ids - ids // 2
        return cls(
            ids,
            cameras,
            images_per_camera,
            (height, width),
            float(camera_gap),
            seed,
            test_ids // 4 if junk is None else whole_number("junk", junk, 0),
            test_ids if distractors is None else whole_number("distractors", distractors, 0),
        )

    def summary(self, jobs: list[Job]) -> SynthSummary:
        folders = [job.file.split("/")[0] for job in jobs]
        return SynthSummary(
            train_images=folders.count(TRAIN),
            query_images=folders.count(QUERY),
            gallery_images=folders.count(GALLERY),
            distractors=self.distractors,
            junk=self.junk,
            train_ids=self.ids // 2,
            test_ids=self.ids - self.ids // 2,
            cameras=self.cameras,
        )


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
    asked = _Asked.of(
        ids, cameras, images_per_camera, image_size, camera_gap, seed, junk, distractors
    )
    whole_number("workers", workers, 1)
    out = Path(out)
    _check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = plan(seed, ids, cameras, images_per_camera, asked.junk, asked.distractors)
    summary = asked.summary(jobs)
    manifest = {
        "made_by": _MADE_BY,
        "version": VERSION,
        "arguments": asked._asdict(),
        "counts": asdict(summary),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    # A sibling, so that the final rename stays within one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        for folder in (TRAIN, QUERY, GALLERY):
            (partial / folder).mkdir()
        _run(partial, seed, asked.image_size, asked.camera_gap, jobs, workers, progress)
        write_atomic(partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        partial.chmod(0o777 & ~_umask())
        _check_target(out, overwrite)
        _put(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


def _render_all(root: str, seed: int, size: tuple[int, int], gap: float, jobs: list[Job]) -> int:
    for job in jobs:
        crop = render_crop(seed, job.identity, job.camera, job.image, size, job.kind, gap)
        quality = make_camera(seed, job.camera, *size).jpeg_quality
        with new_file(Path(root) / job.file) as file:
            crop.save(file, "JPEG", quality=quality)
    return len(jobs)


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier output."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise FileExistsError(
            f"synth: the output must be a folder (got {show(out)}, which is not one)"
        )
    there = {entry.name for entry in out.iterdir()}
    if not there:
        return
    if not _is_own(out):
        raise FileExistsError(
            f"synth: the output folder must be new, empty or an earlier output of dhcl synth "
            f"(got {show(out)}, which holds {min(there)} and no {MANIFEST} of ours)"
        )
    foreign = there - {TRAIN, QUERY, GALLERY, MANIFEST}
    if foreign:
        raise FileExistsError(
            f"synth: an output folder to replace must hold nothing else "
            f"(got {show(out)} with {min(foreign)})"
        )
    if not overwrite:
        raise FileExistsError(
            f"synth: the output folder holds an earlier data set; pass overwrite to replace it "
            f"(got {show(out)})"
        )


def _is_own(out: Path) -> bool:
    try:
        manifest = read_json(out / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("made_by") == _MADE_BY


def _pieces(jobs: list[Job], length: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), length):
        yield jobs[start : start + length]


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
    jobs: list[Job],
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
