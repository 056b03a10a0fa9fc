"""The commands about a gallery: ``dhcl index`` and ``dhcl search``."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from dhcl.inference.gallery.store import Recall, Where
    from dhcl.inference.index import Index
    from dhcl.inference.ranked import RankedList
    from dhcl.inference.update import Update

__all__ = ["index", "search"]


@dataclass(frozen=True)
class IndexArguments:
    """Make an index of a gallery to search in, or change one."""

    gallery: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GALLERY …")
    ] = ()
    """Folders whose images, on all levels, are meant, and single image files."""
    out: Path | None = None
    """Folder that the index lies in."""
    store: str | None = None
    """Address of the index in place of a folder, such as milvus://host:port/collection."""
    run: Path | None = None
    """Folder of the run whose model extracts the features; later the index knows it."""
    which: Which = "last"
    """Checkpoint to use: of the last epoch, or of the one that looked best by test mAP."""
    add: bool = False
    """Whether to add new images to the index, and extract changed ones again."""
    sync: bool = False
    """Whether to do the same, and remove images that these folders no longer hold."""
    remove: bool = False
    """Whether to remove these files, and all below these folders, from the index."""
    neighbours: bool = False
    """Whether to find the nearest images of each image, so that --rerank of a search is quick."""
    ann: bool = False
    """Whether to build what `search --ann` needs, or build it anew, and tell its recall."""
    compact: bool = False
    """Whether to write a folder's index anew in few files, and free what it does not need."""
    convert: bool = False
    """Whether to bring an index of an earlier version to the present format, with its features."""
    features: Path | None = None
    """File of features and paths to make the index of, which the run's model extracted before."""
    export: Path | None = None
    """File to write the index's features to, .npz or .parquet."""
    pattern: str | None = None
    """Regular expression that finds identity and camera in the paths, as in training."""
    trained_cameras: bool = False
    """Whether the pattern's cameras are those of the training, so that their statistics count."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def index(given: IndexArguments) -> None:
    """Make an index, or change one."""
    if (given.out is None) == (given.store is None):
        raise ConfigError("out: the folder of the index must be given (--out INDEX), or --store")
    files = (given.features is not None) + (given.export is not None)
    if given.add + given.sync + given.remove + given.compact + given.convert + files > 1:
        raise ConfigError("add, sync, remove, compact, convert, features, export: choose one")
    place: Path | str = given.out if given.store is None else given.store  # type: ignore[assignment]
    later = given.neighbours or given.ann
    alone = given.compact or given.convert or files > 0 or (later and not given.gallery)
    if alone != (not given.gallery):
        rule = "can't be given with this option" if alone else "must be given"
        raise ConfigError(f"gallery: folders of images or files {rule}")
    if given.ann:
        from dhcl.inference.update import check_folder

        check_folder("ann", place)
    if not (given.remove or alone):
        print_other_kinds(given.gallery)
    with options_checked():
        done = _done(given, place)
    if done is not None:
        say(f"{show(place)}: {done}")
    if given.neighbours:
        _with_neighbours(place)
    if given.ann:
        _with_approximate(place)


def _with_neighbours(place: Path | str) -> None:
    from dhcl.inference.update import find_neighbours

    with op_progress() as progress:
        count = find_neighbours(place, progress)
    say(f"{show(place)}: the nearest images of {count:,} images were found")


def _with_approximate(place: Path | str) -> None:
    from dhcl.inference.update import approximate_index

    with op_progress() as progress:
        recall = approximate_index(place, progress)
    say(
        f"{show(place)}: ready for approximate search, recall {recall.share:.3f} on "
        f"{recall.queries:,} of its images"
    )


def _done(given: IndexArguments, place: Path | str) -> Update | str | None:
    from dhcl.inference.update import compact_index, convert_index, remove_images

    if given.convert:
        return convert_index(place)
    if given.compact:
        return compact_index(place)
    if given.remove:
        return remove_images(place, given.gallery)
    if given.export is not None:
        return _exported(given.export, place)
    if given.features is not None:
        return _of_features(given, given.features, place)
    if not given.gallery:
        return None
    return _added(given, place) if given.add or given.sync else _created(given, place)


def _exported(file: Path, place: Path | str) -> str:
    from dhcl.inference.index import Index
    from dhcl.inference.transfer import export_features

    return f"{export_features(Index.open(place), file):,} images written to {show(file)}"


def _of_features(given: IndexArguments, file: Path, place: Path | str) -> str:
    from dhcl.inference.reid import ReID
    from dhcl.inference.transfer import index_features

    if given.run is None:
        raise ConfigError("run: the folder of the run that made the features must be given (--run)")
    model = ReID.load(given.run, given.which, given.reading.device)
    return f"{index_features(place, file, model, pattern=given.pattern):,} images in the index"


def _added(given: IndexArguments, place: Path | str) -> Update:
    from dhcl.inference.index import Index
    from dhcl.inference.update import add_images

    old = Index.open(place)
    if given.pattern not in (None, old.pattern):
        raise ConfigError(
            f"pattern: the index has {old.pattern!r} (got {given.pattern!r}); make it anew"
        )
    model = old.load_model(given.run, given.reading.device)
    options = given.reading.options()
    return add_images(place, given.gallery, model, sync=given.sync, **options)


def _created(given: IndexArguments, place: Path | str) -> Update:
    from dhcl.inference.reid import ReID
    from dhcl.inference.update import create_index

    if given.run is None:
        raise ConfigError("run: the folder of a run must be given for a new index (--run RUN)")
    check_cameras(given.pattern, given.trained_cameras)
    model = ReID.load(given.run, given.which, given.reading.device)
    say(f"model: {model}")
    hint_cameras(model, given.pattern, given.trained_cameras)
    return create_index(
        place,
        given.gallery,
        model,
        pattern=given.pattern,
        trained_cameras=given.trained_cameras,
        **given.reading.options(),
    )


@dataclass(frozen=True)
class SearchArguments:
    """Find the people of some images in an index."""

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that the index lies in, or its address, such as milvus://host:port/collection."""
    query: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUERY …")]
    """Images to search with, or folders of them."""
    topk: int = 20
    """Number of results for each query."""
    rerank: bool = False
    """Whether to order by k-reciprocal re-ranking; quick where `index --neighbours` was before."""
    ann: bool = False
    """Whether to search approximately, with what `index --ann` has built; its recall is told."""
    camera: tuple[str, ...] = ()
    """Cameras whose images may be found; without any, those of all cameras."""
    id: tuple[str, ...] = ()
    """Identities whose images may be found."""
    since: str | None = None
    """Earliest time of images that may be found: seconds, or as in 2026-11-27T20:30:00."""
    until: str | None = None
    """Latest time of images that may be found."""
    below: tuple[Path, ...] = ()
    """Folders whose images may be found, and single files."""
    other_cameras: bool = False
    """Whether to leave out images of the query's own camera."""
    json: bool = False
    """Whether to print JSON in place of a table."""
    html: Path | None = None
    """File to write the ranked lists to, as a page that holds its pictures."""
    png: Path | None = None
    """File to write the ranked lists to, as one picture."""
    run: Path | None = None
    """Folder that the run of the model lies in now, if it was moved."""
    backend: Literal["auto", "torch", "faiss"] = "auto"
    """What computes similarities: faiss where it is installed, else torch. Both are exact."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def search(given: SearchArguments) -> None:
    """Look up queries in an index, and print or write the ranked lists."""
    if not given.query:
        raise ConfigError("query: images or folders of images must be given")
    if given.topk < 1:
        raise ConfigError(f"topk: must be at least 1 (got {given.topk})")
    if given.ann and given.rerank:
        raise ConfigError("ann: --rerank compares all images; choose one of them")
    from dhcl.inference.index import Index
    from dhcl.inference.lookup import look_up, read_queries

    there = Index.open(given.index)
    if given.ann:
        there.store.recall()  # what is missing is said before images are looked at
    print_other_kinds(given.query)
    queries = read_queries(there, given.query)
    if given.other_cameras and all(each.camera == -1 for each in queries):
        raise ConfigError(
            "other_cameras: the camera of no query is known; the index's pattern is "
            f"{there.pattern!r}"
        )
    model = there.load_model(given.run, given.reading.device)
    cameras = None
    if there.trained_cameras:
        cameras = model.camera_indices([each.camera for each in queries])
    features, kept = extracted(model, [each.path for each in queries], cameras, given.reading)
    with options_checked(), op_progress() as progress:
        lists = look_up(
            there,
            [queries[i] for i in kept],
            features,
            topk=given.topk,
            where=_where(given, there),
            other_cameras=given.other_cameras,
            rerank=given.rerank,
            approximate=given.ann,
            backend=given.backend,
            progress=progress,
        )
    _write_lists(given, there, lists)


def _where(given: SearchArguments, there: Index) -> Where:
    return there.where(
        cameras=given.camera or None,
        ids=given.id or None,
        since=_seconds("since", given.since),
        until=_seconds("until", given.until),
        below=given.below or None,
    )


def _seconds(name: str, text: str | None) -> float | None:
    from dhcl.data.folders import seconds

    found = None if text is None else seconds(text)
    if text is not None and found is None:
        raise ConfigError(
            f"{name}: must be seconds, or a time such as 2026-11-27T20:30:00 (got {show(text)})"
        )
    return found


def _approximate(recall: Recall | None) -> str:
    if recall is None:
        return "approximate: the server has an index of its own, whose recall is not known"
    return f"approximate: recall {recall.share:.3f} on {recall.queries:,} queries when built"


def _write_lists(given: SearchArguments, there: Index, lists: list[RankedList]) -> None:
    from dhcl.inference.ranked import as_json, as_table, write_png
    from dhcl.report.ranked import write_ranked

    order = "re-ranked distance" if given.rerank else "similarity"
    recall = there.store.recall() if given.ann else None
    approximate = _approximate(recall) if given.ann else ""
    if given.json:
        about: dict[str, Any] = {
            "index": there.address,
            "images": len(there),
            "model": there.model,
            "order": order,
        }
        if given.ann:
            known = {"recall": recall.share, "queries": recall.queries} if recall else None
            about["approximate"] = known
        say(as_json(lists, about))
    elif given.html is None and given.png is None:
        say(as_table(lists))
    if given.html is not None:
        about_page = (
            f"Queries: {len(lists):,}. Images in {show(there.address)}: {len(there):,}, ordered by "
            f"{order}; model {there.model[:12]}."
        ) + (f" {approximate[0].upper()}{approximate[1:]}." if approximate else "")
        write_ranked(given.html, lists, "Search results", about_page)
    if given.png is not None:
        write_png(given.png, lists)
    for file in (given.html, given.png):
        if file is not None and not given.json:
            say(f"written: {show(file)}")
    if approximate and not given.json:
        say(approximate)
