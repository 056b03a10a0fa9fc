"""Drawing a data set while someone watches, and how one was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dhcl.errors import ConfigError
from dhcl.stored import read_json
from dhcl.synth.dataset import MANIFEST, SynthSummary, render_dataset
from dhcl.synth.plan import TRAIN
from dhcl.synth.sheet import contact_sheet
from dhcl.words import show

__all__ = ["draw", "draw_once", "drawn_with", "refuse_others"]


def draw_once(out: Path, *, sheet: Path, workers: int, **options: Any) -> None:
    """Draw pedestrians where there are none yet, and their contact sheet where there is none.

    Args:
        out: folder of the data set.
        sheet: file for a contact sheet of the training images, PNG.
        workers: processes that draw.
        options: what is drawn, of :func:`dhcl.synth.render_dataset`.

    Raises:
        ConfigError: the folder holds people who were drawn with other options, or something else.
    """
    if out.exists():
        refuse_others(out, drawn_with(out), options)
        if not sheet.exists():
            try:
                contact_sheet(out / TRAIN, sheet)
            except ValueError as error:
                raise ConfigError(f"out: {show(out)} is not whole ({error})") from error
        return
    summary = draw(out, sheet=sheet, workers=workers, **options)
    tqdm.write(
        f"drawn: {summary.train_images} images of {summary.train_ids} people; see {show(sheet)}"
    )


def refuse_others(there: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if what a folder holds was made with other options."""
    others = [f"{k} {found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v]
    if others:
        raise ConfigError(
            f"out: {show(there)} was made with other options ({'; '.join(others)}); choose another "
            "--out, or remove it"
        )


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
        contact_sheet(out / TRAIN, sheet)
    return summary


def drawn_with(out: Path) -> dict[str, Any]:
    """The options that pedestrians were drawn with, as :func:`dhcl.synth.render_dataset` has them.

    Raises:
        ConfigError: the folder does not say; it holds something else.
    """
    try:
        found: dict[str, Any] = dict(read_json(out / MANIFEST)["arguments"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"out: {show(out)} holds no pedestrians of dhcl synth") from error
    return found
