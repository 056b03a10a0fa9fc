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
    print_other_kinds,
)
from dhcl.errors import ConfigError
from dhcl.words import say, show

if TYPE_CHECKING:
    from dhcl.inference.index import Index
    from dhcl.inference.ranked import RankedList
    from dhcl.inference.update import Update

__all__ = ["index", "search"]


@dataclass(frozen=True)
class IndexArguments:
    """Make an index of a gallery to search in, or change one."""

    gallery: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GALLERY …")]
    """Folders whose images, on all levels, are meant, and single image files."""
    out: Path
    """Folder that the index lies in."""
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
    pattern: str | None = None
    """Regular expression that finds identity and camera in the paths, as in training."""
    trained_cameras: bool = False
    """Whether the pattern's cameras are those of the training, so that their statistics count."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def index(given: IndexArguments) -> None:
    """Make an index, or change one."""
    if not given.gallery:
        raise ConfigError("gallery: folders of images or files must be given")
    if given.add + given.sync + given.remove > 1:
        raise ConfigError("add, sync and remove: choose one")
    from dhcl.inference.update import remove_images

    if not given.remove:
        print_other_kinds(given.gallery)
    with options_checked():
        if given.remove:
            done = remove_images(given.out, given.gallery)
        elif given.add or given.sync:
            done = _added(given)
        else:
            done = _created(given)
    say(f"{show(given.out)}: {done}")


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
    say(f"model: {model}")
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
    """Folder that the index lies in."""
    query: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUERY …")]
    """Images to search with, or folders of them."""
    topk: int = 20
    """Number of results for each query."""
    rerank: bool = False
    """Whether to order by k-reciprocal re-ranking, which compares all images of the index."""
    camera: tuple[str, ...] = ()
    """Cameras whose images may be found; without any, those of all cameras."""
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
    from dhcl.data.lists import identifier
    from dhcl.inference.index import Index
    from dhcl.inference.lookup import look_up, read_queries

    there = Index.open(given.index)
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
            cameras=[identifier(name) for name in given.camera] or None,
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
        say(as_json(lists, about))
    elif given.html is None and given.png is None:
        say(as_table(lists))
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
            say(f"written: {show(file)}")
