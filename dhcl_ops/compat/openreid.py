"""open-reid (Xiao, 2017; Cysu/open-reid), whose metrics SpCL and its descendants carry.

``cmc`` and ``mean_ap`` are those of ``reid.evaluation_metrics``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dhcl_ops import ranking
from dhcl_ops.compat import _ranking

__all__ = ["cmc", "mean_ap"]

_NAMES = {
    "distance": "distmat",
    "query_cameras": "query_cams",
    "gallery_cameras": "gallery_cams",
    "max_rank": "topk",
}


def evaluated(
    op: str,
    distmat: Any,
    ids: tuple[Any, Any],
    cameras: tuple[Any, Any],
    settings: ranking.Settings,
) -> ranking.RankingMetrics:
    """What ``cmc`` and ``mean_ap`` return parts of.

    Without identities the i-th query is the i-th gallery image, and without cameras all queries are
    from one and the gallery from another, as in open-reid.
    """
    queries, gallery = np.shape(distmat) if np.ndim(distmat) == 2 else (0, 0)
    fill = np.arange(queries), np.arange(gallery)
    ids = fill[0] if ids[0] is None else ids[0], fill[1] if ids[1] is None else ids[1]
    cameras = (
        np.zeros(queries, np.int64) if cameras[0] is None else cameras[0],
        np.ones(gallery, np.int64) if cameras[1] is None else cameras[1],
    )
    return _ranking.evaluate(op, distmat, ids, cameras, settings, _NAMES)


def cmc(
    distmat: Any,
    query_ids: Any = None,
    gallery_ids: Any = None,
    query_cams: Any = None,
    gallery_cams: Any = None,
    topk: int = 100,
    separate_camera_set: bool = False,
    single_gallery_shot: bool = False,
    first_match_break: bool = False,
) -> np.ndarray[Any, Any]:
    """``cmc`` of open-reid: the CMC (topk,) as float64.

    Gallery entries of the query's identity and camera are removed. Entries of equal distance are
    ranked by index, where open-reid leaves their order open.

    Args:
        distmat: (Q, G) float array or tensor.
        query_ids, gallery_ids: (Q,) and (G,) identities; by default the numbers of the rows.
        query_cams, gallery_cams: (Q,) and (G,) cameras; by default all differ.
        topk: length of the CMC.
        separate_camera_set: remove all gallery entries of the query's camera.
        single_gallery_shot: draw one gallery image of each identity, ten times, with NumPy's global
            random state, in open-reid's order.
        first_match_break: look at the first right match only. Otherwise each counts with an equal
            share, at the number of wrong entries before it. With ``single_gallery_shot`` there is
            one match, and this changes nothing; in open-reid it makes the result ten times as
            large.

    Raises:
        TypeError, ValueError: see :func:`dhcl_ops.evaluate_ranking`; no query with a right match
            is a ValueError, where open-reid raises RuntimeError.
    """
    settings = ranking.Settings(
        protocol="cuhk03" if single_gallery_shot else "market",
        max_rank=topk,
        separate_cameras=separate_camera_set,
        every_match=not (first_match_break or single_gallery_shot),
    )
    ids, cameras = (query_ids, gallery_ids), (query_cams, gallery_cams)
    return evaluated("cmc", distmat, ids, cameras, settings).cmc.numpy(force=True)


def mean_ap(
    distmat: Any,
    query_ids: Any = None,
    gallery_ids: Any = None,
    query_cams: Any = None,
    gallery_cams: Any = None,
) -> float:
    """``mean_ap`` of open-reid: the mean average precision.

    Average precision is the mean of the precision at each right match, which scikit-learn's
    ``average_precision_score`` is since version 0.19. Entries of equal distance are ranked by
    index, where scikit-learn counts them at once.

    Args:
        distmat, query_ids, gallery_ids, query_cams, gallery_cams: as in :func:`cmc`.

    Raises:
        TypeError, ValueError: as :func:`cmc`.
    """
    ids, cameras = (query_ids, gallery_ids), (query_cams, gallery_cams)
    return evaluated("mean_ap", distmat, ids, cameras, ranking.Settings()).mAP
