"""What a report shows, as numbers: clusters, ranked lists, similarities, cameras, a map.

Nothing here knows of HTML. Image numbers are positions in the image lists of the data set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data import ImageList, ReIDData
from dhcl.metrics import cameras_apart
from dhcl.training.evaluation import WITHIN_CAMERA
from dhcl.training.record import Record
from dhcl.training.results import Points, Results, members
from dhcl_ops import evaluate_ranking

__all__ = [
    "Cluster",
    "Findings",
    "Limits",
    "Map",
    "RankedList",
    "Retrieval",
    "Similarities",
    "camera_matrix",
    "choose_clusters",
    "choose_queries",
    "draw_map",
    "look",
    "rank_lists",
    "similarities",
]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Bounds of what is computed, whatever the size of the data.
_SIMILARITY_QUERIES = 500
_SIMILARITY_GALLERY = 10_000
_MATRIX_CAMERAS = 24


@dataclass(frozen=True)
class Limits:
    """How much of everything is shown."""

    queries: int = 10  # of the best, the median and the worst each
    topk: int = 10  # of a ranked list
    clusters: int = 8  # of a kind
    members: int = 14  # of a cluster
    outliers: int = 60


@dataclass(frozen=True)
class Cluster:
    """A cluster of pseudo-labels.

    Attributes:
        label: its pseudo-label.
        size: images in it.
        cameras: known cameras in it.
        ids: known identities in it.
        purity: share of the commonest identity among its images of known identity; NaN if none is.
        main_id: that identity, -1 if none is known.
        kinds: why it is shown.
        shown: numbers of some of its images, spread over identities and cameras.
    """

    label: int
    size: int
    cameras: int
    ids: int
    purity: float
    main_id: int
    kinds: tuple[str, ...]
    shown: tuple[int, ...]


@dataclass(frozen=True)
class RankedList:
    """What the gallery gives for a query, junk and its own camera's images of it removed.

    Attributes:
        query: its number.
        kind: ``best``, ``median`` or ``worst``, by average precision.
        ap: average precision.
        first: rank of the first right match, from 1.
        gallery: numbers of the first images.
        similarity: (k,) of these.
        right: (k,) whether they show the query's identity.
    """

    query: int
    kind: str
    ap: float
    first: int
    gallery: tuple[int, ...]
    similarity: tuple[float, ...]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class Similarities:
    """Histograms of cosine similarities between queries and gallery.

    Attributes:
        edges: (b + 1,) of the bins.
        positive, negative: (b,) pairs of the same identity and of different ones.
        across: whether only pairs of different cameras count; else cameras are not known.
        mean_positive, mean_negative: mean similarities.
    """

    edges: Floats
    positive: Integers
    negative: Integers
    across: bool
    mean_positive: float
    mean_negative: float


@dataclass(frozen=True)
class Retrieval:
    """How the test images are found.

    Attributes:
        ap: (Q,) average precision, NaN for queries without a right match.
        mAP, rank1: over the others.
        lists: of some queries.
        similarities: None if there are no pairs.
        cameras: numbers of the cameras of the matrix.
        matrix: (C, C) mAP of queries of a camera against the gallery of another; NaN where there is
            nothing to find.
    """

    ap: Floats
    mAP: float
    rank1: float
    lists: tuple[RankedList, ...]
    similarities: Similarities | None
    cameras: Integers
    matrix: Floats


@dataclass(frozen=True)
class Map:
    """Rows of the bank, or features, in the plane.

    Attributes:
        images: (n,) numbers of the training images.
        xy: (n, 2).
        total: rows there are.
        extracted: features of the model instead of rows of the bank.
    """

    images: Integers
    xy: Floats
    total: int
    extracted: bool


@dataclass
class Findings:
    """Everything a report shows of a run; what could not be found has a reason in ``missing``."""

    record: Record
    data: ReIDData | None = None
    sizes: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    clusters: tuple[Cluster, ...] = ()
    outliers: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    retrieval: Retrieval | None = None
    map: Map | None = None
    missing: dict[str, str] = field(default_factory=dict)


def look(results: Results, limits: Limits | None = None, *, pictures: bool = True) -> Findings:
    """Find out what there is to show.

    Args:
        results: of the run, perhaps without images or features.
        limits: how much to show.
        pictures: also look for what is shown as pictures: clusters, outliers, the map.
    """
    limits = limits or Limits()
    record, data = results.record, results.data
    found = Findings(record, data, sizes=record.sizes, missing=dict(results.missing))
    if pictures and results.trained_on is not None and record.labels is not None:
        found.clusters = choose_clusters(record.labels, results.trained_on, limits)
        alone = np.flatnonzero(record.labels < 0)
        found.outliers = alone[_spread(len(alone), limits.outliers)]
        if results.points is not None:
            found.map = _map(found, results.points, len(record.labels))
    if data is not None and results.features is not None:
        found.retrieval = _retrieval(found, data, *results.features, limits)
    return found


# ---- clusters -----------------------------------------------------------------------------------


def choose_clusters(labels: Integers, images: ImageList, limits: Limits) -> tuple[Cluster, ...]:
    """Clusters worth a look, by their pseudo-label.

    Kinds are ``largest``; ``purest`` and ``most mixed``, by purity, where identities are known;
    ``most cross-camera``, by number of cameras, then by the share of images outside the commonest
    one; and ``any size``, evenly over all clusters ordered by size. Ties go to the larger cluster.
    """
    rows_of = members(labels)
    about = [_describe(label, rows, images) for label, rows in enumerate(rows_of)]
    by_size = sorted(about, key=lambda c: -c.size)
    orders: dict[str, list[Cluster]] = {"largest": by_size}
    known = [c for c in by_size if c.main_id >= 0]
    orders["purest"] = sorted(known, key=lambda c: -c.purity)
    orders["most mixed"] = sorted((c for c in known if c.ids > 1), key=lambda c: c.purity)
    seen = [c for c in by_size if c.cameras > 1]
    elsewhere = {c.label: _outside(images.cameras[rows_of[c.label]]) for c in seen}
    orders["most cross-camera"] = sorted(seen, key=lambda c: (-c.cameras, -elsewhere[c.label]))
    orders["any size"] = [by_size[i] for i in _spread(len(by_size), limits.clusters)]
    kinds: dict[int, list[str]] = {}
    for kind, clusters in orders.items():
        for cluster in clusters[: limits.clusters]:
            kinds.setdefault(cluster.label, []).append(kind)
    return tuple(
        dataclasses.replace(
            about[label],
            kinds=tuple(why),
            shown=_some(rows_of[label], images, limits.members),
        )
        for label, why in kinds.items()
    )


def _describe(label: int, rows: Integers, images: ImageList) -> Cluster:
    ids, counts = np.unique(images.ids[rows][images.ids[rows] >= 0], return_counts=True)
    cameras = np.unique(images.cameras[rows][images.cameras[rows] >= 0])
    purity, main = float("nan"), -1
    if len(ids):
        purity, main = float(np.max(counts)) / int(counts.sum()), int(ids[np.argmax(counts)])
    return Cluster(label, len(rows), len(cameras), len(ids), purity, main, (), ())


def _outside(cameras: Integers) -> float:
    """Share of images outside the commonest camera."""
    counts = np.unique(cameras[cameras >= 0], return_counts=True)[1]
    return 1 - float(np.max(counts)) / int(counts.sum())


def _some(rows: Integers, images: ImageList, count: int) -> tuple[int, ...]:
    """Some of the images, evenly over identities and cameras."""
    order = np.lexsort((rows, images.cameras[rows], images.ids[rows]))
    return tuple(int(i) for i in rows[order][_spread(len(rows), count)])


def _spread(total: int, count: int) -> Integers:
    """At most ``count`` of ``total`` positions, evenly."""
    if total <= count:
        return np.arange(total)
    positions: Integers = np.linspace(0, total - 1, count).round().astype(np.int64)
    return positions


# ---- retrieval ----------------------------------------------------------------------------------


def _retrieval(
    found: Findings, data: ReIDData, query: torch.Tensor, gallery: torch.Tensor, limits: Limits
) -> Retrieval | None:
    queries, images = data.compared()
    cameras = cameras_apart(queries.cameras, images.cameras)
    try:
        metrics = evaluate_ranking(
            (query, gallery), _tensor(queries.ids), _tensor(images.ids), *cameras, per_query=True
        )
    except ValueError as error:
        found.missing["retrieval"] = str(error)
        return None
    assert metrics.average_precision is not None
    assert metrics.first_match is not None
    ap, first = metrics.average_precision.cpu().numpy(), metrics.first_match.cpu().numpy()
    chosen = choose_queries(ap, limits.queries)
    shown, matrix = camera_matrix(query, gallery, queries, images)
    if not data.across_cameras:
        found.missing["camera matrix"] = WITHIN_CAMERA
    elif not len(shown):
        found.missing["camera matrix"] = "the cameras of queries and gallery are not known"
    return Retrieval(
        ap=ap,
        mAP=float(metrics.mAP),
        rank1=float(metrics.cmc[0]),
        lists=rank_lists(query, gallery, queries, images, ap, first, chosen, limits.topk),
        similarities=similarities(query, gallery, queries, images),
        cameras=shown,
        matrix=matrix,
    )


def _tensor(values: Integers) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def choose_queries(ap: Floats, count: int) -> dict[int, str]:
    """Queries with the highest, the median and the lowest average precision, by number.

    ``count`` of each, fewer if there are fewer than three times as many; queries that count nowhere
    (NaN) are left out, and ties are drawn.
    """
    valid = np.flatnonzero(~np.isnan(ap))
    valid = np.random.default_rng(0).permutation(valid)
    order = valid[np.argsort(-ap[valid], kind="stable")]
    each = max(1, min(count, len(order) // 3))
    start = (len(order) - each) // 2
    parts = {"best": order[:each], "median": order[start : start + each], "worst": order[-each:]}
    kinds: dict[int, str] = {}
    for kind, queries in parts.items():
        for query in queries:
            kinds.setdefault(int(query), kind)
    return kinds


def rank_lists(
    query: torch.Tensor,
    gallery: torch.Tensor,
    queries: ImageList,
    images: ImageList,
    ap: Floats,
    first: Integers,
    chosen: dict[int, str],
    topk: int,
) -> tuple[RankedList, ...]:
    """Ranked lists as evaluation sees them, of unit features (Q, d) and (G, d).

    Images of junk (identity -1), and of the query's identity in the query's camera, are removed.
    """
    lists = []
    for number, kind in chosen.items():
        similarity = (gallery @ query[number]).cpu().numpy()
        camera, person = queries.cameras[number], queries.ids[number]
        junk = images.ids < 0
        if camera >= 0:
            junk |= (images.ids == person) & (images.cameras == camera)
        kept = np.flatnonzero(~junk)
        top = kept[np.argsort(-similarity[kept], kind="stable")[:topk]]
        lists.append(
            RankedList(
                query=number,
                kind=kind,
                ap=float(ap[number]),
                first=int(first[number]),
                gallery=tuple(map(int, top)),
                similarity=tuple(map(float, similarity[top])),
                right=tuple(bool(r) for r in images.ids[top] == person),
            )
        )
    return tuple(lists)


def similarities(
    query: torch.Tensor,
    gallery: torch.Tensor,
    queries: ImageList,
    images: ImageList,
    *,
    bins: int = 80,
) -> Similarities | None:
    """Histograms over pairs of a query and a gallery image in different cameras.

    At most 500 queries and 10,000 gallery images are drawn; junk does not count. None without a
    positive and a negative pair. Where cameras are unknown, all pairs count.
    """
    draw = np.random.default_rng(0)
    q = _draw(np.flatnonzero(queries.ids >= 0), _SIMILARITY_QUERIES, draw)
    # All images of the queries' identities are kept, as positive pairs are rare.
    wanted = np.isin(images.ids, queries.ids[q])
    real = images.ids >= 0
    few = np.flatnonzero(wanted & real)
    rest = np.flatnonzero(real & ~wanted)
    g = np.concatenate(
        [
            _draw(few, _SIMILARITY_GALLERY, draw),
            _draw(rest, max(_SIMILARITY_GALLERY - len(few), 0), draw),
        ]
    )
    known = bool((queries.cameras[q] >= 0).all() and (images.cameras[g] >= 0).all())
    edges = np.linspace(-1, 1, bins + 1)
    counts, sums = np.zeros((2, bins), np.int64), np.zeros(2)
    part = gallery[torch.from_numpy(g).to(gallery.device)]
    for rows in np.array_split(q, max(1, len(q) // 50)):
        values = (query[torch.from_numpy(rows).to(query.device)] @ part.T).cpu().numpy()
        same = queries.ids[rows][:, None] == images.ids[g][None]
        allowed = np.ones_like(same)
        if known:
            allowed = queries.cameras[rows][:, None] != images.cameras[g][None]
        for kind, pairs in enumerate((same & allowed, ~same & allowed)):
            chosen = np.clip(values[pairs], -1, 1)
            counts[kind] += np.histogram(chosen, edges)[0]
            sums[kind] += chosen.sum(dtype=np.float64)
    if not counts.sum(1).all():
        return None
    means = sums / counts.sum(1)
    return Similarities(edges, counts[0], counts[1], known, float(means[0]), float(means[1]))


def _draw(from_: Integers, count: int, draw: np.random.Generator) -> Integers:
    if len(from_) <= count:
        return from_
    return np.sort(draw.choice(from_, count, replace=False))


def camera_matrix(
    query: torch.Tensor, gallery: torch.Tensor, queries: ImageList, images: ImageList
) -> tuple[Integers, Floats]:
    """Cameras (C,), and mAP (C, C) of the queries of one against the gallery of another.

    Within a camera nothing is to be found, as evaluation removes the query's own camera: NaN there
    and wherever no query of a camera has a right match in the other. The 24 cameras with most
    queries at most.
    """
    numbers, counts = np.unique(queries.cameras[queries.cameras >= 0], return_counts=True)
    cameras = np.sort(numbers[np.argsort(-counts, kind="stable")][:_MATRIX_CAMERAS])
    there = np.unique(images.cameras[images.cameras >= 0])
    if not len(cameras) or not len(there):
        return np.zeros(0, np.int64), np.zeros((0, 0))
    matrix = np.full((len(cameras), len(cameras)), np.nan)
    rows = {int(c): np.flatnonzero(queries.cameras == c) for c in cameras}
    columns = {int(c): np.flatnonzero(images.cameras == c) for c in cameras}
    for i, a in enumerate(cameras):
        for j, b in enumerate(cameras):
            q, g = rows[int(a)], columns[int(b)]
            ids = queries.ids[q]
            if a == b or not np.isin(ids[ids >= 0], images.ids[g]).any():
                continue
            parts = (query[torch.from_numpy(q)], gallery[torch.from_numpy(g)])
            found = evaluate_ranking(parts, _tensor(ids), _tensor(images.ids[g]))
            matrix[i, j] = found.mAP
    return cameras, matrix


# ---- map ----------------------------------------------------------------------------------------


def _map(found: Findings, points: Points, total: int) -> Map | None:
    xy = draw_map(points.features)
    if xy is None:
        found.missing["map"] = f"there are too few images for a map ({len(points.images)})"
        return None
    return Map(points.images, xy, total, points.extracted)


def draw_map(features: NDArray[np.float32]) -> Floats | None:
    """t-SNE of rows (n, d), the same every time: (n, 2), or None for fewer than 5 rows.

    Rows are reduced to 50 principal components first (van der Maaten and Hinton, 2008).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, wide = features.shape
    if count < 5:
        return None
    pca = PCA(min(50, count, wide), svd_solver="randomized", random_state=0)
    with np.errstate(invalid="ignore"):  # its shares of variance, where all rows are the same
        rows = np.ascontiguousarray(pca.fit_transform(features), dtype=np.float32)
    # scikit-learn's own start from the components divides by 0 where all rows are the same.
    start = rows[:, :2] * (1e-4 / max(float(rows[:, 0].std()), 1e-12))
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init=start, random_state=0, n_jobs=1)
    xy: Any = tsne.fit_transform(rows)
    return np.asarray(xy, np.float64)
