"""Indexes of a gallery in numbers: ``python -m benchmarks.gallery --rows 100000 --width 256``.

Each line is measured in a process of its own, after its imports: processor seconds, seconds, and
the memory it took above what was there before. Features are of people with twenty images each, seen
by eight cameras. Beside our exact search stand approximate search with its recall, Lance's own over
the same table, and faiss's flat and HNSW index over the same features in memory, where faiss is
installed; HNSW is approximate, so its recall is told. ``--neighbours`` adds re-ranking: the lists,
a query with and without them, and ten images that come. The folder takes 4 bytes for each row and
column, twice while it is compacted.

``--store milvus://127.0.0.1:19530/bench`` measures the same on a server, such as Milvus Lite's; the
processor seconds are then this side's alone. The collections are left there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dhcl.inference.gallery.places import Address, creating
from dhcl.inference.gallery.schema import About, Record, arrow_batch
from dhcl.inference.index import Index
from dhcl.inference.update import approximate_index, compact_index, find_neighbours
from numpy.typing import NDArray

PEOPLE, CAMERAS, TOPK, BATCH = 20, 8, 20, 100
BLOCK = 1 << 14
MODEL = "ab" * 32


def features(start: int, count: int, width: int) -> NDArray[np.float32]:
    """Rows of length 1, near to those of the same person; told by their numbers alone."""
    centres = np.random.default_rng([1, start // BLOCK])
    people = centres.standard_normal((count // PEOPLE + 1, width), dtype=np.float32)
    noise = np.random.default_rng([2, start]).standard_normal((count, width), dtype=np.float32)
    rows = people[np.arange(count) // PEOPLE] + 0.7 * noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def batch(start: int, count: int, width: int) -> Any:
    """Rows of the index, as they are written."""
    numbers = range(start, start + count)
    records = [
        Record(0, f"{n % 1000}/{n}.jpg", n // PEOPLE, n % CAMERAS, 10_000, n, float(n))
        for n in numbers
    ]
    return arrow_batch(np.array(numbers), features(start, count, width), records, MODEL)


def queries(count: int, width: int) -> torch.Tensor:
    """Near to rows of the index, and none of them."""
    rows = features(0, max(count, PEOPLE) * PEOPLE, width)[::PEOPLE][:count]
    noise = np.random.default_rng(5).standard_normal(rows.shape, dtype=np.float32)
    rows = rows + 0.02 * noise
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _resident() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))


@contextmanager
def measured(what: str) -> Iterator[dict[str, Any]]:
    """Print what the block took, as a line of JSON, with what it puts into the dictionary."""
    more: dict[str, Any] = {}
    before, wall, cpu = _resident(), time.perf_counter(), time.process_time()
    yield more
    seconds, used = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {"what": what, "cpu_s": used, "s": seconds, "peak_mb": max(0, peak - before) / 1024}
    print(json.dumps({**line, **more}), flush=True)


# ---- what is measured, a process each -----------------------------------------------------------


def build(folder: Address, rows: int, width: int) -> None:
    """Insert all rows."""
    about = About(MODEL, "/run", "last", None, False, ("/gallery",), width)
    made = 0.0

    def timed() -> Iterator[Any]:
        nonlocal made
        for start in range(0, rows, BLOCK):
            begun = time.process_time()
            one = batch(start, min(BLOCK, rows - start), width)
            made += time.process_time() - begun
            yield one

    with measured("build") as more, creating(folder, about) as writer:
        writer.insert(timed())
        more["of it making the rows, cpu_s"] = made
    if isinstance(folder, Path):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(json.dumps({"what": "disk", "mb": size / 2**20}))


def opened(folder: Address, rows: int, width: int) -> None:
    """Open it."""
    with measured("open"):
        index = Index.open(folder)
        assert len(index) >= rows - 100
    with measured("numbers of all rows"):
        assert len(index.numbers) == len(index)


def add(folder: Address, rows: int, width: int) -> None:
    """Add ten images."""
    with measured("add 10"), Index.open(folder).store.writing() as writer:
        writer.insert(iter([batch(writer.now.next_row, 10, width)]))


def remove(folder: Address, rows: int, width: int) -> None:
    """Remove ten."""
    with measured("remove 10"), Index.open(folder).store.writing() as writer:
        writer.delete(np.arange(5, rows, rows // 10)[:10])


def search(folder: Address, rows: int, width: int) -> None:
    """Our exact search."""
    index = Index.open(folder)
    one, many = queries(1, width), queries(BATCH, width)
    with measured("query, one, with checksums"):
        index.find(one, TOPK, backend="torch")
    with measured("query, one"):
        index.find(one, TOPK, backend="torch")
    with measured(f"queries, {BATCH} together"):
        index.find(many, TOPK, backend="torch")
    with measured(f"queries, {BATCH} together, of one camera"):
        index.find(many, TOPK, cameras=[3], backend="torch")
    with measured("query, one, of a folder"):
        where = index.where(below=["/gallery/77"])
        index.find(one, TOPK, where=where, backend="torch")


def lance(folder: Path, rows: int, width: int) -> None:
    """Lance's own exact search over the same table."""
    from dhcl.inference.gallery.tables import library

    table = library().dataset(str(folder / "rows.lance"))
    for count in (1, BATCH):
        with measured(f"Lance's own, {count} one by one"):
            for query in queries(count, width):
                near = {"column": "feature", "q": query.numpy(), "k": TOPK, "metric": "dot"}
                table.to_table(columns=["row"], nearest={**near, "use_index": False})


def approximate(folder: Path, rows: int, width: int) -> None:
    """Approximate search, by Lance's index and with our similarities."""
    with measured("index for approximate search, build") as more:
        more["recall on rows of the gallery"] = approximate_index(folder).share
    size = sum(file.stat().st_size for file in folder.glob("rows.lance/_indices/*/*"))
    print(json.dumps({"what": "disk of that", "mb": size / 2**20}))
    index = Index.open(folder)
    one, many = queries(1, width), queries(BATCH, width)
    expected = index.find(many, TOPK, backend="torch")
    for what in ("first", "later"):
        with measured(f"approximate query, one, {what}"):
            index.find(one, TOPK, approximate=True, backend="torch")
    with measured(f"approximate queries, {BATCH} together") as more:
        found = index.find(many, TOPK, approximate=True, backend="torch")
        hits = [
            len({*a.indices.tolist()} & {*b.indices.tolist()})
            for a, b in zip(expected, found, strict=True)
        ]
        more["recall"] = sum(hits) / (BATCH * TOPK)


def faiss(folder: Path, rows: int, width: int) -> None:
    """faiss over features in memory."""
    import faiss as library

    data = Index.open(folder).features
    query = queries(BATCH, width).numpy()
    flat = library.IndexFlatIP(width)
    with measured("faiss flat, build"):
        flat.add(data)
    with measured("faiss flat, one"):
        flat.search(query[:1], TOPK)
    with measured(f"faiss flat, {BATCH} together"):
        _, expected = flat.search(query, TOPK)
    graph = library.IndexHNSWFlat(width, 32, library.METRIC_INNER_PRODUCT)
    with measured("faiss HNSW, build"):
        graph.add(data)
    graph.hnsw.efSearch = 64
    with measured(f"faiss HNSW, {BATCH} together") as more:
        _, found = graph.search(query, TOPK)
        hits = [len(set(a) & set(b)) for a, b in zip(expected, found, strict=True)]
        more["recall"] = sum(hits) / (BATCH * TOPK)


def neighbours(folder: Path, rows: int, width: int) -> None:
    """Re-ranking, before and after the lists are there."""
    query = queries(1, width)
    with measured("re-rank, one, without lists"):
        [before] = Index.open(folder).find(query, TOPK, rerank=True)
    with measured("lists of all"):
        find_neighbours(folder)
    index = Index.open(folder)
    with measured("read lists"):
        assert index.lists is not None
    for what in ("first", "later"):
        with measured(f"re-rank, one, with lists, {what}"):
            [after] = index.find(query, TOPK, rerank=True)
    assert before.distances is not None
    assert after.distances is not None
    assert torch.allclose(before.distances, after.distances, atol=1e-5)
    with measured(f"re-rank, {BATCH} together, with lists"):
        index.find(queries(BATCH, width), TOPK, rerank=True)
    add(folder, rows, width)
    with measured("lists after 10 came") as more:
        more["changed"] = find_neighbours(folder)


def compacted(folder: Path, rows: int, width: int) -> None:
    """Write it anew."""
    with measured("compact"):
        compact_index(folder)


# Of these, a store on a server has the first five.
STAGES: dict[str, Callable[[Any, int, int], None]] = {
    one.__name__: one
    for one in (
        build,
        opened,
        add,
        remove,
        search,
        lance,
        approximate,
        faiss,
        neighbours,
        compacted,
    )
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--neighbours", action="store_true", help="re-ranking too")
    parser.add_argument("--folder", type=Path, help="where to put the index; it is removed")
    parser.add_argument("--store", help="address of an index on a server, in place of a folder")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        STAGES[given.stage](given.store or given.folder, given.rows, given.width)
        return
    skipped = set() if given.neighbours else {"neighbours"}
    if given.store:
        skipped |= {*list(STAGES)[5:]}
    if importlib.util.find_spec("faiss") is None:
        skipped.add("faiss")
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        sizes = ["--rows", str(given.rows), "--width", str(given.width)]
        for stage in STAGES:
            if stage in skipped:
                continue
            where = ["--store", given.store] if given.store else ["--folder", f"{place}/index"]
            words = ["--stage", stage, *where]
            command = [sys.executable, "-m", "benchmarks.gallery", *sizes, *words]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
