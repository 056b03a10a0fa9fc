"""What the runs of :mod:`benchmarks.evidence` train on: drawn people, or a folder of photographs.

Each bed is made once, in the folder of the evidence, and every run of it reads the same images.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dhcl.data import load_data
from dhcl.errors import ConfigError
from dhcl.synth.progress import draw, drawn_with
from dhcl.words import show

__all__ = ["Bed", "Drawn", "root_of"]

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


@dataclass(frozen=True)
class Drawn:
    """How people are drawn: arguments of ``dhcl synth``. Half of them are for testing.

    By default some hundreds in cameras which differ so much that one person's images form several
    clusters at first.
    """

    ids: int = 400
    cameras: int = 5
    images_per_camera: int = 3
    image_size: tuple[int, int] = (64, 32)
    camera_gap: float = 0.3
    seed: int = 1


@dataclass(frozen=True)
class Bed:
    """Images, what a run on them starts from, and the options that all runs on them share."""

    options: dict[str, Any]
    """Of a training, in the names of ``dhcl train``."""
    drawn: Drawn | None = None
    """Draw people."""
    photographs: Literal["forward", "reversed"] | None = None
    """Take the photographs; reversed, those of testing are trained on and the other way round."""
    start: str | None = None
    """Name of the training to start from, or ``imagenet`` for the file of ``--imagenet``; without
    one, from random weights."""

    def check(self, name: str) -> None:
        """Raise :class:`ConfigError` unless the images are said, once."""
        if (self.drawn is None) == (self.photographs is None):
            raise ConfigError(f"beds: {name} must have either drawn or photographs")


def root_of(bed: Bed, name: str, out: Path, photographs: Path | None) -> Path:
    """The folder of a bed's images, made if it is not there yet.

    Args:
        bed: which.
        name: its name, for its folder and for errors.
        out: where beds are made, in folders of their own.
        photographs: folder of photographs in the layout of Market-1501, for beds that need it.

    Raises:
        ConfigError: no photographs were given, or a folder holds people that were drawn otherwise.
    """
    if bed.drawn is not None:
        return _drawn(bed.drawn, out / name)
    if photographs is None:
        raise ConfigError(f"photographs: the bed {name} needs their folder (got None)")
    if bed.photographs == "forward":
        return photographs
    return _reversed(photographs, out / name)


def _drawn(wanted: Drawn, root: Path) -> Path:
    arguments = {**asdict(wanted), "image_size": list(wanted.image_size)}
    if not root.exists():
        draw(root, **arguments)
        return root
    found = drawn_with(root)
    others = [f"{k} {found.get(k)}, not {v}" for k, v in arguments.items() if found.get(k) != v]
    if others:
        raise ConfigError(
            f"out: {show(root)} holds people that were drawn otherwise ({'; '.join(others)}); "
            "remove it, or choose another name for the bed"
        )
    return root


def _reversed(photographs: Path, root: Path) -> Path:
    """The same images with the identities of testing to train on, and the other way round.

    Of each person and camera the first image by name is a query, as in the folder itself.
    """
    if root.exists():
        return root
    data = load_data("market1501", photographs)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
    try:
        for folder in (TRAIN, QUERY, GALLERY):
            (partial / folder).mkdir()
        for images in (data.query, data.gallery):
            for path in images.paths:
                shutil.copy(path, partial / TRAIN / path.name)
        seen = set()
        images = data.train
        rows = zip(images.paths, images.ids.tolist(), images.cameras.tolist(), strict=True)
        for path, identity, camera in sorted(rows, key=lambda row: row[0].name):
            folder = GALLERY if (identity, camera) in seen else QUERY
            seen.add((identity, camera))
            shutil.copy(path, partial / folder / path.name)
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root
