"""Neighbour lists that mix a row's own camera with the others in fixed shares.

The lists of Chen et al. (CVPR 2024, "CA-Jaccard"), by :func:`dhcl_ops.knn` within and across
cameras.
"""

from __future__ import annotations

import torch

from dhcl_ops import _arrays, _checks
from dhcl_ops._progress import Progress
from dhcl_ops.knn import Neighbours, knn

__all__ = ["camera_neighbours"]


def mixed(here: int, k: int) -> torch.Tensor:
    """The order (k,) of a list of ``here`` rows of the own camera, followed by k - here others.

    Both are spread evenly over the merged list, so that its first entries, however many a caller
    takes, hold own and other cameras in the same shares.
    """
    way = torch.cat([torch.arange(here) / here, (torch.arange(k - here) + 0.5) / (k - here)])
    return way.argsort(stable=True)


@_arrays.takes_arrays("features", "cameras")
def camera_neighbours(
    features: torch.Tensor,
    cameras: torch.Tensor,
    k: int,
    own: int,
    *,
    progress: Progress | None = None,
) -> Neighbours:
    """Neighbour lists with a fixed share from a row's own camera.

    Where cameras differ much, the nearest rows are mostly of the row's own camera and clusters
    form by camera. Here each list has the ``own`` nearest rows of the same camera, the row itself
    first, and the k - own nearest of all other cameras, evenly mixed. Given to
    :func:`dhcl_ops.jaccard_graph` or :func:`dhcl_ops.cluster` as ``ranks``, mutual neighbours are
    those within and across cameras apart, as in Chen et al. (CVPR 2024, "CA-Jaccard").

    A row whose camera, or whose other cameras, have too few rows gets more of the other kind.

    Args:
        features: (N, d), as in :func:`knn`.
        cameras: (N,) int64, any numbers.
        k: length of a list, the row itself included, in [1, N].
        own: how many of them are of the row's own camera, itself included, in [1, k].
        progress: as in :func:`knn`.

    Returns:
        :class:`Neighbours`; the similarities of a list do not descend.

    Raises:
        TypeError, ValueError: as :func:`knn`; cameras of another shape, dtype or device.
    """
    op = "camera_neighbours"
    _checks.tensor(op, "features", features)
    _checks.rank(op, "features", features, 2)
    _checks.tensor(op, "cameras", cameras)
    _checks.dtype(op, "cameras", cameras, (torch.int64,))
    _checks.shape(op, "cameras", cameras, (len(features),), "one per feature")
    _checks.same_device(op, features=features, cameras=cameras)
    k = _checks.integer(op, "k", k, 1)
    own = _checks.integer(op, "own", own, 1)
    if not own <= k <= len(features):
        raise ValueError(
            f"{op}: own, k and the number of features must not descend "
            f"(got own={own}, k={k}, N={len(features)})"
        )
    n = len(features)
    similarities = torch.empty(n, k, device=features.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=features.device)
    uncertified = torch.zeros((), dtype=torch.int64, device=features.device)
    for camera in cameras.unique().tolist():
        inside = (cameras == camera).nonzero().squeeze(1)
        outside = (cameras != camera).nonzero().squeeze(1)
        here = max(min(own, len(inside)), k - len(outside))
        near = knn(features[inside], here, progress=progress)
        far = knn(features[outside], k - here, queries=features[inside], progress=progress)
        order = mixed(here, k).to(features.device)
        indices[inside] = torch.cat([inside[near.indices], outside[far.indices]], 1)[:, order]
        similarities[inside] = torch.cat([near.similarities, far.similarities], 1)[:, order]
        uncertified += near.uncertified + far.uncertified
    return Neighbours(similarities, indices, uncertified)
