"""CMC and mAP under the arguments and return values that several projects have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from dhcl_ops import ranking
from dhcl_ops.compat import _calls

_NAMES = {
    "distance": "distmat",
    "query_ids": "q_pids",
    "gallery_ids": "g_pids",
    "query_cameras": "q_camids",
    "gallery_cameras": "g_camids",
}


class Ranked(NamedTuple):
    """What torchreid's and fast-reid's functions return parts of."""

    cmc: np.ndarray[Any, Any]  # (length,) float32
    mean_ap: float
    average_precision: np.ndarray[Any, Any]  # (valid queries,) float64
    inverse_negative_penalty: np.ndarray[Any, Any]


def _numbers(query: Any, gallery: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Identities or cameras as integers; of others, such as names, equal ones get equal numbers."""
    pair = [v.numpy(force=True) if isinstance(v, torch.Tensor) else v for v in (query, gallery)]
    query, gallery = (np.asarray(values) for values in pair)
    if query.ndim == gallery.ndim == 1 and not all(v.dtype.kind == "i" for v in (query, gallery)):
        if query.dtype != gallery.dtype and all(v.dtype.kind in "iuO" for v in (query, gallery)):
            # NumPy would join signed and unsigned numbers as floats, which merge large ones.
            query, gallery = query.astype(object), gallery.astype(object)
        numbers = np.unique(np.concatenate([query, gallery]), return_inverse=True)[1]
        return numbers[: len(query)], numbers[len(query) :]
    return query, gallery


def evaluate(
    op: str,
    distmat: Any,
    ids: tuple[Any, Any],
    cameras: tuple[Any, Any],
    settings: ranking.Settings,
    names: dict[str, str],
) -> ranking.RankingMetrics:
    """:func:`dhcl_ops.evaluate_ranking` with NumPy's global random state; tensors come back.

    Args:
        op: the function that was called, which errors name.
        distmat: (Q, G), a tensor or what NumPy makes an array of.
        ids: (Q,) and (G,), what can be told apart.
        cameras: (Q,) and (G,).
        settings: of the evaluation; identity -1 is one like any other.
        names: what the function calls the arguments.
    """
    identities = ranking.Identities(*_numbers(*ids), *_numbers(*cameras))
    with _calls.as_called(op, "evaluate_ranking", **names):
        return ranking.evaluate_with_draws(
            _calls.tensor(op, names["distance"], distmat),
            identities,
            settings._replace(junk_id=None),
            np.random.randint,
        )


def evaluate_rank(
    op: str,
    distmat: Any,
    ids: tuple[Any, Any],
    cameras: tuple[Any, Any],
    max_rank: int,
    use_metric_cuhk03: bool = False,
) -> Ranked:
    """What torchreid's ``evaluate_rank`` and its relatives compute."""
    gallery = np.shape(distmat)[-1] if np.ndim(distmat) == 2 else max_rank
    if gallery < max_rank:
        max_rank = gallery
        print(f"Note: number of gallery samples is quite small, got {max_rank}")
    protocol = "cuhk03" if use_metric_cuhk03 else "market"
    settings = ranking.Settings(protocol=protocol, max_rank=max_rank, per_query=True)
    result = evaluate(op, distmat, ids, cameras, settings, _NAMES)
    precision, penalty, first = (
        values.numpy(force=True) if values is not None else np.zeros(0) for values in result[4:]
    )
    valid = first > 0
    length = _length(_numbers(*ids), _numbers(*cameras), valid, max_rank, use_metric_cuhk03)
    cmc = result.cmc[:length].numpy(force=True).astype(np.float32)
    return Ranked(cmc, result.mAP, precision[valid], penalty[valid])


def _length(
    ids: tuple[Any, Any],
    cameras: tuple[Any, Any],
    valid: np.ndarray[Any, Any],
    max_rank: int,
    single_shot: bool,
) -> int:
    """The length of torchreid's CMC: a list has no more ranks than entries are left in it.

    Where its lists differ in that, torchreid fails, and ``max_rank`` is kept.
    """
    (query_ids, gallery_ids), (query_cameras, gallery_cameras) = ids, cameras
    distinct, counts = np.unique(gallery_ids, return_counts=True)
    if single_shot:
        return min(max_rank, len(distinct))
    if len(gallery_ids) - counts.max() >= max_rank:
        return max_rank
    removed = query_ids[valid, None] == gallery_ids
    removed &= query_cameras[valid, None] == gallery_cameras
    left = len(gallery_ids) - removed.sum(1)
    return min(max_rank, int(left[0])) if (left == left[0]).all() else max_rank
