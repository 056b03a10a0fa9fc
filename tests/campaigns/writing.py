"""Each writer of files is killed at random moments."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dhcl.files import NpyRows, write_together
from dhcl.training.checkpoint import load_checkpoint, save_checkpoint
from dhcl.training.logs import RunLog


@contextlib.contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """The number of a process that does this work again and again, until it is killed."""
    pid = os.fork()
    if not pid:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it had ended by itself"


class Numbered:
    """Contents that are told apart, by a number that all of one has."""

    def __init__(self) -> None:
        self.number = 0

    def next(self) -> int:
        self.number += 1
        return self.number


def checkpoint_writer(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    numbers = Numbered()

    def write() -> None:
        number = numbers.next()
        save_checkpoint(folder / "last.pt", {"a": torch.full((50_000,), number), "n": number})

    def check() -> None:
        state = load_checkpoint(folder / "last.pt")
        assert bool((state["a"] == state["n"]).all())

    return write, check


def features_writer(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    numbers = Numbered()

    def write() -> None:
        rows = NpyRows(folder / "features.npy", 64)
        number = numbers.next()
        for _ in range(10):
            rows.append(np.full((50, 64), number))
        rows.close()

    def check() -> None:
        rows = np.load(folder / "features.npy")
        assert rows.shape == (500, 64)
        assert len(np.unique(rows)) == 1

    return write, check


def folder_writer(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """As ``save_pretrained`` and exports of several files write: each file is whole."""
    numbers = Numbered()

    def write() -> None:
        text = b"%08d" % numbers.next() * 20_000
        write_together(folder / "model", {"config.json": text, "model.safetensors": text})

    def check() -> None:
        for path in (folder / "model").iterdir():
            if path.is_file():
                text = path.read_bytes()
                assert text == text[:8] * 20_000

    return write, check


def log_writer(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    numbers = Numbered()
    run = folder / "run"
    size = folder / "size"  # as a checkpoint would say it

    def write() -> None:
        whole = int(size.read_text()) if size.exists() else 0
        log = RunLog(run, whole)
        for _ in range(20):
            log.add({"epoch": numbers.next(), "text": "x" * 2000})
            size.with_suffix(".new").write_text(str(log.size))
            size.with_suffix(".new").replace(size)
            if log.size > 100_000:
                break
        log.close()
        if log.size > 100_000:
            size.unlink()

    def check() -> None:
        if size.exists():
            kept = (run / "log.jsonl").read_bytes()[: int(size.read_text())]
            assert all(json.loads(line)["text"] == "x" * 2000 for line in kept.splitlines())
            head = (run / "log.csv").read_text().splitlines()[0]
            assert head == "epoch,text"

    return write, check


WRITERS = {
    "checkpoint": checkpoint_writer,
    "features": features_writer,
    "log": log_writer,
    "folder of a model": folder_writer,
}


def unfinished(place: Path) -> dict[Path, int]:
    """What is under a name for what is not whole, and when it was last written."""
    found = [path for path in place.rglob("*") if "partial" in path.name]
    return {path: path.stat().st_mtime_ns for path in found}


def writers(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Kill each writer at random moments, and look for what is not whole or was left behind."""
    caught = {}
    for name, make in WRITERS.items():
        place = folder / name
        place.mkdir()
        write, check = make(place)
        write()  # before, so that there is something to lose
        inside = 0
        for _ in range(n):
            before = unfinished(place)
            with child(write):
                time.sleep(draw.uniform(0.002, 0.05))
            # What a writer clears away from the kill before has the same name, and counts again.
            inside += bool(unfinished(place).items() - before.items())
            check()
        for _ in range(2):
            write()
        check()
        # A folder that was being filled stays, under a name that says so.
        left = [
            path.name for path in place.rglob("*.partial") if ".partial-" not in str(path.parent)
        ]
        assert not left, left
        caught[name] = {"kills": n, "in the middle of a file": inside}
    return caught
