"""Neighbours and pseudo-labels of rows that lie on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dhcl_ops import _checks, _csr
from dhcl_ops._csr import Rows
from dhcl_ops._products import full_precision
from dhcl_ops._progress import Progress
from dhcl_ops._ties import warn_of_tie
from dhcl_ops.clustering import (
    Clustering,
    Radii,
    Stages,
    check_together,
    graph_radius,
    radii_of,
    self_paced_labels,
)
from dhcl_ops.defaults import SPCL
from dhcl_ops.knn import Neighbours
from dhcl_ops.reciprocal import Convention, list_width, lower_by_products
from dhcl_ops.sharded import graph
from dhcl_ops.sharded.camera_neighbours import check_cameras, search_by_camera
from dhcl_ops.sharded.components import dbscan
from dhcl_ops.sharded.neighbours import rows_of, search
from dhcl_ops.sharded.shards import Shards, agreed_width, piece_rows

__all__ = ["cluster", "knn"]


@torch.no_grad()
def knn(
    features: torch.Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    traffic: dict[str, int] | None = None,
) -> Neighbours:
    """:func:`dhcl_ops.knn` of rows that lie on several ranks, to the bit.

    Every rank calls it with its own rows; row numbers go on from rank to rank. Blocks of rows visit
    other ranks, each pair of rows of two ranks meets once, and no rank ever holds more than its own
    rows and two pieces of others, of 4 MiB each, or 256 MiB on a GPU.

    Args:
        features: (n, d) this rank's rows, any number of them; dtypes as in :func:`dhcl_ops.knn`.
        k: neighbours per row, the row itself included, in [0, N], N being the rows of all ranks.
        group: process group; by default all processes.
        progress: called as ``progress(stage, rows_done, rows_total)``.
        traffic: a dictionary that takes the bytes this rank has sent to others, by stage.

    Returns:
        :class:`dhcl_ops.Neighbours` of this rank's rows: similarities (n, k), indices (n, k) int64
        among all rows, and how many searches of a row in a block were repeated, on all ranks.

    Raises:
        TypeError, ValueError: as :func:`dhcl_ops.knn`, on all ranks, also where one rank's rows are
            wrong; ranks that do not agree in an argument or in the version of torch.
        RuntimeError: without an initialised process group.
        PeerError: another rank was lost or did not answer in the group's time.
    """
    op = "sharded.knn"

    def check() -> torch.Tensor:
        _checks.integer(op, "k", k, 0)
        return rows_of(op, features)

    shards = Shards(op, group, check, agreed_width(features, k=k), traffic)
    if k > shards.total:
        raise ValueError(
            f"{op}: k must be at most the number of features (got k={k}, N={shards.total})"
        )
    with shards.stage("neighbours"):
        return search(shards.own, k, shards, progress)


def encoded(
    shards: Shards,
    given: tuple[torch.Tensor | None, torch.Tensor] | None,
    widths: tuple[int, int, int],
    zhong: bool,
    progress: Progress | None,
    timer: Stages,
) -> tuple[Rows, torch.Tensor | None, int]:
    """Own weighted sets after the query expansion, and what they are made with.

    Args:
        shards: holds this rank's rows.
        given: their lists, similarities where there are any and indices; None to search for them.
        widths: as of ``list_width``.
        zhong: whether squared distances are divided by the largest one of each row.
        progress: called as ``progress(stage, rows_done, rows_total)``.
        timer: takes the seconds of each stage.

    Returns:
        The sets, the (n,) largest squared distances if ``zhong``, and the uncertified rows of all
        ranks.
    """
    k, half, k2 = widths
    features = shards.own
    uncertified = 0
    similarities: torch.Tensor | None
    if given is None:
        with shards.stage("neighbours"):
            found = search(features, k, shards, progress)
        similarities, ranks = found.similarities, found.indices.int()
        uncertified = int(found.uncertified)
        del found
    else:
        similarities, ranks = given
    timer("neighbours")
    scale = None
    if zhong:
        with shards.stage("largest distances"):
            least = torch.finfo(torch.float32).tiny
            scale = largest_squares(features, shards).clamp(min=least)
        timer("largest distances")
    with shards.stage("sets"):
        back = graph.positions(ranks, shards)
        sets = graph.expanded_sets(ranks, back, half, shards, progress)
        del back
    with shards.stage("weights"):
        weights = graph.feature_weights(features, ranks, similarities, sets, scale, shards)
        del similarities, sets
    timer("sets and weights")
    with shards.stage("query expansion"):
        rows = graph.expanded_weights(ranks, weights, k2, shards, progress)
    timer("query expansion")
    return rows, scale, uncertified


def largest_squares(features: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Of each own row, the largest squared distance to any row of all ranks."""
    width = features.shape[1]
    least = features.new_full((len(features),), torch.inf)

    def meet(mine: slice, others: torch.Tensor) -> torch.Tensor:
        theirs = features.new_full((len(others),), torch.inf)
        for begin in range(mine.start, mine.stop, 1024):
            end = min(begin + 1024, mine.stop)
            lower_by_products(features[begin:end], others, least[begin:end], theirs)
        return theirs

    def take(away: slice, found: list[torch.Tensor]) -> None:
        least[away] = torch.minimum(least[away], found[0])

    with full_precision(features.device):
        meet(slice(0, len(features)), features)
        size = piece_rows(4 * width, features.device)
        visits = shards.visits(
            size,
            lambda rank, begin, end: [(end - begin, width)],
            lambda begin, end: [features[begin:end]],
            take,
        )
        for visit in visits:
            visit.found.append(meet(visit.mine, visit.tables[0]))
    return 2.0 - 2.0 * least


def _given_lists(
    op: str, ranks: Neighbours | torch.Tensor, width: int, shards: Shards
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Own lists that a caller gives, checked: similarities where there are any, and indices."""

    def check() -> torch.Tensor:
        similarities, indices = ranks[:2] if isinstance(ranks, tuple) else (None, ranks)
        _checks.tensor(op, "ranks", indices)
        _checks.rank(op, "ranks", indices, 2)
        _checks.dtype(op, "ranks", indices, (torch.int64, torch.int32))
        if len(indices) != shards.rows or indices.shape[1] < width:
            raise ValueError(
                f"{op}: ranks must have {shards.rows} rows and at least {width} columns "
                f"(got shape {tuple(indices.shape)})"
            )
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < shards.total):
            raise ValueError(f"{op}: ranks must be in [0, {shards.total})")
        if similarities is not None:
            _checks.shape(
                op, "ranks.similarities", similarities, tuple(indices.shape), "as its indices"
            )
        return indices

    # Agreed on by all ranks, so that a wrong list on one of them is refused on all.
    Shards(op, shards.group, check, {})
    if isinstance(ranks, tuple):
        similarities = ranks[0][:, :width].float().contiguous()
        return similarities, ranks[1][:, :width].int().contiguous()
    return None, ranks[:, :width].int().contiguous()


@torch.no_grad()
def cluster(
    features: torch.Tensor,
    *,
    k1: int = SPCL.k1,
    k2: int = SPCL.k2,
    eps: float = SPCL.eps,
    min_samples: int = SPCL.min_samples,
    convention: Convention = "spcl",
    ranks: Neighbours | torch.Tensor | None = None,
    cameras: torch.Tensor | None = None,
    k1_own: int = 0,
    self_paced: bool = False,
    loose: bool = False,
    eps_gap: float = SPCL.eps_gap,
    graph_eps: float | None = None,
    threshold: float | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    traffic: dict[str, int] | None = None,
) -> Clustering:
    """:func:`dhcl_ops.cluster` of rows that lie on several ranks: the labels of one process.

    Neighbours, graph and labels have the bits of one process, for any number of ranks and shares.
    (``convention="zhong"`` divides by each row's largest distance, which is as exact as a matrix
    product: there a pair at eps to rounding may fall on the other side.) Features are never
    gathered. Of each row every rank holds at most its labels, and a pair of numbers for DBSCAN.

    Args:
        features: (n, d) this rank's rows of norm 1, any number of them.
        ranks: neighbour lists (n, >= k) of own rows among all rows, best first, or what
            :func:`knn` gave.
        cameras: (n,) int64 of own rows, with ``k1_own``.
        k1, k2, eps, min_samples, convention, k1_own, self_paced, loose, eps_gap: as in
            :func:`dhcl_ops.cluster`, equal on all ranks.
        graph_eps, threshold: as there, equal on all ranks. A larger graph has more pairs that are
            found on a visit and go home; DBSCAN sends as much as without.
        group, progress, traffic: as in :func:`knn`.

    Returns:
        :class:`dhcl_ops.Clustering`: labels (n,) and the graph's lines (n, N) of own rows; the
        numbers of clusters and outliers, and sizes, of all ranks. Without the sizes
        ``longest_column`` and ``index_work``, since no rank has an index of all rows.

    Raises:
        TypeError, ValueError, RuntimeError, PeerError: as :func:`knn` and
            :func:`dhcl_ops.cluster`.
    """
    op = "sharded.cluster"
    radii: Radii
    widest: float

    settings = agreed_width(
        features, k1=k1, k2=k2, eps=eps, min_samples=min_samples, convention=convention,
        self_paced=self_paced, loose=loose, eps_gap=eps_gap, graph_eps=graph_eps,
        threshold=threshold, ranks=ranks is not None, cameras=cameras is not None, k1_own=k1_own,
    )  # fmt: skip

    def check() -> torch.Tensor:
        nonlocal radii, widest
        radii = radii_of(op, eps, eps_gap, self_paced, loose)
        widest = graph_radius(op, radii, graph_eps)
        rows = _checks.unit_rows(op, "features", features)
        list_width(op, len(rows), k1, k2, convention)
        _checks.integer(op, "min_samples", min_samples, 1)
        check_together(op, k1_own, cameras, ranks, self_paced, threshold)
        if k1_own and cameras is not None:
            check_cameras(op, cameras, rows)
        return rows

    shards = Shards(op, group, check, settings, traffic)
    widths = list_width(op, shards.total, k1, k2, convention)
    timer = Stages(shards.device)
    if cameras is not None and (own := min(k1_own, k1, shards.total)):
        with shards.stage("neighbours"):
            k = min(k1, shards.total)
            ranks = search_by_camera(shards.own, cameras, k, own, shards, progress)
    given = None if ranks is None else _given_lists(op, ranks, widths[0], shards)
    zhong = convention == "zhong"
    rows, _, uncertified = encoded(shards, given, widths, zhong, progress, timer)
    for radius in radii:
        if radius is not None:
            warn_of_tie(op, radius, k2)
    with shards.stage("pairs"):
        lines = graph.eps_graph(rows, widest, shards, progress)
    timer("pairs")
    known = {"set_entries": len(rows.columns), "uncertified_rows": uncertified}
    return _clustered(lines, known, radii, min_samples, threshold, shards, timer)


def _clustered(
    lines: Rows,
    known: dict[str, int],
    radii: Radii,
    min_samples: int,
    threshold: float | None,
    shards: Shards,
    timer: Stages,
) -> Clustering:
    """From own lines of the graph to labels; self-paced if ``radii`` has a tight one.

    ``known`` has the sizes of what came before, the own ``set_entries`` among them.
    """
    with shards.stage("clusters"):
        several = [
            dbscan(lines, radius, min_samples, shards) for radius in radii if radius is not None
        ]
        if radii.tight is None:
            labels = several[0]
        else:
            # Overlaps count rows of all ranks: the labels, of all that there is, are gathered.
            labels, threshold = _self_paced(shards, several, threshold)
        clusters, outliers, sizes = _counts(labels, lines, known["set_entries"], shards)
    timer("clusters")
    return Clustering(
        labels=labels,
        num_clusters=clusters,
        num_outliers=outliers,
        seconds=timer.seconds,
        sizes=known | sizes,
        threshold=threshold,
        graph=_csr.sparse_tensor(*lines, shards.total),
        loose_labels=None if radii.loose is None else several[-1],
    )


def _counts(
    labels: torch.Tensor, lines: Rows, set_entries: int, shards: Shards
) -> tuple[int, int, dict[str, int]]:
    """Clusters, outliers and sizes, of all ranks."""
    totals = torch.tensor(
        [[int((labels < 0).sum()), len(lines.values), set_entries]], device=shards.device
    )
    highest = labels.max()[None] if len(labels) else totals.new_full((1,), -1)
    clusters = int(shards.gather(highest).max()) + 1
    outliers, pairs, entries = shards.gather(totals).sum(0).tolist()
    return clusters, outliers, {"pairs": pairs, "set_entries": entries}


def _self_paced(
    shards: Shards, several: list[torch.Tensor], threshold: float | None
) -> tuple[torch.Tensor, float | None]:
    every = shards.gather(torch.stack(several, 1).int()).long()
    tight, middle, loose = (column.contiguous() for column in every.unbind(1))
    chosen = self_paced_labels(middle, tight, loose, threshold)
    return chosen.labels[shards.begin : shards.end].clone(), chosen.threshold
