"""The commands that use a finished model or saved features."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from dhcl.config import ConfigError
from dhcl.data import image_files, path_reader
from dhcl.files import write_atomic
from dhcl.inference.export import export_features, export_onnx, export_weights
from dhcl.inference.features import Features, check_pair, common_numbers, read_features
from dhcl.inference.index import Backend, Index, Update, add_images, create_index, remove_images
from dhcl.inference.ranked import (
    Listed,
    RankedList,
    Shown,
    as_json,
    as_table,
    write_png,
)
from dhcl.inference.reid import Found, ReID, op_progress
from dhcl.metrics import RANKS, by_name, cameras_apart, table
from dhcl.report.ranked import write_ranked
from dhcl.words import first_ones, show
from dhcl_ops import cluster, evaluate_ranking, rerank
from dhcl_ops.defaults import SPCL, ZHONG

__all__ = ["SERVICES"]

Which = Literal["last", "best"]
OnBad = Literal["refuse", "skip"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class _Reading:
    """How images are read and features extracted."""

    on_bad: OnBad = "refuse"
    """What to do if images can't be read."""
    batch_size: int = 128
    """Images at a time."""
    workers: int = min(4, os.cpu_count() or 1)
    """Processes that load images."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""

    def options(self) -> dict[str, Any]:
        """Of :meth:`dhcl.ReID.batches`."""
        return {
            "on_bad": self.on_bad,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "progress": True,
        }


@contextmanager
def _options_checked() -> Iterator[None]:
    """What the ops refuse comes from the command line."""
    try:
        yield
    except (TypeError, ValueError, MemoryError) as error:
        raise ConfigError(str(error)) from error


def _print_left_out(lines: list[str]) -> None:
    if lines:
        head = f"left out, {len(lines):,} images that can't be read:"
        print("\n  ".join(map(show, [head, *first_ones(lines)])), file=sys.stderr)


def _check_cameras(pattern: str | None, trained_cameras: bool) -> None:
    if trained_cameras and "(?P<camera>" not in (pattern or ""):
        raise ConfigError(
            "trained_cameras: --pattern must say where the camera stands, in a group named camera "
            f"(got {pattern!r})"
        )


def _hint_cameras(model: ReID, pattern: str | None, trained_cameras: bool) -> None:
    if model.num_cameras and not trained_cameras:
        what = (
            "--trained-cameras uses the statistics"
            if pattern
            else ("--pattern and --trained-cameras use the statistics")
        )
        print(
            f"hint: the model has statistics of {model.num_cameras} cameras; if the images are of "
            f"these, {what} of each"
        )


# ---- export -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ExportArguments:
    """Give a model's features, or the model itself, to other programs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    features: Path | None = None
    """Folder of images whose features to write to --out."""
    out: Path | None = None
    """File for them, .npz or .parquet."""
    onnx: Path | None = None
    """File for the model as ONNX: images (batch, 3, H, W), RGB in [0, 1], to features."""
    weights: Path | None = None
    """File for a plain state dict, to be loaded without dhcl."""
    which: Which = "last"
    """The last epoch's model, or the one that looked best by test mAP."""
    camera: int | None = None
    """For --onnx and --weights: take the statistics of this camera, from 0, not those of all."""
    pattern: str | None = None
    """Where identity and camera stand in the paths, as in training; they are then written too."""
    trained_cameras: bool = False
    """The cameras of the pattern are those of the training: use their statistics."""
    reading: tyro.conf.OmitArgPrefixes[_Reading] = field(default_factory=_Reading)


def _export(arguments: list[str]) -> None:
    given = tyro.cli(_ExportArguments, prog="dhcl export", args=arguments)
    if given.features is None and given.onnx is None and given.weights is None:
        raise ConfigError("export: what must be said: --features FOLDER, --onnx or --weights FILE")
    if (given.features is None) != (given.out is None):
        raise ConfigError("features and out: a folder of images and a file go together")
    _check_cameras(given.pattern, given.trained_cameras)
    model = ReID.load(given.run, given.which, given.reading.device)
    print(f"model: {model}")
    if given.weights is not None:
        shapes = export_weights(model, given.weights, camera=given.camera)
        parts = Counter(name.split(".")[0] for name in shapes)
        listed = ", ".join(f"{count} of {part}" for part, count in parts.items())
        print(f"{given.weights}: {len(shapes)} tensors, {listed}")
    if given.onnx is not None:
        worst = export_onnx(model, given.onnx, camera=given.camera)
        height, width = model.image_size
        print(
            f"{given.onnx}: images (batch, 3, {height}, {width}), RGB in [0, 1], to features "
            f"(batch, {model.dim}); onnxruntime differs from torch by {worst:.1g} at most"
        )
    if given.features is not None and given.out is not None:
        _hint_cameras(model, given.pattern, given.trained_cameras)
        with _options_checked():
            rows, left_out = export_features(
                model,
                given.features,
                given.out,
                pattern=given.pattern,
                trained_cameras=given.trained_cameras,
                **given.reading.options(),
            )
        _print_left_out(left_out)
        print(f"{given.out}: features of {rows:,} images, {model.dim} each")


# ---- index and search ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _IndexArguments:
    """Make an index of a gallery to search in, or change one."""

    gallery: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GALLERY …")]
    """Folders of images, on all levels, and image files."""
    out: Path
    """Folder of the index."""
    run: Path | None = None
    """Folder of the run whose model extracts the features; later the index knows it."""
    which: Which = "last"
    """The last epoch's model, or the one that looked best by test mAP."""
    add: bool = False
    """Add new images to the index and extract changed ones again."""
    sync: bool = False
    """The same, and remove images that are in these folders no longer."""
    remove: bool = False
    """Remove these files, and all below these folders, from the index."""
    pattern: str | None = None
    """Where identity and camera stand in the paths, as in training."""
    trained_cameras: bool = False
    """The cameras of the pattern are those of the training: use their statistics."""
    reading: tyro.conf.OmitArgPrefixes[_Reading] = field(default_factory=_Reading)


def _index(arguments: list[str]) -> None:
    given = tyro.cli(_IndexArguments, prog="dhcl index", args=arguments)
    if not given.gallery:
        raise ConfigError("gallery: folders of images or files must be given")
    if given.add + given.sync + given.remove > 1:
        raise ConfigError("add, sync and remove: choose one")
    with _options_checked():
        done = _changed(given)
    print(f"{given.out}: {done}")


def _changed(given: _IndexArguments) -> Update:
    if given.remove:
        return remove_images(given.out, given.gallery)
    options = given.reading.options()
    if given.add or given.sync:
        old = Index.open(given.out)
        if given.pattern not in (None, old.pattern):
            raise ConfigError(
                f"pattern: the index has {old.pattern!r} (got {given.pattern!r}); make it anew"
            )
        model = old.load_model(given.run, given.reading.device)
        return add_images(given.out, given.gallery, model, sync=given.sync, **options)
    if given.run is None:
        raise ConfigError("run: the folder of a run must be given for a new index (--run RUN)")
    _check_cameras(given.pattern, given.trained_cameras)
    model = ReID.load(given.run, given.which, given.reading.device)
    print(f"model: {model}")
    _hint_cameras(model, given.pattern, given.trained_cameras)
    return create_index(
        given.out,
        given.gallery,
        model,
        pattern=given.pattern,
        trained_cameras=given.trained_cameras,
        **options,
    )


@dataclass(frozen=True)
class _SearchArguments:
    """Find the people of some images in an index."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder of the index."""
    query: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUERY …")]
    """Images, or folders of images."""
    topk: int = 20
    """Results for each query."""
    rerank: bool = False
    """Order by k-reciprocal re-ranking; compares all images of the index with each other."""
    camera: tuple[str, ...] = ()
    """Only images of these cameras."""
    other_cameras: bool = False
    """Leave out images of the query's own camera."""
    json: bool = False
    """Print JSON in place of a table."""
    html: Path | None = None
    """Write the ranked lists as a page that holds its pictures."""
    png: Path | None = None
    """Write them as a picture."""
    run: Path | None = None
    """Where the run of the model lies now, if it was moved."""
    backend: Backend = "auto"
    """What computes similarities: faiss where it is installed, else torch. Both are exact."""
    reading: tyro.conf.OmitArgPrefixes[_Reading] = field(default_factory=_Reading)


def _search(arguments: list[str]) -> None:
    given = tyro.cli(_SearchArguments, prog="dhcl search", args=arguments)
    if not given.query:
        raise ConfigError("query: images or folders of images must be given")
    if given.topk < 1:
        raise ConfigError(f"topk: must be at least 1 (got {given.topk})")
    index = Index.open(given.index)
    queries = _queries(index, given.query)
    if given.other_cameras and all(each.camera == -1 for each in queries):
        raise ConfigError(
            "other_cameras: the camera of no query is known; the index's pattern is "
            f"{index.pattern!r}"
        )
    model = index.load_model(given.run, given.reading.device)
    cameras = None
    if index.trained_cameras:
        cameras = model.camera_indices([each.camera for each in queries])
    features, kept = _extracted(model, [each.path for each in queries], cameras, given.reading)
    queries = [queries[i] for i in kept]
    with _options_checked(), op_progress() as progress:
        found = index.search(
            features,
            given.topk,
            cameras=[int(name) if name.isdecimal() else name for name in given.camera] or None,
            leave_out=[each.camera for each in queries] if given.other_cameras else None,
            rerank=given.rerank,
            backend=given.backend,
            progress=progress,
        )
    lists = [_ranked(index, query, one) for query, one in zip(queries, found, strict=True)]
    _write_lists(given, index, lists)


def _extracted(
    model: ReID, paths: list[Path], cameras: list[int] | None, reading: _Reading
) -> tuple[torch.Tensor, list[int]]:
    """Features, and which of the files they are of; the others are named."""
    bad: list[tuple[int, str]] = []
    with _options_checked():
        batches = list(model.batches(paths, cameras, bad=bad, **reading.options()))
    _print_left_out([f"{paths[i]}: {reason}" for i, reason in bad])
    return torch.cat([b.features for b in batches]), [i for b in batches for i in b.indices]


def _queries(index: Index, given: tuple[Path, ...]) -> list[Shown]:
    """Query files, with what the index's pattern reads off their paths.

    A file of the index's own folders is seen as the index sees it; else a path is taken as given,
    below a folder that was given.
    """
    read = path_reader(index.pattern)
    queries = []
    for each in given:
        folder = each.is_dir()
        for path in image_files(each) if folder else [each]:
            whole = os.path.abspath(path)
            home = next(
                (r for r in index.roots if whole.startswith(r.rstrip(os.sep) + os.sep)), None
            )
            if home is not None:
                name = Path(whole).relative_to(home)
            else:
                name = path.relative_to(each) if folder else path
            queries.append(Shown(path, *read(name.as_posix())))
    return queries


def _ranked(index: Index, query: Shown, found: Found) -> RankedList:
    results = []
    for place, row in enumerate(found.indices.tolist()):
        record = index.records[row]
        known = query.id != -1 and record.id != -1
        results.append(
            Listed(
                Shown(index.path(row), record.id, record.camera),
                float(found.similarities[place]),
                None if found.distances is None else float(found.distances[place]),
                record.id == query.id if known else None,
            )
        )
    return RankedList(query, tuple(results))


def _write_lists(given: _SearchArguments, index: Index, lists: list[RankedList]) -> None:
    order = "re-ranked distance" if given.rerank else "similarity"
    if given.json:
        about = {
            "index": str(index.folder),
            "images": len(index),
            "model": index.model,
            "order": order,
        }
        print(as_json(lists, about))
    elif given.html is None and given.png is None:
        print(as_table(lists))
    if given.html is not None:
        about_page = (
            f"Queries: {len(lists):,}. Images in {show(index.folder)}: {len(index):,}, ordered by "
            f"{order}; model {index.model[:12]}."
        )
        write_ranked(given.html, lists, "Search results", about_page)
    if given.png is not None:
        write_png(given.png, lists)
    for file in (given.html, given.png):
        if file is not None and not given.json:
            print(f"written: {file}")


# ---- saved features -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _ClusterArguments:
    """Cluster saved features, or the images of a folder, as training does: Jaccard and DBSCAN."""

    features: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURES")]
    """File of features (.npy .npz .pt .mat .parquet), or a folder of images."""
    out: Path
    """File for the labels, .csv; -1 is for images in no cluster."""
    run: Path | None = None
    """For a folder: the run whose model extracts the features, and whose numbers are taken."""
    which: Which = "last"
    """The last epoch's model, or the one that looked best by test mAP."""
    key: str | None = None
    """Name of the features in the file, where it is not one of the usual ones."""
    k1: int | None = None
    """Neighbours of the Jaccard distance (30, or the run's)."""
    k2: int | None = None
    """Neighbours of its query expansion (6, or the run's)."""
    eps: float | None = None
    """Largest Jaccard distance of neighbours (0.6, or the run's)."""
    min_samples: int | None = None
    """Neighbours that make an image the core of a cluster (4, or the run's)."""
    pattern: str | None = None
    """For a folder: where the camera stands in the paths, as in training."""
    trained_cameras: bool = False
    """The cameras of the pattern are those of the training: use their statistics."""
    reading: tyro.conf.OmitArgPrefixes[_Reading] = field(default_factory=_Reading)


def _cluster(arguments: list[str]) -> None:
    given = tyro.cli(_ClusterArguments, prog="dhcl cluster", args=arguments)
    if given.out.suffix.lower() != ".csv":
        raise ConfigError(f"out: must be a .csv file (got {given.out})")
    _check_cameras(given.pattern, given.trained_cameras)
    taken = ("k1", "k2", "eps", "min_samples")
    numbers: dict[str, Any] = {name: getattr(SPCL, name) for name in taken}
    if given.features.is_dir():
        if given.run is None:
            raise ConfigError("run: for a folder of images a run must be given (--run RUN)")
        model = ReID.load(given.run, given.which, given.reading.device)
        numbers = {name: getattr(model.config.labels, name) for name in numbers}
        paths = image_files(given.features)
        every = [path.relative_to(given.features).as_posix() for path in paths]
        cameras = None
        if given.trained_cameras:
            read = path_reader(given.pattern)
            cameras = model.camera_indices([read(name)[1] for name in every])
        _hint_cameras(model, given.pattern, given.trained_cameras)
        rows, kept = _extracted(model, paths, cameras, given.reading)
        names = [every[i] for i in kept]
    else:
        if given.run is not None:
            raise ConfigError(f"run: is for a folder of images (got the file {given.features})")
        saved = read_features(given.features, key=given.key)
        rows = saved.unit()
        names = list(saved.paths or map(str, range(len(saved))))
    chosen = {name: getattr(given, name) for name in numbers}
    numbers |= {name: value for name, value in chosen.items() if value is not None}
    with _options_checked(), op_progress() as progress:
        found = cluster(rows, **numbers, progress=progress)
    labels = found.labels.tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path" if given.features.is_dir() or saved.paths else "row", "label"])
    writer.writerows([show(name), label] for name, label in zip(names, labels, strict=True))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out, text.getvalue().encode())
    sizes = torch.bincount(found.labels[found.labels >= 0]).tolist()
    about = f" of {min(sizes)} to {max(sizes)} images" if sizes else ""
    used = ", ".join(f"{name} {value}" for name, value in numbers.items())
    print(
        f"{given.out}: {len(labels):,} images, {found.num_clusters:,} clusters{about}, "
        f"{found.num_outliers:,} in none ({used})"
    )


@dataclass(frozen=True)
class _RerankArguments:
    """Re-rank saved features with k-reciprocal encoding: the best of the gallery per query."""

    query: Path
    """File of features (.npy .npz .pt .mat .parquet)."""
    gallery: Path
    """File of features; may be the same one, if it holds both."""
    out: Path
    """File for the lists, .npz: indices and distances (Q, topk), paths where they are known."""
    topk: int = 50
    """Length of the lists."""
    k1: int = ZHONG.k1
    """Neighbours."""
    k2: int = ZHONG.k2
    """Neighbours in the query expansion."""
    lambda_value: float = ZHONG.lambda_value
    """Share of the original distance."""
    key: str | None = None
    """Name of the features in the files, where it is not one of the usual ones."""


def _pair(query: Path, gallery: Path, key: str | None) -> tuple[Features, Features]:
    pair = (
        read_features(query, role="query", key=key),
        read_features(gallery, role="gallery", key=key),
    )
    check_pair(*pair)
    return pair


def _rerank(arguments: list[str]) -> None:
    given = tyro.cli(_RerankArguments, prog="dhcl rerank", args=arguments)
    if given.out.suffix.lower() != ".npz":
        raise ConfigError(f"out: must be a .npz file (got {given.out})")
    query, gallery = _pair(given.query, given.gallery, given.key)
    with _options_checked(), op_progress() as progress:
        lists = rerank(
            query.unit(),
            gallery.unit(),
            given.k1,
            given.k2,
            given.lambda_value,
            topk=min(given.topk, len(gallery)),
            progress=progress,
        )
    arrays = {"indices": lists.indices.numpy(), "distances": lists.distances.numpy()}
    for name, side in (("query_paths", query), ("gallery_paths", gallery)):
        if side.paths is not None:
            arrays[name] = np.array(side.paths)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out, buffer.getbuffer())
    print(
        f"{given.out}: the best {lists.indices.shape[1]} of {len(gallery):,} for each of "
        f"{len(query):,} queries"
    )


@dataclass(frozen=True)
class _MetricsArguments:
    """Evaluate saved features: mAP, CMC, mINP. Identities and cameras are read from the files."""

    query: Path
    """File of features (.npz .pt .mat .parquet) with identities."""
    gallery: Path
    """File of features with identities; may be the same one, if it holds both."""
    rerank: bool = False
    """With k-reciprocal re-ranking too."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Of the features; euclidean takes rows as they are."""
    k1: int = ZHONG.k1
    """Neighbours of the re-ranking."""
    k2: int = ZHONG.k2
    """Neighbours in its query expansion."""
    lambda_value: float = ZHONG.lambda_value
    """Its share of the original distance."""
    key: str | None = None
    """Name of the features in the files, where it is not one of the usual ones."""
    json: bool = False
    """Print JSON in place of a table."""


def _metrics(arguments: list[str]) -> None:
    given = tyro.cli(_MetricsArguments, prog="dhcl metrics", args=arguments)
    query, gallery = _pair(given.query, given.gallery, given.key)
    labels = [*_both("ids", query, gallery, needed=True), *_both("cameras", query, gallery)]
    if len(labels) == 4:
        labels[2:] = cameras_apart(*labels[2:])
    pair = (query.values, gallery.values)
    if given.metric == "cosine":
        pair = (query.unit(), gallery.unit())
    with _options_checked(), op_progress() as progress:
        plain = evaluate_ranking(pair, *labels, max_rank=max(RANKS), progress=progress)
        rows = {"features": by_name(plain)}
        if given.rerank:
            distances = rerank(
                query.unit(),
                gallery.unit(),
                given.k1,
                given.k2,
                given.lambda_value,
                progress=progress,
            )
            rows["re-ranked"] = by_name(evaluate_ranking(distances, *labels, max_rank=max(RANKS)))
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    print(table(rows))
    cameras = "" if len(labels) == 4 else "; no cameras are known, so none is left out"
    print(f"{plain.num_valid:,} of {len(query):,} queries have a right match{cameras}")


def _both(
    what: Literal["ids", "cameras"], query: Features, gallery: Features, needed: bool = False
) -> list[torch.Tensor]:
    columns = [getattr(side, what) for side in (query, gallery)]
    for column, side in zip(columns, (query, gallery), strict=True):
        # Cameras of one side alone are of no use, and a mistake.
        if column is None and (needed or any(each is not None for each in columns)):
            raise ConfigError(
                f"{what}: there are none in {side.file} (it holds: "
                f"{', '.join(side.keys) or 'features alone'})"
            )
    return [] if columns[0] is None else common_numbers(*columns)


SERVICES = {
    "export": _export,
    "index": _index,
    "search": _search,
    "cluster": _cluster,
    "rerank": _rerank,
    "metrics": _metrics,
}
