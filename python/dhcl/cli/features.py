"""The commands on saved features: ``dhcl cluster``, ``dhcl rerank`` and ``dhcl metrics``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dhcl.cli.shared import (
    Reading,
    Which,
    check_cameras,
    extracted,
    hint_cameras,
    op_progress,
    options_checked,
    print_other_kinds,
)
from dhcl.errors import ConfigError
from dhcl.words import say, show
from dhcl_ops.defaults import SPCL, ZHONG

if TYPE_CHECKING:
    import torch

    from dhcl.inference.features import Features

__all__ = ["cluster", "metrics", "rerank"]


@dataclass(frozen=True)
class ClusterArguments:
    """Cluster saved features, or the images of a folder, as training does: Jaccard and DBSCAN."""

    features: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURES")]
    """File of saved features (.npy .npz .pt .mat .parquet), or a folder of images."""
    out: Path
    """File to write the labels to, .csv; images in no cluster have -1."""
    run: Path | None = None
    """Folder of the run whose model and clustering options serve a folder of images."""
    which: Which = "last"
    """Checkpoint to use: of the last epoch, or of the one that looked best by test mAP."""
    key: str | None = None
    """Name of the features in the file, where it is not one of the usual names."""
    transposed: bool = False
    """Whether the features in the file are (d, N): a column for each image, not a row."""
    k1: int | None = None
    """Neighbours of the Jaccard distance (30, or the run's)."""
    k2: int | None = None
    """Neighbours of its query expansion (6, or the run's)."""
    eps: float | None = None
    """Largest Jaccard distance at which two images are neighbours (0.6, or the run's)."""
    min_samples: int | None = None
    """Number of images within eps that make one the core of a cluster (4, or the run's)."""
    k1_own: int | None = None
    """Number of the neighbours that are of the image's own camera (0, or the run's)."""
    self_paced: bool | None = None
    """Whether to keep independent and compact clusters only (False, or as the run did)."""
    pattern: str | None = None
    """Regular expression that finds identity and camera in a folder's paths; else the run's."""
    trained_cameras: bool = False
    """Whether the pattern's cameras are those of the training, so that their statistics count."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


@dataclass(frozen=True)
class _Rows:
    """Features to cluster: (N, d) rows of length 1, their N names, and what the names are."""

    features: torch.Tensor
    names: list[str]
    column: Literal["path", "row"]
    ids: torch.Tensor | None  # (N,) int64, -1 for unknown ones; None where none is known
    cameras: torch.Tensor | None  # the same
    numbers: dict[str, Any]  # options of dhcl_ops.cluster where nothing else is said


_NUMBERS = ("k1", "k2", "eps", "min_samples", "k1_own", "self_paced")
_SCORES = {"ari": "ARI", "nmi": "NMI", "purity": "purity"}


def cluster(given: ClusterArguments) -> None:
    """Write a label for each row of a file, or each image of a folder."""
    if given.out.suffix.lower() != ".csv":
        raise ConfigError(f"out: must be a .csv file (got {show(given.out)})")
    check_cameras(given.pattern, given.trained_cameras)
    rows = _of_folder(given) if given.features.is_dir() else _of_file(given)
    import dhcl_ops
    from dhcl.inference.saved import write_labels
    from dhcl.metrics import agreement

    chosen = {name: getattr(given, name) for name in _NUMBERS}
    numbers = rows.numbers | {n: value for n, value in chosen.items() if value is not None}
    if numbers["k1_own"] and (rows.cameras is None or len(rows.cameras.unique()) < 2):
        _without_cameras(given, numbers)
    with options_checked(), op_progress() as progress:
        found = dhcl_ops.cluster(rows.features, **numbers, cameras=rows.cameras, progress=progress)
    write_labels(given.out, rows.column, rows.names, found.labels)
    sizes = found.labels[found.labels >= 0].bincount().tolist()
    about = f" of {min(sizes)} to {max(sizes)} images" if sizes else ""
    used = ", ".join(f"{name} {value}" for name, value in numbers.items() if value)
    say(
        f"{show(given.out)}: {len(rows.names):,} images, {found.num_clusters:,} clusters{about}, "
        f"{found.num_outliers:,} in none ({used})"
    )
    scores = {} if rows.ids is None else agreement(rows.ids, found.labels)
    if scores and rows.ids is not None:
        listed = ", ".join(f"{_SCORES[name]} {value:.3f}" for name, value in scores.items())
        count = int((rows.ids >= 0).sum())
        say(f"agreement with the identities of {count:,} images: {listed}")


def _without_cameras(given: ClusterArguments, numbers: dict[str, Any]) -> None:
    """What was asked for is refused; what the run did can't be done, and that is said."""
    text = (
        f"k1_own: two cameras at least must be known (got k1_own {numbers['k1_own']}); --pattern "
        "says where they stand in the paths of a folder"
    )
    if given.k1_own is not None:
        raise ConfigError(text)
    numbers["k1_own"] = 0
    say(f"hint: {text}. Neighbours are taken from all images alike", sys.stderr)


def _of_folder(given: ClusterArguments) -> _Rows:
    if given.run is None:
        raise ConfigError("run: for a folder of images a run must be given (--run RUN)")
    import numpy as np

    from dhcl.data import image_files, path_reader
    from dhcl.data.datasets import camera_reader
    from dhcl.data.folders import check_matched
    from dhcl.inference.features import common_numbers
    from dhcl.inference.reid import ReID, clustering_options

    model = ReID.load(given.run, given.which, given.reading.device)
    print_other_kinds([given.features])
    paths = image_files(given.features)
    names = [path.relative_to(given.features).as_posix() for path in paths]
    known = [path_reader(given.pattern)(name) for name in names]
    check_matched(given.pattern, names, known)
    trained = None
    if given.trained_cameras:
        trained = model.camera_indices([camera for _, camera in known])
    hint_cameras(model, given.pattern, given.trained_cameras)
    features, kept = extracted(model, paths, trained, given.reading)
    if given.pattern is None:
        read = camera_reader(model.config.data.data, model.config.data.pattern)
        cameras = [read(name) for name in names]
    else:
        cameras = [camera for _, camera in known]
    [ids] = common_numbers(np.array([known[i][0] for i in kept], dtype=object))
    [whose] = common_numbers(np.array([cameras[i] for i in kept], dtype=object))
    numbers = clustering_options(model.config)
    return _Rows(features, [names[i] for i in kept], "path", ids, whose, numbers)


def _of_file(given: ClusterArguments) -> _Rows:
    if given.run is not None:
        raise ConfigError(f"run: is for a folder of images (got the file {show(given.features)})")
    from dhcl.inference.features import common_numbers, read_features

    saved = read_features(given.features, key=given.key, transposed=given.transposed)
    names = list(saved.paths or map(str, range(len(saved))))
    numbers = {name: getattr(SPCL, name) for name in _NUMBERS[:4]}
    numbers |= {"k1_own": 0, "self_paced": False}
    ids, cameras = (
        None if column is None else common_numbers(column)[0]
        for column in (saved.ids, saved.cameras)
    )
    kind: Literal["path", "row"] = "path" if saved.paths else "row"
    return _Rows(saved.unit(), names, kind, ids, cameras, numbers)


@dataclass(frozen=True)
class RerankArguments:
    """Re-rank saved features with k-reciprocal encoding: the best of the gallery per query."""

    query: Path
    """File of the queries' features (.npy .npz .pt .mat .parquet)."""
    gallery: Path
    """File of the gallery's features; it may be the same one, if that holds both."""
    out: Path
    """File to write the lists to, .npz: indices and distances (Q, topk), and known paths."""
    topk: int = 50
    """Number of gallery images in the list of a query."""
    k1: int = ZHONG.k1
    """Neighbours."""
    k2: int = ZHONG.k2
    """Neighbours in the query expansion."""
    lambda_value: float = ZHONG.lambda_value
    """Share of the original distance in the re-ranked one, from 0 to 1."""
    key: str | None = None
    """Name of the features in the files, where it is not one of the usual names."""
    transposed: bool = False
    """Whether the features in the files are (d, N): a column for each image, not a row."""


def rerank(given: RerankArguments) -> None:
    """Write the re-ranked lists of saved queries in a saved gallery."""
    if given.out.suffix.lower() != ".npz":
        raise ConfigError(f"out: must be a .npz file (got {show(given.out)})")
    import dhcl_ops
    from dhcl.inference.saved import write_lists

    query, gallery = _pair(given)
    with options_checked(), op_progress() as progress:
        lists = dhcl_ops.rerank(
            query.unit(),
            gallery.unit(),
            given.k1,
            given.k2,
            given.lambda_value,
            topk=min(given.topk, len(gallery)),
            progress=progress,
        )
    write_lists(given.out, lists, query, gallery)
    say(
        f"{show(given.out)}: the best {lists.indices.shape[1]} of {len(gallery):,} for each of "
        f"{len(query):,} queries"
    )


def _pair(given: RerankArguments | MetricsArguments) -> tuple[Features, Features]:
    from dhcl.inference.features import check_pair, read_features

    layout: dict[str, Any] = {"key": given.key, "transposed": given.transposed}
    pair = (
        read_features(given.query, role="query", **layout),
        read_features(given.gallery, role="gallery", **layout),
    )
    check_pair(*pair)
    return pair


@dataclass(frozen=True)
class MetricsArguments:
    """Evaluate saved features: mAP, CMC, mINP. Identities and cameras are read from the files."""

    query: Path
    """File of the queries' features (.npz .pt .mat .parquet), with identities."""
    gallery: Path
    """File of the gallery's, with identities; it may be the same one, if that holds both."""
    rerank: bool = False
    """Whether to evaluate with k-reciprocal re-ranking too."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance between features; euclidean takes rows of any length as they are."""
    ap: Literal["hits", "trapezoid"] = "hits"
    """Average precision: mean at the hits, or the area by trapezoids of older Matlab code."""
    ranks: tuple[int, ...] = (1, 5, 10)
    """Ranks k for which to print the share of queries with a right match among the first k."""
    k1: int = ZHONG.k1
    """Neighbours of the re-ranking."""
    k2: int = ZHONG.k2
    """Neighbours in its query expansion."""
    lambda_value: float = ZHONG.lambda_value
    """Share of the original distance in the re-ranked one, from 0 to 1."""
    key: str | None = None
    """Name of the features in the files, where it is not one of the usual names."""
    transposed: bool = False
    """Whether the features in the files are (d, N): a column for each image, not a row."""
    json: bool = False
    """Whether to print JSON in place of a table."""


def metrics(given: MetricsArguments) -> None:
    """Print the metrics of saved features."""
    from dhcl.inference.saved import evaluate_saved
    from dhcl.metrics import table

    query, gallery = _pair(given)
    names = ("k1", "k2", "lambda_value")
    reranking = {name: getattr(given, name) for name in names} if given.rerank else None
    with options_checked(), op_progress() as progress:
        rows, kept = evaluate_saved(
            query,
            gallery,
            metric=given.metric,
            ap=given.ap,
            ranks=given.ranks,
            reranking=reranking,
            progress=progress,
        )
    if given.json:
        say(json.dumps(rows, indent=1))
        if kept:
            say(f"hint: {kept}", sys.stderr)
        return
    say(table(rows))
    valid = rows["features"]["queries"]
    say(f"{valid:,} of {len(query):,} queries have a right match{kept and f'; {kept}'}")
