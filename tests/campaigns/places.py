"""Disks that are full, at each file that is written, and one that is taken away."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.accidents import Trainings, read_names, recipes
from tests.campaigns.processes import FILLER, Command, final_name, import_what, on_writes
from tests.dhcl.data.walks import write_walk
from tests.dhcl.training.test_resume import assert_same, result

# Bytes of the disk: more than anything takes here.
DISK = 48 << 20
FULL = "No space left|the disk is full|File too large"


def mounts() -> bool:
    """Whether file systems can be mounted, which takes root."""
    return not os.geteuid() and shutil.which("mount") is not None


@contextlib.contextmanager
def mounted(place: Path, *words: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system of its own; where none can be mounted a folder, with a limit for each file."""
    place = folder / "disk"
    if mounts():
        with mounted(place, "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs"):
            yield place
    else:
        place.mkdir()
        yield place
        shutil.rmtree(place)


# ---- when a file is opened to be written ---------------------------------------------------------


def listing(place: Path, names: Path) -> Callable[[], None]:
    """Prepares a command to list the files that it writes, each time that it opens one."""

    def prepare() -> None:
        handle = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        on_writes(place, lambda name: os.write(handle, f"{json.dumps(name)}\n".encode()))

    return prepare


def filling(place: Path, name: str, time: int, free: int) -> Callable[[], None]:
    """Prepares a command for a disk that has so much free when it opens this file to write.

    Args:
        place: where the disk is mounted.
        name: of the file.
        time: how many times it was opened before.
        free: bytes.
    """
    left = [time]

    def act(opened: str) -> None:
        if opened == name:
            if not left[0]:
                fill(place, free)
            left[0] -= 1

    return lambda: on_writes(place, act)


def fill(place: Path, free: int) -> None:
    if not mounts():  # of each file it is then
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
        return
    handle = os.open(place / FILLER, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(handle, bytes(1 << 20))
    os.ftruncate(handle, max(os.fstat(handle).st_size - free, 0))
    os.close(handle)


def files_below(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file() and path.name != FILLER]


def bytes_below(place: Path) -> int:
    return sum(path.stat().st_size for path in files_below(place))


# ---- commands ------------------------------------------------------------------------------------


@dataclass
class Writer:
    """A command, and what it writes.

    Attributes:
        words: of the command, below this folder of the disk.
        renews: whether it replaces what it wrote before; else it makes something new.
    """

    words: Callable[[Path], list[str]]
    renews: bool = True


def commands(run: Path, gallery: Path, walk: Path, features: Path) -> dict[str, Writer]:
    """All commands that write files, but for trainings."""
    alone = ["--workers", "0"]
    reads = ["--query", str(features), "--gallery", str(features)]

    def export(*words: str) -> Callable[[Path], list[str]]:
        return lambda out: ["export", str(run), *words[:-1], str(out / words[-1])]

    images = ["--features", str(gallery), *alone]
    boxes = [str(walk / "boxes.txt"), "--frames", str(walk / "img1")]
    drawn = ["--ids", "4", "--cameras", "2", "--image-size", "32", "16", "--workers", "1"]
    pictures = [str(gallery), "--run", str(run), *alone]
    found = {
        "weights": Writer(export("--weights", "weights.pth")),
        "a network in ONNX": Writer(export("--onnx", "model.onnx")),
        "weights in safetensors": Writer(export("--weights", "weights.safetensors")),
        "a folder for the hub": Writer(export("--pretrained", "model")),
        "features in npz": Writer(export(*images, "--out", "features.npz")),
        "features in parquet": Writer(export(*images, "--out", "features.parquet")),
        "labels": Writer(lambda out: ["cluster", str(features), "--out", f"{out}/labels.csv"]),
        "lists": Writer(lambda out: ["rerank", *reads, "--out", f"{out}/lists.npz"]),
        "a report": Writer(lambda out: ["report", str(run), "--out", f"{out}/report.html"]),
        "a comparison": Writer(
            lambda out: ["compare", str(run), str(run), "--out", f"{out}/compare.html"]
        ),
        "crops": Writer(lambda out: ["crops", *boxes, "--out", str(out / "crops")], renews=False),
        "drawn people": Writer(lambda out: ["synth", str(out / "drawn"), *drawn], renews=False),
        "drawn people again": Writer(
            lambda out: ["synth", str(out / "drawn"), *drawn, "--overwrite"]
        ),
        "an index": Writer(lambda out: ["index", *pictures, "--out", str(out / "index")], False),
    }
    index = run.parent / "index"
    for kind in ("html", "png"):
        words = ["search", str(index), str(next(gallery.iterdir())), *alone, f"--{kind}"]
        found[f"results in {kind}"] = Writer(
            lambda out, words=words, kind=kind: [*words, f"{out}/found.{kind}"]  # type: ignore[misc]
        )
    return found


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in files_below(place)}


class Attempts:
    """Commands on disks that are filled while they write, and what came of it."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.sizes: dict[str, dict[str, int]] = {}
        self.disks = self.too_small = 0

    def written(self, what: str, words: list[str], place: Path) -> dict[str, int]:
        """The files that a command writes on a disk with room, and how often each."""
        names = self.folder / "names"
        Command(words, listing(place, names)).succeeds()
        opened = [json.loads(line) for line in names.read_text().splitlines()]
        there = {final_name(path.relative_to(place)): path for path in files_below(place)}
        sizes = {name: there[name].stat().st_size for name in opened if name in there}
        # Locks and what was removed again are empty; more follows them.
        self.sizes[what] = {name: sizes.get(name) or bytes_below(place) for name in opened}
        return {name: opened.count(name) for name in opened}

    def fails(self, what: str, words: list[str], place: Path, name: str, times: int) -> bool:
        """Run it on a disk that is full by then; whether it failed, which it must say why."""
        room = self.draw.choice([0, self.draw.randrange(self.sizes[what][name])])
        command = Command(words, filling(place, name, self.draw.randrange(times), room))
        assert command.ends()
        self.disks += 1
        (place / FILLER).unlink(missing_ok=True)
        if not command.status:
            return False
        self.too_small += 1
        about = f"{what}, {name}, {room} bytes free: {command.said}"
        assert re.search(FULL, command.said), about
        assert "Traceback" not in command.said, about
        assert str(place) in command.said, about
        assert all(line.startswith("dhcl: ") for line in command.said.splitlines()), about
        return True

    def result(self) -> dict[str, Any]:
        return {
            "files": sum(map(len, self.sizes.values())),
            "commands": len(self.sizes),
            "disks": self.disks,
            "too small": self.too_small,
        }


def disks(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """For each file that is written, n disks that are full when it is, or a little later.

    The command says so, what was there before is there still, and it succeeds on another disk.
    """
    attempts = Attempts(folder, draw)
    [kind] = recipes(folder, ("dhcl",))
    training_disks(attempts, kind, folder, n)
    run, gallery = folder / "whole-dhcl", folder / "pictures" / "bounding_box_test"
    walk = write_walk(folder / "walk", people=(0, 1), frames=2)
    features, index = folder / "features.npz", folder / "index"
    Command(
        ["export", str(run), "--features", str(gallery), "--out", str(features), "--workers", "0"]
    ).succeeds()
    make = ["index", str(gallery), "--run", str(run), "--workers", "0", "--out", str(index)]
    Command(make).succeeds()
    for what, writer in commands(run, gallery, walk, features).items():
        command_disks(attempts, what, writer, n)
    index_disks(attempts, folder, n)
    for what, words in trainings_on_drawn_people().items():
        drawn_disks(attempts, what, words, n)
    return attempts.result()


def training_disks(attempts: Attempts, kind: Trainings, folder: Path, n: int) -> None:
    with disk(folder) as place:
        run = place / "run"
        written = attempts.written("a training", kind.words(run), place)
        kind.compare(run)
        for name, times in written.items():
            for _ in range(n):
                shutil.rmtree(run)
                if attempts.fails("a training", kind.words(run), place, name, times):
                    elsewhere = folder / "elsewhere"
                    if run.exists():
                        shutil.copytree(run, elsewhere)
                    kind.check(elsewhere)
                    kind.start(run).succeeds()
                kind.compare(run)


def command_disks(attempts: Attempts, what: str, writer: Writer, n: int) -> None:
    other = attempts.folder / "other"
    other.mkdir()
    import_what(writer.words(other), attempts.folder)
    with disk(attempts.folder) as place:
        if writer.renews:
            Command(writer.words(place)).succeeds()
        written = attempts.written(what, writer.words(place), place)
        assert written or what == "an index", what
        whole = contents(place)
        for name, times in written.items():
            for _ in range(n):
                if not writer.renews:
                    shutil.rmtree(next(place.iterdir()))
                before = contents(place)
                if attempts.fails(what, writer.words(place), place, name, times):
                    assert contents(place) == before, (what, name)
                    Command(writer.words(place)).succeeds()
                assert contents(place).keys() == whole.keys() or what == "an index"
    shutil.rmtree(other)


def index_disks(attempts: Attempts, folder: Path, n: int) -> None:
    """Images are added to an index on a disk that has too little room for them."""
    with disk(folder) as place:
        index = place / "index"
        shutil.copytree(folder / "index", index)
        add = ["index", str(folder / "pictures" / "query"), "--add", "--workers", "0"]
        words = [*add, "--out", str(index)]
        written = attempts.written("images added to an index", words, place)
        for name, times in written.items():
            for _ in range(4 * n):
                shutil.rmtree(index)
                shutil.copytree(folder / "index", index)
                before = read_names(index)
                if attempts.fails("images added to an index", words, place, name, times):
                    assert read_names(index) == before
                    Command(words).succeeds()
                assert len(read_names(index)) > len(before)


def trainings_on_drawn_people() -> dict[str, Callable[[Path], list[str]]]:
    """Commands that draw people, train on them and may go on where they were stopped."""
    small = ["--ids", "8", "--cameras", "2", "--image-size", "32", "16"]
    small += ["--epochs", "1", "--iterations", "2"]
    return {
        "a demo": lambda out: ["demo", "--out", str(out), *small, "--images-per-camera", "3"],
        "a pretraining": lambda out: ["pretrain", str(out), *small, "--workers", "0"],
    }


def drawn_disks(attempts: Attempts, what: str, words: Callable[[Path], list[str]], n: int) -> None:
    """The same command goes on, and all is there then: people, their picture, scores, the model."""
    other = attempts.folder / "other"
    import_what(words(other), attempts.folder)
    shutil.rmtree(other)
    with disk(attempts.folder) as place:
        out = place / "out"
        written = attempts.written(what, words(out), place)
        whole = outcome_of_drawn(out)
        for name, times in written.items():
            for _ in range(n):
                shutil.rmtree(out)
                attempts.fails(what, words(out), place, name, times)
                Command(words(out)).succeeds()
                assert_same(outcome_of_drawn(out), whole)


def outcome_of_drawn(out: Path) -> Any:
    """What such a command leaves, but for times and what has them in it."""
    said = [json.loads(path.read_text()) for path in sorted(out.rglob("*.json"))]
    for about in said:
        about.pop("minutes", None)
    drawn = {k: data for k, data in contents(out).items() if k.endswith((".jpg", ".png"))}
    states = [result(path.parent.parent) for path in sorted(out.rglob("last.pt"))]
    names = {final_name(path.relative_to(out)) for path in files_below(out)}
    return sorted(names), said, drawn, states


# ---- a disk that is taken away -------------------------------------------------------------------


def network_folder(folder: Path, n: int, draw: random.Random) -> dict[str, Any]:
    """Unmount the folder of a run while it is trained, as if the network had gone.

    The command says so and writes nothing in its place; once it is back, the run goes on.
    """
    if not mounts():
        return {"skipped": "only root can mount and unmount a folder"}
    kinds, server = recipes(folder), folder / "server"
    server.mkdir()
    place = folder / "mounted"
    ended = 0
    for number in range(n):
        kind = kinds[number % len(kinds)]
        run = place / "run"
        with mounted(place, "--bind", str(server)):
            command = kind.start(run)
            command.ends(draw.uniform(0.1, 1) * kind.seconds)
        assert command.ends()
        said = command.said
        if command.status:
            ended += 1
            assert "Traceback" not in said, said
            assert all(line.startswith("dhcl: ") for line in said.splitlines()), said
            assert str(run) in said, said
        assert not contents(place), (contents(place).keys(), command.status, said)
        with mounted(place, "--bind", str(server)):
            kind.check(run)
    return {"unmounted": n, "while a run was under way": ended, "runs equal to the undisturbed": n}
