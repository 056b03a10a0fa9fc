"""The commands about a gallery: ``dhcl index`` and ``dhcl search``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dhcl.cli.shared import (
    Reading,
    Which,
    check_cameras,
    extracted,
    hint_cameras,
    op_progress,
    options_checked,
)
from dhcl.errors import ConfigError
from dhcl.words import show

if TYPE_CHECKING:
    from dhcl.inference.index import Index
    from dhcl.inference.ranked import RankedList
    from dhcl.inference.update import Update

__all__ = ["index", "search"]


@dataclass(frozen=True)
class IndexArguments:
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
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def index(given: IndexArguments) -> None:
    """Make an index, or change one."""
    if not given.gallery:
        raise ConfigError("gallery: folders of images or files must be given")
    if given.add + given.sync + given.remove > 1:
        raise ConfigError("add, sync and remove: choose one")
    from dhcl.inference.update import remove_images

    with options_checked():
        if given.remove:
            done = remove_images(given.out, given.gallery)
        elif given.add or given.sync:
            done = _added(given)
        else:
            done = _created(given)
    print(f"{given.out}: {done}")


def _added(given: IndexArguments) -> Update:
    from dhcl.inference.index import Index
    from dhcl.inference.update import add_images

    old = Index.open(given.out)
    if given.pattern not in (None, old.pattern):
        raise ConfigError(
            f"pattern: the index has {old.pattern!r} (got {given.pattern!r}); make it anew"
        )
    model = old.load_model(given.run, given.reading.device)
    options = given.reading.options()
    return add_images(given.out, given.gallery, model, sync=given.sync, **options)


def _created(given: IndexArguments) -> Update:
    from dhcl.inference.reid import ReID
    from dhcl.inference.update import create_index

    if given.run is None:
        raise ConfigError("run: the folder of a run must be given for a new index (--run RUN)")
    check_cameras(given.pattern, given.trained_cameras)
    model = ReID.load(given.run, given.which, given.reading.device)
    print(f"model: {model}")
    hint_cameras(model, given.pattern, given.trained_cameras)
    return create_index(
        given.out,
        given.gallery,
        model,
        pattern=given.pattern,
        trained_cameras=given.trained_cameras,
        **given.reading.options(),
    )


@dataclass(frozen=True)
class SearchArguments:
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
    backend: Literal["auto", "torch", "faiss"] = "auto"
    """What computes similarities: faiss where it is installed, else torch. Both are exact."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def search(given: SearchArguments) -> None:
    """Look up queries in an index, and print or write the ranked lists."""
    if not given.query:
        raise ConfigError("query: images or folders of images must be given")
    if given.topk < 1:
        raise ConfigError(f"topk: must be at least 1 (got {given.topk})")
    from dhcl.inference.index import Index
    from dhcl.inference.lookup import look_up, read_queries

    there = Index.open(given.index)
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
            cameras=[int(name) if name.isdecimal() else name for name in given.camera] or None,
            other_cameras=given.other_cameras,
            rerank=given.rerank,
            backend=given.backend,
            progress=progress,
        )
    _write_lists(given, there, lists)


def _write_lists(given: SearchArguments, there: Index, lists: list[RankedList]) -> None:
    from dhcl.inference.ranked import as_json, as_table, write_png
    from dhcl.report.ranked import write_ranked

    order = "re-ranked distance" if given.rerank else "similarity"
    if given.json:
        about = {
            "index": str(there.folder),
            "images": len(there),
            "model": there.model,
            "order": order,
        }
        print(as_json(lists, about))
    elif given.html is None and given.png is None:
        print(as_table(lists))
    if given.html is not None:
        about_page = (
            f"Queries: {len(lists):,}. Images in {show(there.folder)}: {len(there):,}, ordered by "
            f"{order}; model {there.model[:12]}."
        )
        write_ranked(given.html, lists, "Search results", about_page)
    if given.png is not None:
        write_png(given.png, lists)
    for file in (given.html, given.png):
        if file is not None and not given.json:
            print(f"written: {file}")
