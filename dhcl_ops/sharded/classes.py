"""Which class an image is in: the clusters of all ranks, then one for each un-clustered image."""

from __future__ import annotations

import torch

from dhcl_ops.sharded.shards import Shards

__all__ = ["classes_of_all", "clusters_and_outliers"]


def clusters_and_outliers(shards: Shards, labels: torch.Tensor) -> tuple[int, int]:
    """From own labels, -1 for un-clustered images: one more than the highest of all ranks, and how
    many are un-clustered on the ranks before."""
    highest = labels.max() if len(labels) else labels.new_tensor(-1)
    facts = torch.stack([highest, (labels < 0).sum()])[None]
    with shards.stage("labels"):
        every = shards.gather_shares(facts, [1] * shards.world).tolist()
    return max(fact[0] for fact in every) + 1, sum(fact[1] for fact in every[: shards.rank])


def classes_of_all(
    shards: Shards, labels: torch.Tensor, clusters: int, before: int, lengths: list[int]
) -> torch.Tensor:
    """The classes (N,) int32 of the images of all ranks, which have so many each.

    ``clusters`` and ``before`` are what :func:`clusters_and_outliers` found.
    """
    outlier = labels < 0
    own = torch.where(outlier, clusters + before - 1 + outlier.cumsum(0), labels)
    with shards.stage("labels"):
        return shards.gather_shares(own.int(), lengths)
