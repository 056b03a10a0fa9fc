"""Saved features without a model: pseudo-labels, re-ranked lists and metrics, and their files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dhcl.data.lists import matches_across_cameras
from dhcl.errors import ConfigError
from dhcl.files import write_atomic
from dhcl.inference.features import Features, common_numbers
from dhcl.metrics import RANKS, by_name, cameras_apart, check_ranks
from dhcl.words import csv_cell, show
from dhcl_ops import RankedLists, evaluate_ranking, rerank

__all__ = ["evaluate_saved", "write_labels", "write_lists"]

Progress = Callable[[str, int, int], None]


def write_labels(path: Path, column: str, names: Iterable[str], labels: torch.Tensor) -> None:
    """Write cluster labels (N,) as CSV, a line per image; whole, or not at all.

    Args:
        path: the file.
        column: what the names are, the first column's heading.
        names: N, of the images.
        labels: int64, -1 for an image in no cluster.
    """
    text = io.StringIO()
    # With quotes around all texts, so that those which hold another separator stay whole too.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow([column, "label"])
    pairs = zip(names, labels.tolist(), strict=True)
    writer.writerows([csv_cell(name), label] for name, label in pairs)
    write_atomic(path, text.getvalue().encode())


def write_lists(path: Path, lists: RankedLists, query: Features, gallery: Features) -> None:
    """Write ranked lists as ``.npz``: ``indices`` and ``distances`` (Q, k), whole, or not at all.

    ``query_paths`` and ``gallery_paths`` go with them where they are known.
    """
    arrays: dict[str, Any] = {
        "indices": lists.indices.numpy(),
        "distances": lists.distances.numpy(),
    }
    for name, side in (("query_paths", query), ("gallery_paths", gallery)):
        if side.paths is not None:
            arrays[name] = np.array(side.paths)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getbuffer())


def evaluate_saved(
    query: Features,
    gallery: Features,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    ap: Literal["hits", "trapezoid"] = "hits",
    ranks: Sequence[int] = RANKS,
    reranking: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Metrics of saved features, by the identities and cameras saved with them.

    Args:
        query, gallery: of one width, with identities.
        metric: ``cosine`` takes rows at length 1, ``euclidean`` as they are.
        ap: as of :func:`dhcl_ops.evaluate_ranking`.
        ranks: the k of which CMC(k) is given.
        reranking: ``k1``, ``k2`` and ``lambda_value`` of :func:`dhcl_ops.rerank`; None evaluates
            without it alone.
        progress: as of :func:`dhcl_ops.evaluate_ranking`.

    Returns:
        Metrics as of :func:`dhcl.metrics.by_name` in the row ``features`` and, with re-ranking,
        ``re-ranked``; and, where no match is left out for being in the query's own camera, a text
        that says why, else an empty one.

    Raises:
        ConfigError: no identities, cameras on one side alone, or a rank below 1.
        FeatureError: rows of zeros. ValueError: as of the ops.
    """
    check_ranks(ranks)
    labels = _both("ids", query, gallery, needed=True)
    cameras = _both("cameras", query, gallery)
    why = _kept_own_cameras(labels, cameras)
    if not why:
        labels += cameras_apart(*cameras)
    cosine = metric == "cosine"
    pair = (query.unit(), gallery.unit()) if cosine else (query.values, gallery.values)
    options: dict[str, Any] = {"ap": ap, "max_rank": max(ranks)}
    plain = evaluate_ranking(pair, *labels, **options, progress=progress)
    rows = {"features": by_name(plain, ranks)}
    if reranking is not None:
        distances = rerank(query.unit(), gallery.unit(), progress=progress, **reranking)
        rows["re-ranked"] = by_name(evaluate_ranking(distances, *labels, **options), ranks)
    return rows, why


def _kept_own_cameras(ids: list[torch.Tensor], cameras: list[torch.Tensor]) -> str:
    """Why matches in the query's own camera are not left out, or nothing if they are."""
    known = [column[column >= 0].unique() for column in cameras]
    if not all(len(names) for names in known) or not known:
        return "no cameras are known, so none is left out"
    if not torch.isin(*known).any():
        return "no camera of the queries is one of the gallery's, so none is left out"
    if not matches_across_cameras(*(column.numpy() for column in (*ids, *cameras))):
        return "none has one in another camera, so those within the camera count"
    return ""


def _both(
    what: Literal["ids", "cameras"], query: Features, gallery: Features, needed: bool = False
) -> list[torch.Tensor]:
    columns = [getattr(side, what) for side in (query, gallery)]
    for column, side in zip(columns, (query, gallery), strict=True):
        # Cameras of one side alone are of no use, and a mistake.
        if column is None and (needed or any(each is not None for each in columns)):
            raise ConfigError(
                f"{what}: there are none in {show(side.file)} (it holds: "
                f"{', '.join(map(show, side.keys)) or 'features alone'})"
            )
    return [] if columns[0] is None else common_numbers(*columns)
