"""A picture of a drawn data set to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image as PILImage

from dhcl.files import replacing
from dhcl.stored import IMAGE_FORMATS, open_stored
from dhcl.synth.plan import whole_number
from dhcl.words import show

__all__ = ["contact_sheet"]


def contact_sheet(folder: Path | str, out_png: Path | str, ids: int = 12, columns: int = 8) -> Path:
    """Write a PNG with one row per identity and its images by camera, from left to right.

    Args:
        folder: a folder of Market-1501 names, such as ``OUT/bounding_box_train``.
        out_png: file to write.
        ids: how many identities, spread evenly over those in the folder.
        columns: images per identity, spread evenly over the cameras.

    Returns the path written. Raises ``ValueError`` where the folder has no image of an identity.
    """
    whole_number("ids", ids, 1)
    whole_number("columns", columns, 1)
    of_identity: dict[int, dict[int, list[Path]]] = {}
    for path in sorted(Path(folder).glob("*.jpg")):
        identity, camera = path.stem.split("_")[:2]
        if int(identity) > 0:
            number = int(camera[1:].split("s")[0])
            of_identity.setdefault(int(identity), {}).setdefault(number, []).append(path)
    if not of_identity:
        raise ValueError(
            f"synth: the folder must hold images of identities (got none in {show(folder)})"
        )
    everyone = sorted(of_identity)
    chosen = [
        everyone[i * len(everyone) // min(ids, len(everyone))]
        for i in range(min(ids, len(everyone)))
    ]
    rows = [_in_turn(of_identity[identity], columns) for identity in chosen]
    with _open(rows[0][0]) as first:
        width, height = first.size
    gap = 2
    sheet = PILImage.new("RGB", (columns * (width + gap), len(rows) * (height + gap)), "white")
    for r, row in enumerate(rows):
        for c, path in enumerate(row):
            with _open(path) as image:
                sheet.paste(image.resize((width, height)), (c * (width + gap), r * (height + gap)))
    with replacing(Path(out_png)) as file:
        sheet.save(file, format="PNG")
    return Path(out_png)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[PILImage.Image]:
    with open_stored(path) as file, PILImage.open(file, formats=IMAGE_FORMATS) as image:
        yield image


def _in_turn(by_camera: dict[int, list[Path]], columns: int) -> list[Path]:
    """Up to ``columns`` images, as many from each camera as there are, ordered by camera."""
    taken: list[tuple[int, Path]] = []
    for i in range(max(map(len, by_camera.values()))):
        taken += [(camera, paths[i]) for camera, paths in by_camera.items() if i < len(paths)]
    return [path for _, path in sorted(taken[:columns], key=lambda entry: entry[0])]
