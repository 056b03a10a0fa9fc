"""Drawing a data set while someone watches, and how one was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from dhcl.errors import ConfigError
from dhcl.stored import read_json
from dhcl.synth.dataset import MANIFEST, SynthSummary, render_dataset
from dhcl.synth.sheet import contact_sheet
from dhcl.words import show

__all__ = ["draw", "drawn_with"]


def draw(out: Path, *, sheet: Path | None = None, **options: Any) -> SynthSummary:
    """Draw pedestrians with a progress line, if someone looks at it.

    Args:
        out: folder of the data set.
        sheet: file for a contact sheet of the training images, PNG.
        options: of :func:`dhcl.synth.render_dataset`.

    Raises:
        ConfigError: what :func:`dhcl.synth.render_dataset` refuses.
    """
    with tqdm(desc="drawing pedestrians", leave=False, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            summary = render_dataset(out, progress=advance, **options)
        except (TypeError, ValueError, FileExistsError) as error:
            raise ConfigError(str(error)) from error
    if sheet is not None:
        contact_sheet(out / "bounding_box_train", sheet)
    return summary


def drawn_with(out: Path) -> dict[str, Any]:
    """The options that pedestrians were drawn with, as :func:`dhcl.synth.render_dataset` has them.

    Raises:
        ConfigError: the folder does not say; it holds something else.
    """
    try:
        found: dict[str, Any] = read_json(out / MANIFEST)["arguments"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"out: {show(out)} holds no pedestrians of dhcl synth") from error
    return found
