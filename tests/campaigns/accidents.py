"""Trainings and indexes that are killed, begun twice, or told a wrong time."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dhcl.inference.index import Index
from dhcl.training.checkpoint import load_checkpoint
from PIL import Image, ImageOps

from tests.campaigns.processes import Command, import_what, on_writes, told
from tests.campaigns.writing import unfinished
from tests.dhcl.toy import command_line, options, write_images
from tests.dhcl.training.test_resume import CHECKPOINT_MINUTES, RECIPES, assert_same, result

DAY = 86400.0


class Trainings:
    """Runs of one recipe, each to end like the one that nothing happened to."""

    def __init__(self, pictures: Path, folder: Path, recipe: str) -> None:
        self.pictures, self.recipe = pictures, recipe
        self.changes = {
            **RECIPES[recipe],
            "checkpoint_minutes": CHECKPOINT_MINUTES,
            "iterations": 6,
        }
        whole = folder / f"whole-{recipe}"
        began = time.monotonic()
        self.start(whole).succeeds()
        self.seconds = time.monotonic() - began
        self.expected = self.outcome(whole)

    def words(self, run: Path) -> list[str]:
        """The command that begins a run, or goes on with it where there is one."""
        if (run / "config.yaml").exists():
            return ["train", "--resume", str(run)]
        return ["train", *command_line(options(self.pictures, run, self.recipe, **self.changes))]

    def start(self, run: Path, prepare: Callable[[], object] = int) -> Command:
        return Command(self.words(run), prepare)

    def outcome(self, run: Path) -> Any:
        """All that a run leaves: model, optimiser, memory, labels, the log, the metrics."""
        config = options(self.pictures, run, self.recipe, **self.changes)
        best = run / "checkpoints" / "best.pt"
        metrics = json.loads((run / "metrics.json").read_text())
        return result(config.run), metrics, load_checkpoint(best) if best.exists() else None

    def check(self, run: Path) -> None:
        """Go on to the end, compare, and remove the run."""
        self.start(run).succeeds()
        self.compare(run)
        shutil.rmtree(run)

    def compare(self, run: Path) -> None:
        assert_same(self.outcome(run), self.expected)
        assert not unfinished(run)


def recipes(folder: Path, names: tuple[str, ...] = tuple(RECIPES)) -> list[Trainings]:
    """Trainings of these recipes, once all that they need is imported."""
    pictures = write_images(folder / "pictures")
    first = options(pictures, folder / "first", "dhcl", iterations=1, epochs=1, eval_every=1)
    import_what(["train", *command_line(first)], folder)
    return [Trainings(pictures, folder, name) for name in names]


# ---- kills ---------------------------------------------------------------------------------------


def kills(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Kill runs at random moments, several times each, and compare how they end."""
    kinds, run = recipes(folder), folder / "run"
    counts = dict.fromkeys(("kills", "before a checkpoint", "in the middle of a file", "runs"), 0)
    while counts["kills"] < n:
        kind = kinds[counts["runs"] % len(kinds)]
        for _ in range(draw.randint(1, 8)):
            before = unfinished(run)
            if not kind.start(run).is_killed(draw.uniform(0, kind.seconds)):
                break
            counts["kills"] += 1
            counts["in the middle of a file"] += bool(unfinished(run).items() - before.items())
            counts["before a checkpoint"] += not (run / "checkpoints" / "last.pt").exists()
        kind.check(run)
        counts["runs"] += 1
    counts["runs equal to the undisturbed ones"] = counts.pop("runs")
    return counts


# ---- two processes -------------------------------------------------------------------------------


def two_processes(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Begin or go on with one run twice, and change an index twice: each time one is refused."""
    kinds, run = recipes(folder), folder / "run"
    for number in range(n):
        kind = kinds[number % len(kinds)]
        if number % 2:  # at the same moment
            first, second = kind.start(run), kind.start(run)
        else:  # while the first one is anywhere after its beginning
            kind.start(run).is_killed(draw.uniform(0, kind.seconds))
            first = kind.start(run, stopping(run, draw.randint(1, 3)))
            assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
            second = kind.start(run)
            assert second.ends()
            os.kill(first.pid, signal.SIGCONT)
        assert first.ends()
        assert second.ends()
        refused(first, second, r"out: another process( \(\d+ on .+\))? trains in .*; wait for it")
        kind.compare(run)
        shutil.rmtree(run)
    return {"pairs that train": n, "refused": n, **two_indexing(folder, n, draw)}


def stopping(run: Path, after: int) -> Callable[[], None]:
    """Prepares a training to be stopped (SIGSTOP) when it opens a file after so many."""
    opened = itertools.count()

    def act(name: str) -> None:
        if next(opened) == after:
            os.kill(os.getpid(), signal.SIGSTOP)

    return lambda: on_writes(run, act)


def refused(first: Command, second: Command, message: str) -> None:
    """One ended well and the other one at once, with a line that says why."""
    assert sorted([first.status, second.status]) == [0, 2], (first.said, second.said)
    said = second.said if second.status else first.said
    assert re.fullmatch(rf"dhcl: {message}[^\n]*\n", said), said


def two_indexing(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Two processes add images to an index at once: what one is refused can be done later."""
    gallery, index = folder / "pictures" / "bounding_box_test", folder / "index"
    make = ["index", str(gallery), "--run", str(folder / "first"), "--out", str(index)]
    import_what([*make, "--workers", "0"], folder)
    names, turned_away = read_names(index), 0
    for number in range(n):
        added = []
        for side in ("one", "other"):
            place = folder / "added" / f"{number}-{side}"
            shutil.copytree(folder / "pictures" / "query", place)
            added.append(["index", str(place), "--add", "--out", str(index), "--workers", "0"])
            names = sorted([*names, *(path.name for path in place.iterdir())])
        first = Command(added[0])
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.2)]))
        second = Command(added[1])
        assert first.ends()
        assert second.ends()
        if first.status or second.status:
            refused(first, second, r"index: another process.* is changing .*; try again")
            turned_away += 1
            Command(added[0 if first.status else 1]).succeeds()
        assert read_names(index) == names
    return {"pairs that index": n, "of these refused": turned_away}


def read_names(index: Path) -> list[str]:
    """Names of the images in an index, whose features are checked as they are read."""

    def read() -> list[str]:
        there = Index.open(index)
        assert len(there.features) == len(there)
        return sorted(Path(record.path).name for record in there.records)

    return told(read)


# ---- a wrong time --------------------------------------------------------------------------------


def clock(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Kill runs, set the times of all files to the future, and go on while the time goes back.

    Then the same for an index, whose images change in the meantime.
    """
    kinds, run = recipes(folder), folder / "run"
    for number in range(n):
        kind = kinds[number % len(kinds)]
        kind.start(run).is_killed(draw.uniform(0.3, 1) * kind.seconds)
        to_the_future(folder, draw)
        kind.start(run, going_back).succeeds()
        kind.compare(run)
        shutil.rmtree(run)
    return {"runs equal to the undisturbed ones": n, **changed_images(folder, n, draw)}


def to_the_future(folder: Path, draw: random.Random) -> None:
    later = time.time() + draw.uniform(1, 10**9)
    for path in folder.rglob("*"):
        os.utime(path, (later, later), follow_symlinks=False)


def going_back() -> None:
    """From here on it is a day earlier whenever this process asks for the time."""
    time.time = itertools.count(time.time(), -DAY).__next__
    time.time_ns = itertools.count(time.time_ns(), -int(DAY * 1e9)).__next__


def changed_images(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """An index takes up each image that was changed, and no other one, whatever the times say."""
    gallery, index = folder / "gallery", folder / "index"
    shutil.copytree(folder / "pictures" / "bounding_box_test", gallery)
    make = ["index", str(gallery), "--run", str(folder / "first"), "--workers", "0"]
    import_what([*make, "--out", str(index)], folder)
    images = sorted(gallery.iterdir())
    for _ in range(n):
        to_the_future(index, draw)
        about = os.stat(image := draw.choice(images))
        before = read_features(index)
        ImageOps.mirror(ImageOps.invert(Image.open(image))).save(image)
        # Earlier than it was, by as little as a file system may tell.
        earlier = about.st_mtime_ns - draw.choice([4_000, 10**9, int(DAY * 1e9)])
        os.utime(image, ns=(earlier, earlier))
        add = ["index", str(gallery), "--add", "--out", str(index), "--workers", "0"]
        Command(add, going_back).succeeds()
        after = read_features(index)
        others = before.keys() - {image.name}
        assert after.keys() == before.keys()
        assert after[image.name] != before[image.name], image
        assert all(after[name] == before[name] for name in others)
    return {"images that an index took up again": n}


def read_features(index: Path) -> dict[str, list[float]]:
    """The features in an index by the names of the images."""

    def read() -> dict[str, list[float]]:
        there = Index.open(index)
        rows = there.features.tolist()
        return {Path(r.path).name: row for r, row in zip(there.records, rows, strict=True)}

    return told(read)
