"""An index is changed by processes that are killed: nothing that was acknowledged is lost.

`python -m tests.dhcl.inference.gallery.kills --runs 50` kills fifty of them, at random moments of
adding, changing, removing, compacting and finding neighbours, and looks at the index after each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dhcl.inference.gallery.lance import compact
from dhcl.inference.gallery.schema import arrow_batch
from dhcl.inference.index import Index
from dhcl.inference.update import find_neighbours

from tests.dhcl.inference.gallery.made import MODEL, WIDTH, make, records, unit_rows


def features_of(numbers):
    """Of a row, told by its number alone."""
    return np.concatenate([unit_rows(1, seed=number) for number in numbers])


def insert(folder, count, gone=()):
    with Index.open(folder).store.writing() as writer:
        start = writer.now.next_row
        rows = list(range(start, start + count))
        images = records(count, start)
        if rows:
            writer.insert(iter([arrow_batch(np.array(rows), features_of(rows), images, MODEL)]))
        writer.delete(np.array(gone, np.int64))


def in_child(work: Callable[[], None]) -> int:
    """Start it in a forked process; Lance must not have been used in this one."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def succeeds(work: Callable[[], None]) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0


def change(folder: Path, seed: int, told: int) -> None:
    """Changes without end; what the index is to hold is told before and after each."""
    chance = random.Random(seed)
    numbers = set(Index.open(folder).numbers.tolist())
    while True:
        following = Index.open(folder).store.next_row
        after = set(numbers)
        kind = chance.choice(["add", "change", "remove", "compact", "neighbours"])
        if kind in ("add", "change"):
            count = chance.randrange(1, 30)
            gone = chance.sample(sorted(numbers), min(count, 5)) if kind == "change" else []
            after |= set(range(following, following + count))
        else:
            count = 0
            gone = chance.sample(sorted(numbers), len(numbers) // 5) if kind == "remove" else []
        after -= set(gone)
        os.write(told, (json.dumps([kind, sorted(after)]) + "\n").encode())
        if kind == "compact":
            compact(folder)
        elif kind == "neighbours":
            find_neighbours(folder)
        else:
            insert(folder, count, gone)
        os.write(told, b'"done"\n')
        numbers = after


def check(folder: Path, allowed: list[list[int]]) -> None:
    """The index holds what it was to hold before or after the change, and takes another one."""
    index = Index.open(folder)
    numbers = index.numbers.tolist()
    assert numbers in allowed, (numbers, allowed)
    assert np.array_equal(index.features, features_of(numbers))
    assert [record.path for record in index.records] == [records(1, n)[0].path for n in numbers]
    found = index.search(torch.eye(WIDTH)[:1], 5, rerank=True)
    assert len(found[0].indices) == 5
    insert(folder, 1)
    assert Index.open(folder).numbers.tolist() == [*numbers, index.store.next_row]


def killed_once(folder: Path, seed: int, state: list[int]) -> tuple[str, list[int]]:
    """Kill a process that changes the index; returns what it was doing, and what is there now."""
    reader, writer = os.pipe()
    child = in_child(lambda: change(folder, seed, writer))
    os.close(writer)
    begin = os.read(reader, 1 << 16)  # it has begun
    time.sleep(random.Random(seed).uniform(0.0, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        text = begin.decode() + told.read()
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    doing, begun = "", state
    for line in lines:
        if line == "done":
            doing, state = "between", begun
        else:
            doing, begun = line
    succeeds(lambda: check(folder, [state, begun]))
    now, later = os.pipe()

    def tell() -> None:
        os.write(later, json.dumps(Index.open(folder).numbers.tolist()).encode())

    succeeds(tell)
    os.close(later)
    with os.fdopen(now) as told:
        return doing, json.loads(told.read())


def kill(folder: Path, runs: int, seed: int) -> dict[str, int]:
    """Kill so many, and count what they were doing."""
    succeeds(lambda: make_one(folder))
    state, counts = list(range(1, 41)), dict[str, int]()
    for run in range(runs):
        doing, state = killed_once(folder, seed + run, state)
        counts[doing] = counts.get(doing, 0) + 1
    succeeds(lambda: bounded(folder))
    return counts


def make_one(folder: Path) -> None:
    make(folder, 1)
    insert(folder, 39)
    # The first row was made with another feature than its number tells.
    with Index.open(folder).store.writing() as writer:
        rows = np.arange(writer.now.next_row, writer.now.next_row + 1)
        writer.insert(iter([arrow_batch(rows, features_of(rows), records(1, 40), MODEL)]))
        writer.delete(np.array([0]))


def bounded(folder: Path) -> None:
    """Nothing remains of what was replaced, once the index is compacted."""
    compact(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    rows = len(Index.open(folder))
    assert sum(file.stat().st_size for file in files) < 60_000 + 800 * rows, files
    assert len(files) < 20, files


def full_disk(folder: Path) -> None:
    """No file may grow beyond some size, as if the disk were full."""
    before = Index.open(folder).numbers.tolist()
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        insert(folder, 2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check(folder, [before])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill(Path(folder, "index"), given.runs, given.seed)
    print(f"{given.runs} killed, nothing lost:", counts)


if __name__ == "__main__":
    main()
