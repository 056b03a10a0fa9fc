"""From query files to ranked lists of an index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from dhcl.data import image_files, path_reader
from dhcl.inference.gallery.store import EVERYTHING, Where
from dhcl.inference.index import Index
from dhcl.inference.ranked import Listed, RankedList, Shown
from dhcl.inference.search import Backend, Found

__all__ = ["look_up", "read_queries"]


def read_queries(index: Index, given: Iterable[Path]) -> list[Shown]:
    """Query files, with what the index's pattern reads off their paths.

    A file of the index's own folders is seen as the index sees it; else a path is taken as given,
    below a folder that was given.

    Args:
        index: with a pattern, or without one: then nothing is known of any query.
        given: image files, and folders of them.

    Raises:
        DataError: a folder without images.
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


def look_up(
    index: Index,
    queries: Sequence[Shown],
    features: torch.Tensor,
    *,
    topk: int = 20,
    where: Where = EVERYTHING,
    cameras: Iterable[int | str] | None = None,
    other_cameras: bool = False,
    rerank: bool = False,
    approximate: bool = False,
    backend: Backend = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[RankedList]:
    """A ranked list of the index's images for each query.

    Args:
        index: to search in.
        queries: Q images.
        features: (Q, d) float32 of them, rows of length 1, of the model that made the index.
        other_cameras: leave out images of the query's own camera.
        topk, where, cameras, rerank, approximate, backend, progress: as of
            :meth:`dhcl.inference.index.Index.search`, which also says what it raises.
    """
    found = index.find(
        features,
        topk,
        where=where,
        cameras=cameras,
        leave_out=[each.camera for each in queries] if other_cameras else None,
        rerank=rerank,
        approximate=approximate,
        backend=backend,
        progress=progress,
    )
    return [_ranked(index, query, one) for query, one in zip(queries, found, strict=True)]


def _ranked(index: Index, query: Shown, found: Found) -> RankedList:
    results = []
    for place, record in enumerate(index.records_of(found.indices.numpy())):
        known = query.id != -1 and record.id != -1
        results.append(
            Listed(
                Shown(index.path_of(record), record.id, record.camera),
                float(found.similarities[place]),
                None if found.distances is None else float(found.distances[place]),
                record.id == query.id if known else None,
            )
        )
    return RankedList(query, tuple(results))
