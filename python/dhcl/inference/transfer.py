"""The features of an index to a file that other programs read, and an index of such a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from dhcl.data.lists import identifier
from dhcl.errors import ConfigError, DataError, as_path
from dhcl.inference.features import Features, read_features, unit_rows
from dhcl.inference.gallery.places import Address, creating
from dhcl.inference.gallery.schema import About, Record, arrow_batch
from dhcl.inference.gallery.store import BLOCK
from dhcl.inference.index import Index
from dhcl.inference.reid import ReID
from dhcl.inference.writing import feature_writer
from dhcl.words import show

__all__ = ["export_features", "index_features"]


def export_features(index: Index, file: str | os.PathLike[str]) -> int:
    """Write features, paths, identities and cameras of an index to a file; whole, or not at all.

    Args:
        index: all of it; memory does not grow with it, but for its paths.
        file: ``.npz`` or ``.parquet``, as of :func:`dhcl.inference.writing.feature_writer`. Paths
            are absolute.

    Returns:
        Number of rows.

    Raises:
        FeatureError: another kind of file; no pyarrow. DataError: the index is damaged.
    """
    with feature_writer(as_path("features", file), index.width, index.model) as writer:
        images = index.images()
        for numbers, features in index.batches():
            records = [next(images)[1] for _ in numbers]
            writer.append(
                torch.from_numpy(np.array(features)),
                [str(index.path_of(record)) for record in records],
                [record.id for record in records],
                [record.camera for record in records],
            )
    return len(index)


def index_features(
    folder: Address, file: str | os.PathLike[str], model: ReID, *, pattern: str | None = None
) -> int:
    """Make an index of features that were extracted before, without looking at an image.

    A later ``--add`` of these images extracts them again, since their sizes and times are unknown.

    Args:
        folder: of the index, new or empty; or the URL of another store.
        file: of one of :data:`dhcl.inference.features.FEATURE_SUFFIXES`, with paths; those that are
            not absolute are below the file's folder.
        model: the one that extracted them.
        pattern: what identities, cameras and times of later images are read with.

    Returns:
        Number of rows.

    Raises:
        FeatureError: as :func:`dhcl.inference.features.read_features`. ConfigError: no paths in it,
            another model, or a folder that is none for an index.
    """
    found = read_features(as_path("features", file))
    if found.paths is None:
        raise ConfigError(f"features: {show(found.file)} must have paths, to name what is found")
    if found.model != model.id:
        who = "no model" if found.model is None else f"model {found.model[:12]}"
        raise ConfigError(
            f"features: {show(found.file)} names {who}, and {show(model.run)}, {model.which}, is "
            f"{model.id[:12]}; features of two models can't be compared"
        )
    if found.values.shape[1] != model.dim:
        raise DataError(
            f"features: {show(found.file)} must have {model.dim} columns, as many as the model "
            f"gives (got {found.values.shape[1]})"
        )
    _check_rows(found, found.paths)
    paths = [os.path.join(os.path.abspath(found.file.parent), path) for path in found.paths]
    if len(set(paths)) != len(paths):
        raise DataError(f"features: {show(found.file)} has a path twice")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    about = About(
        model=model.id,
        run=os.path.abspath(model.run),
        which="best" if model.which == "best" else "last",
        pattern=pattern,
        trained_cameras=False,
        roots=(root,),
        width=model.dim,
    )
    with creating(folder, about) as writer:
        return writer.insert(_batches(found, paths, root, model.id))


def _check_rows(found: Features, paths: Sequence[str]) -> None:
    """Refuse features without a direction, and what names no image that an index could hold."""
    wrong = unit_rows(found.values)[1]
    if len(wrong):
        raise DataError(
            f"features: {show(found.file)} must have rows of a length above 0 (got 0 in row "
            f"{int(wrong[0])}, {len(wrong):,} such rows)"
        )
    for row, path in enumerate(paths):
        parts = PurePath(path).parts
        if not parts or ".." in parts or "\0" in path:
            raise DataError(
                f"features: {show(found.file)} must name images below its folder, or in full (got "
                f"{show(repr(path))} in row {row})"
            )


def _batches(found: Features, paths: list[str], root: str, model: str) -> Iterator[Any]:
    values = unit_rows(found.values)[0].numpy()
    for start in range(0, len(paths), BLOCK):
        rows = range(start, min(start + BLOCK, len(paths)))
        records = [
            Record(
                root=0,
                path=Path(paths[row]).relative_to(root).as_posix(),
                id=-1 if found.ids is None else identifier(str(found.ids[row])),
                camera=-1 if found.cameras is None else identifier(str(found.cameras[row])),
                size=0,
                mtime_ns=0,
            )
            for row in rows
        ]
        yield arrow_batch(np.array(rows), values[start : start + BLOCK], records, model)
