"""How good a ranking or a clustering is: mAP, CMC, mINP and agreement by name, and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.errors import ConfigError
from dhcl_ops import RankingMetrics

__all__ = ["RANKS", "agreement", "by_name", "cameras_apart", "check_ranks", "table"]

RANKS = (1, 5, 10)
"""The ranks k of which tables show CMC(k), where nobody asks for others."""


def cameras_apart(
    query: NDArray[Any] | torch.Tensor, gallery: NDArray[Any] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cameras (Q,) and (G,) for :func:`dhcl_ops.evaluate_ranking`, which drops own-camera matches.

    Unknown cameras, all negative numbers, become -1 in queries and -2 in the gallery: two images of
    unknown cameras must not be taken for images of one camera.
    """
    one, other = torch.as_tensor(query), torch.as_tensor(gallery)
    return torch.where(one < 0, -1, one), torch.where(other < 0, -2, other)


def check_ranks(ranks: Sequence[int]) -> None:
    """Raise :class:`dhcl.errors.ConfigError` unless there are ranks, all from 1 to a million."""
    if not ranks or min(ranks) < 1 or max(ranks) > 1_000_000:
        got = " ".join(map(str, ranks)) or "none"
        raise ConfigError(f"ranks: must be numbers from 1 to 1000000 (got {got})")


def by_name(metrics: RankingMetrics, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """``mAP``, ``rank1``, ``rank5``, ``rank10``, ``mINP`` in [0, 1] and the number of ``queries``.

    Args:
        metrics: of CMC up to the largest of the ranks at least.
        ranks: the k of ``rankK``, from 1.
    """
    found = {f"rank{k}": float(metrics.cmc[k - 1]) for k in ranks}
    return {"mAP": metrics.mAP, **found, "mINP": metrics.mINP, "queries": metrics.num_valid}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by name, in percent, as a Markdown table; the ranks are those of the first row."""
    first = next(iter(rows.values()))
    columns = ("mAP", *(name for name in first if re.fullmatch(r"rank\d+", name)), "mINP")
    width = max(len(name) for name in rows)
    lines = [
        f"| {'':<{width}} | " + " | ".join(f"{c:>6}" for c in columns) + " |",
        f"|{'-' * (width + 2)}|" + "|".join("-------:" for _ in columns) + "|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{100 * row[c]:6.1f}" for c in columns)
        lines.append(f"| {name:<{width}} | {cells} |")
    return "\n".join(lines)


def agreement(
    identities: NDArray[Any] | torch.Tensor, labels: NDArray[Any] | torch.Tensor
) -> dict[str, float]:
    """How well clusters agree with identities: ``ari``, ``nmi`` and, with clusters, ``purity``.

    ``ari`` is the adjusted Rand index (Hubert and Arabie, 1985), 1 for equal partitions and about 0
    for random ones. ``nmi`` is the mutual information over the mean of the two entropies. In both
    an image in no cluster is a cluster of its own. ``purity`` is the share of the images in
    clusters that are of the commonest identity of theirs. The values are those of scikit-learn,
    which commands on saved features do not wait for.

    Args:
        identities: (N,) integers; images of negative ones do not count.
        labels: (N,) integers, -1 for an image in no cluster.

    Returns:
        Values by name; nothing where no identity is known.
    """
    ids, found = np.asarray(identities), np.asarray(labels)
    ids, found = ids[ids >= 0], found[ids >= 0].astype(np.int64)
    if not len(ids):
        return {}
    alone = found < 0
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    ids, found = (np.unique(each, return_inverse=True)[1] for each in (ids, found))
    pairs, cells = np.unique(ids * (found.max() + 1) + found, return_counts=True)
    sizes = np.bincount(ids), np.bincount(found)
    scores = {"ari": _adjusted_rand(cells, *sizes), "nmi": _mutual_information(cells, *sizes)}
    if not alone.all():
        largest = np.zeros(len(sizes[1]), np.int64)
        np.maximum.at(largest, pairs % len(largest), cells)
        clusters = np.unique(found[~alone])
        scores["purity"] = float(largest[clusters].sum() / sizes[1][clusters].sum())
    return scores


def _adjusted_rand(cells: NDArray[Any], ids: NDArray[Any], clusters: NDArray[Any]) -> float:
    """From the sizes of the groups that two partitions have in common, and of their own groups."""
    together, of_ids, of_clusters = (
        int((sizes * (sizes - 1) // 2).sum()) for sizes in (cells, ids, clusters)
    )
    images = int(ids.sum())
    by_chance = of_ids * of_clusters / max(images * (images - 1) // 2, 1)
    most = (of_ids + of_clusters) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)


def _mutual_information(cells: NDArray[Any], ids: NDArray[Any], clusters: NDArray[Any]) -> float:
    """Normalised, from the same sizes."""
    joint, of_ids, of_clusters = (
        float(-(shares * np.log(shares)).sum())
        for shares in (sizes / ids.sum() for sizes in (cells, ids, clusters))
    )
    mean = (of_ids + of_clusters) / 2
    return 1.0 if mean == 0 else max((of_ids + of_clusters - joint) / mean, 0.0)
