"""What is drawn over the epochs of a run, from its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dhcl.training.logs import flat
from dhcl.training.record import Record

__all__ = ["CURVES", "Curves", "epoch_series", "seconds_of"]


class Curves(NamedTuple):
    """Lines of one chart: their names, each with its key in the log."""

    key: str
    title: str
    text: str
    unit: str
    lines: Mapping[str, str]


CURVES = (
    Curves(
        "ranking",
        "mAP and rank-1",
        "On the test images. Evaluations along the way are looked at, not used; the last epoch is "
        "the result.",
        "%",
        {"mAP": "observed.mAP", "rank-1": "observed.rank1"},
    ),
    Curves(
        "clusters",
        "Clusters and outliers",
        "Pseudo-labels of each epoch. Outliers are images in no cluster.",
        "",
        {"clusters": "clusters", "outliers": "outliers"},
    ),
    Curves(
        "agreement",
        "Clusters against identities",
        "Adjusted Rand index and normalised mutual information, 100 % where they agree. Outliers "
        "count as clusters of one.",
        "%",
        {"ARI": "observed.ari", "NMI": "observed.nmi"},
    ),
    Curves(
        "loss",
        "Loss",
        "Mean over the steps of an epoch: the whole, and its parts before their weights; a part "
        "without weight is 0.",
        "",
        {"loss": "loss", "over prototypes": "prototype_loss", "over instances": "instance_loss"},
    ),
    Curves(
        "clamp",
        "Clamped rows",
        "Share of rows whose debiased negative mass came out below its lower bound; without "
        "debiasing (kappa 0) there are none. Near 100 % for good: kappa is too large.",
        "%",
        {"over prototypes": "clamped", "over instances": "instance_clamped"},
    ),
)


def epoch_series(record: Record, key: str) -> dict[int, float]:
    """A value of the log by epoch, from 1; test metrics with those of the last epoch."""
    values = {}
    for entry in record.log:
        value = flat(entry).get(key)
        if isinstance(value, (int, float)):
            values[entry["epoch"] + 1] = float(value)
    name = key.removeprefix("observed.")
    if name != key and name in record.last:
        values[int(record.last["epoch"]) + 1] = float(record.last[name])
    return values


def seconds_of(record: Record) -> float:
    """Seconds of all epochs in the log."""
    return float(sum(sum(e.get("seconds", {}).values()) for e in record.log))
