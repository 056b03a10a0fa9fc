"""Approximate search in a table of Lance: its index of the features, and how good that is.

The index is an inverted file whose entries are rounded to 8 bits (``IVF_SQ``): rows lie in
partitions around the centres of k-means, and a query looks into the nearest ones. What it proposes
are candidates alone. Their features are read, checked and compared here, so that every similarity
is that of exact search; what may be missing is a row that was not proposed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhcl.inference.gallery.head import Approximate
from dhcl.inference.gallery.schema import FEATURE_COLUMNS, checked_features
from dhcl.inference.gallery.store import EVERYTHING, Hits, Store, Where
from dhcl.inference.gallery.tables import ROWS, expression, whole_sum
from dhcl.inference.search import Backend, nearest
from dhcl.stored import Damaged
from dhcl.words import show

__all__ = ["build", "check_files", "propose", "sums_of_files"]

# Of the index in its table.
_NAME = "nearest"

# Partitions that a query looks into, at least; Lance takes more where a filter leaves few rows.
_PROBES = 20

# Candidates beyond twice the wanted ones, since rounding to 8 bits changes their order.
_MARGIN = 16

# What recall is measured with: so many of the gallery's rows, and so many neighbours of each.
_QUERIES, _TOPK = 200, 20


def build(
    table: Any, now: Store, progress: Callable[[str, int, int], None] | None = None
) -> Approximate:
    """Make the index of a table, in the place of one that is there, and measure its recall.

    Args:
        table: of Lance; it is at the version with the index afterwards.
        now: the store that has the same rows.
        progress: as of :meth:`dhcl.inference.gallery.store.Store.nearest`, of the exact search.

    Returns:
        How good it is; its files are still to be named.
    """
    parts = [batch["row"].to_numpy(zero_copy_only=False) for batch in now.scan(["row"])]
    numbers = np.concatenate(parts)
    table.create_index(
        "feature",
        "IVF_SQ",
        name=_NAME,
        metric="cosine",
        replace=True,
        num_partitions=max(1, round(math.sqrt(len(numbers)))),
    )
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), _QUERIES)).astype(np.int64)
    chosen = numbers[places]
    width = now.about.width
    _, features = checked_features(now.take(chosen, FEATURE_COLUMNS), width)
    query = torch.from_numpy(np.array(features))
    exact = now.nearest(query, _TOPK + 1, backend="torch", progress=progress)
    found = [propose(table, width, one, _TOPK + 1, backend="torch") for one in query]
    shares = [
        _recall(int(own), Hits(*(values[place] for values in exact)), found[place])
        for place, own in enumerate(chosen)
    ]
    return Approximate(recall=sum(shares) / len(shares), queries=len(shares), files={})


def _recall(own: int, exact: Hits, found: Hits) -> float:
    """Of the nearest rows of a row but itself, the share that was found; equals count alike."""
    others = found.similarities[found.rows != own]
    wanted = int((exact.rows != own).sum())
    if not wanted:
        return 1.0
    hits = int((others >= exact.similarities[-1]).sum())
    return min(hits, wanted) / wanted


def propose(
    table: Any,
    width: int,
    query: torch.Tensor,
    topk: int,
    where: Where = EVERYTHING,
    backend: Backend = "auto",
) -> Hits:
    """The best (k,) of what the index proposes for a query (d,), and of rows that came later.

    Raises:
        Damaged: the feature of a candidate is not as it was written.
    """
    near = {
        "column": "feature",
        "q": query.numpy(),
        "k": 2 * topk + _MARGIN,
        "minimum_nprobes": _PROBES,
    }
    found = table.to_table(
        columns=list(FEATURE_COLUMNS), filter=expression(where), prefilter=True, nearest=near
    )
    blocks = [
        checked_features(batch, width)
        for batch in found.sort_by("row").combine_chunks().to_batches()
    ]
    best = nearest(query[None], blocks, topk, backend=backend)
    return Hits(best.rows[0], best.similarities[0])


def sums_of_files(folder: Path, table: Any, known: Mapping[str, int]) -> dict[str, int]:
    """CRC-32 of the files of a table's index, by their names below the folder.

    They never change, so those of ``known`` are not read again.
    """
    sums = {}
    for index in table.describe_indices():
        for segment in index.segments:
            home = f"{ROWS}/_indices/{segment.uuid}"
            for file in sorted(os.listdir(folder / home)):
                name = f"{home}/{file}"
                sums[name] = known[name] if name in known else whole_sum(folder / name)
    return sums


def check_files(folder: Path, sums: Mapping[str, int]) -> None:
    """That the index of a table is as it was written.

    Raises:
        Damaged: it is not. OSError: it can't be read.
    """
    for name, expected in sums.items():
        parts = Path(name).parts
        if len(parts) != 4 or parts[:2] != (ROWS, "_indices") or ".." in parts:
            raise Damaged(f"{show(name)} is no file of a table's index")
        if whole_sum(folder / name) != expected:
            raise Damaged(f"{show(name)} is not as it was written: its checksum is another")
