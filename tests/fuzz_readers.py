"""Coverage-guided fuzzing of everything that reads bytes of others, by atheris.

    python -m tests.fuzz_readers                          # 1,000,000 inputs of each reader
    python -m tests.fuzz_readers --runs 5000 options log  # two of them
    python -m tests.fuzz_readers --minutes 10             # as many as there is time for

It needs atheris (pip install 'dhcl[fuzz]'); without it the inputs are random changes of good files,
as in the test suite. A reader gives something or one of the errors that it names, in less than
TIMEOUT seconds and MEMORY MiB. Good files are made here; `tests/fuzz_corpus/READER` has inputs that
reach further. What fails is kept as an input in the folder .build beside this file, and
`python -m tests.fuzz_readers READER --input FILE` runs it again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE / ".build"
CORPUS = HERE / "fuzz_corpus"
TIMEOUT = 20
MEMORY = 3000
LONGEST = 1 << 13
# What atheris follows: modules, with those below them.
WATCHED = ["dhcl", "yaml", "zipfile", "safetensors", "PIL", "csv", "json", "numpy.lib._format_impl"]
WATCHED += ["numpy.lib._npyio_impl", "torch.serialization", "torch._weights_only_unpickler"]


@dataclass(frozen=True)
class Reader:
    """One that reads bytes of others.

    Attributes:
        file: what the bytes are written to, below a folder.
        seeds: makes what else lies in that folder, and gives the bytes of good files.
        read: reads it, given the folder.
        errors: what it may raise.
        starts: how their texts start; "" for any.
    """

    file: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[BaseException], ...]
    starts: str = ""


def _imports() -> None:
    """All that is fuzzed, so that atheris can watch it."""
    for name in (
        "dhcl.cli",
        "dhcl.data",
        "dhcl.data.images",
        "dhcl.data.mot",
        "dhcl.inference.features",
        "dhcl.inference.hub",
        "dhcl.inference.gallery.old",
        "dhcl.models.weights",
        "dhcl.training.logs",
        "dhcl.training.record",
    ):
        importlib.import_module(name)


def readers() -> dict[str, Reader]:
    """All of them, by name."""
    from dhcl.config import load_config, read_options
    from dhcl.data import load_data
    from dhcl.data.images import read_image, thumbnail
    from dhcl.data.mot import read_mot
    from dhcl.errors import CheckpointError, ConfigError, DataError, DHCLError, FeatureError
    from dhcl.inference.apart import read_answer
    from dhcl.inference.features import read_features
    from dhcl.inference.gallery.head import read_head
    from dhcl.inference.gallery.old import read_old
    from dhcl.inference.hub import read_folder
    from dhcl.models.weights import read_states
    from dhcl.stored import Damaged
    from dhcl.training.checkpoint import load_checkpoint
    from dhcl.training.logs import RunLog
    from dhcl.training.record import measured, read_record

    from tests.dhcl.inference.gallery.made import make_old

    def features(kind: str, seeds: Callable[[Path], list[bytes]]) -> Reader:
        file = f"f.{kind}"
        return Reader(file, seeds, lambda at: read_features(at / file), (FeatureError,), "features")

    def weights(file: str, seeds: Callable[[Path], list[bytes]]) -> Reader:
        read = (ValueError, FileNotFoundError)
        return Reader(file, seeds, lambda at: read_states(at / file), read, "weights: ")

    def run(file: str, seeds: Callable[[Path], list[bytes]]) -> Reader:
        def read(at: Path) -> None:
            read_record(at)
            measured(at, "last")

        return Reader(file, seeds, read, (ConfigError,), "run: ")

    def old(file: str) -> Reader:
        def seeds(at: Path) -> list[bytes]:
            make_old(at / "index")
            return [(at / "index" / file).read_bytes()]

        read = (DataError,)
        return Reader(f"index/{file}", seeds, lambda at: read_old(at / "index"), read, "index: ")

    def log(at: Path) -> None:
        size = (at / "log.jsonl").stat().st_size
        RunLog(at, size).close()
        shutil.rmtree(at / "tensorboard")

    def picture(at: Path) -> None:
        with contextlib.suppress(Exception):  # whatever the decoder raises, as it says
            thumbnail(at / "a.img", 16)
        read_image(at / "a.img")

    def answer(at: Path) -> None:
        with (at / "answer").open("rb") as stream:
            read_answer(stream, 1 << 20)

    return {
        "npy": features("npy", _npy),
        "npz": features("npz", _npz),
        "pt": features("pt", _pt),
        "answer": Reader("answer", _answers, answer, (Damaged,)),
        "weights": weights("w.pth", _pt),
        "safetensors": weights("w.safetensors", _safetensors),
        "shards": weights("w.safetensors.index.json", _shards),
        "checkpoint": Reader(
            "c.pt", _pt, lambda at: load_checkpoint(at / "c.pt"), (CheckpointError,), "checkpoint: "
        ),
        "state": run("checkpoints/last.pt", _states),
        "record": run("log.jsonl", _logs),
        "metrics": run("metrics.json", _metrics),
        "log": Reader("log.jsonl", _logs, log, (CheckpointError,), "log: "),
        "options": Reader("o.yaml", _yaml, lambda at: read_options(at / "o.yaml"), (ConfigError,)),
        "config": Reader("o.yaml", _yaml, lambda at: load_config(at / "o.yaml"), (ConfigError,)),
        "model": Reader("config.json", _model, read_folder, (DHCLError,), "model: "),
        "head": Reader("index.json", _head, read_head, (DataError,), "index: "),
        "index": old("index.json"),
        "images": old("images-1.jsonl"),
        "vectors": old("features-1.npy"),
        "boxes": Reader("b.txt", _boxes, lambda at: read_mot(at / "b.txt"), (DataError,), "boxes"),
        "list": Reader(
            "train_test_split/train_list.txt",
            _list,
            lambda at: load_data("vehicleid", at),
            (DataError,),
        ),
        "image": Reader("a.img", _pictures, picture, (DataError,), "image: "),
    }


# ---- good files ---------------------------------------------------------------------------------


def _rows() -> Any:
    import numpy as np

    rows = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _npy(_: Path) -> list[bytes]:
    import numpy as np

    out = []
    for array in (_rows(), _rows().astype(">f8", order="F"), np.arange(6).reshape(2, 3)):
        file = io.BytesIO()
        np.save(file, array)
        out.append(file.getvalue())
    return out


def _npz(_: Path) -> list[bytes]:
    import numpy as np

    out = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, features=_rows(), ids=np.arange(4), paths=np.array(list("abcd")), model="m")
        out.append(file.getvalue())
    return out


def _pt(_: Path) -> list[bytes]:
    import numpy as np
    import torch

    rows = torch.from_numpy(_rows())
    out = []
    for content in (rows, {"features": rows.half(), "ids": [1, 2, 3, 4], "a": np.arange(4)},
                    {"model": {"w": rows, "v": rows[:2]}, "n": 1}):  # fmt: skip
        for new in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            out.append(file.getvalue())
    return out


def _answers(_: Path) -> list[bytes]:
    cells = [["<U1", [1], None], None, "b", 1.5]
    found = {"features": ["<f4", [4, 3], None], "paths": [None, [2, 2], cells], "model": "m"}
    rows = _rows().tobytes() + "a".encode("utf-32-le")
    errors = ["ValueError", "no such", {}]
    return [
        json.dumps(["", "", found]).encode() + b"\n" + rows,
        json.dumps(errors).encode() + b"\n",
    ]


def _safetensors(_: Path) -> list[bytes]:
    import torch
    from safetensors.torch import save

    rows = torch.from_numpy(_rows())
    return [save({"a": rows, "b.c": rows.half(), "d": torch.arange(3)}), save({})]


def _shards(at: Path) -> list[bytes]:
    for name, content in zip("ab", _safetensors(at), strict=True):
        (at / name).write_bytes(content)
    return [
        json.dumps({"weight_map": {"a": "a", "b.c": "a", "d": "a"}}).encode(),
        b'{"weight_map":{}}',
    ]


_OPTIONS = """\
model:
  backbone: resnet18
loss: {temperature: 0.05, beta: &b 0.5}
epochs: 0x10
data: {root: ~, workers: 1_0}
x: !!python/none
<<: [{seed: 1}, {seed: *b}]
"""


def _yaml(_: Path) -> list[bytes]:
    from dhcl.config import TrainConfig

    return [_OPTIONS.encode(), b"epochs: 3\nlr: 1e-3\n", TrainConfig().to_yaml().encode()]


def _run(at: Path) -> None:
    (at / "checkpoints").mkdir()
    (at / "config.yaml").write_bytes(_yaml(at)[1])
    (at / "checkpoints/last.pt").write_bytes(_states(None)[0])
    (at / "log.jsonl").write_bytes(_logs(None)[0])
    (at / "metrics.json").write_bytes(_metrics(None)[0])


def _states(at: Path | None) -> list[bytes]:
    import dataclasses

    import torch
    from dhcl.training.checkpoint import FORMAT, Progress

    if at:
        _run(at)
    rows = torch.from_numpy(_rows())
    state = {
        "format": FORMAT,
        "progress": dataclasses.asdict(Progress(1, entry={"a": 1})),
        "bank": {"features": rows},
        "labels": torch.tensor([0, 1, -1, 0]),
        "images": "ab",
        "metrics": {"mAP": 0.5},
    }
    file = io.BytesIO()
    torch.save(state, file)
    return [file.getvalue()]


def _logs(at: Path | None) -> list[bytes]:
    if at:
        _run(at)
    entries = [{"epoch": n, "loss": 0.5, "time": {"knn": 1e-3}, "x": None} for n in (1, 2)]
    return ["".join(json.dumps(each) + "\n" for each in entries).encode()]


def _metrics(at: Path | None) -> list[bytes]:
    if at:
        _run(at)
    metrics = {"last": {"epoch": 0, "mAP": 0.5}, "best": {"mAP": 1}, "protocol": {"ap": "hits"}}
    return [json.dumps(metrics).encode()]


def _model(at: Path) -> list[bytes]:
    import torch
    from dhcl.config import TrainConfig
    from dhcl.inference.hub import Description, write_folder

    about = Description(TrainConfig(), "last", "ab" * 32, 2, (1, "x"), {"mAP": 0.5}, "1")
    write_folder(at / "new", {"a": torch.from_numpy(_rows())}, about, "card")
    for file in list((at / "new").iterdir()):
        file.rename(at / file.name)
    (at / "new").rmdir()
    return [(at / "config.json").read_bytes()]


def _head(at: Path) -> list[bytes]:
    from dhcl.inference.gallery.head import Head

    Head(
        generation=1,
        images=4,
        dim=3,
        next_row=4,
        version=2,
        neighbours=None,
        model="ab" * 32,
        run="/runs/a",
        which="last",
        pattern=r"(?P<id>\d+)",
        trained_cameras=False,
        roots=["/pictures"],
        files={"_versions/2.manifest": 7},
    ).write(at)
    return [(at / "index.json").read_bytes()]


def _boxes(_: Path) -> list[bytes]:
    return [b"1,1,10,20,30.5,60,1,-1,-1,-1\n2,1,1e1,2,3,4,0\n\n", b'"1",2,3,4,5,6\r\n']


def _list(at: Path) -> list[bytes]:
    good = b"0000001 5\n0000002 5\n0000003 9\n"
    (at / "image").mkdir()
    (at / "train_test_split").mkdir()
    for name in ("train_list", "test_list_800", "test_list_1600", "test_list_2400"):
        (at / "train_test_split" / f"{name}.txt").write_bytes(good)
    return [good, "ä b 7\r\n".encode()]


def _pictures(_: Path) -> list[bytes]:
    import numpy as np
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        for picture, options in ((noise, {"exif": exif}), (noise.convert("L"), {})):
            file = io.BytesIO()
            picture.save(file, kind, **options if kind not in ("BMP", "GIF") else {})
            out.append(file.getvalue())
    return out


# ---- running ------------------------------------------------------------------------------------


class Wrong(Exception):
    """A reader did what it must not do."""


class Target:
    """A reader with its folder, to be called with bytes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._reader = readers()[name]
        self.seeds = self._reader.seeds(folder)
        self._file = folder / self._reader.file
        extra = CORPUS / name
        self.seeds += [file.read_bytes() for file in sorted(extra.glob("*"))]

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes are taken; raises :class:`Wrong` if it goes wrong."""
        self._file.write_bytes(data)
        try:
            self._reader.read(self.folder)
        except self._reader.errors as error:
            if not str(error).startswith(self._reader.starts):
                raise Wrong(f"{self.name}: an error that does not say of what: {error}") from error
            return False
        except Exception as error:
            raise Wrong(f"{self.name}: {type(error).__name__}: {error}") from error
        return True


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one reader, in memory where there is one."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def changed(seeds: list[bytes], chance: random.Random) -> bytes:
    """One of the seeds, changed at random a few times."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.choice(b'\0\1\x7f\x80\xff09[]{}":,-.eE \n')
        elif kind == 2:
            del data[at : at + chance.choice([1, 4, 64, len(data)])]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice([1, 4, 64]))
        elif kind == 4:
            data[at:at] = data[chance.randrange(len(data) + 1) :][: chance.choice([1, 8, 128])]
        elif kind == 5:
            number = chance.choice([0, 1, -1, 2**15, 2**31, 2**31 - 1, 2**32 - 1, 2**63 - 1])
            size = chance.choice([2, 4, 8])
            order = chance.choice(["little", "big"])
            data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
        else:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(data[: 4 * LONGEST])


def run_random(name: str, runs: int, seed: int = 1) -> int:
    """Call a reader with its seeds and random changes of them; how many were taken.

    Raises:
        Wrong: something was found.
    """

    def late(*_: object) -> None:
        raise Wrong(f"{name}: it takes more than {TIMEOUT} s")

    chance, taken = random.Random(seed), 0
    before = signal.signal(signal.SIGALRM, late)
    try:
        with new_folder() as folder:
            call = Target(name, folder)
            for number in range(runs + len(call.seeds)):
                known = number < len(call.seeds)
                data = call.seeds[number] if known else changed(call.seeds, chance)
                signal.alarm(TIMEOUT)
                try:
                    taken += call(data)
                except Wrong:
                    _keep(name, data)
                    raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return taken


def _keep(name: str, data: bytes) -> None:
    BUILD.mkdir(exist_ok=True)
    (BUILD / f"{name}-wrong").write_bytes(data)


def _instrument() -> None:
    """Has atheris follow what parses: our code, and the modules of libraries that do.

    Its hook for imports takes all of torch and NumPy for the sake of one module of theirs, which
    takes minutes, and slows down every call.
    """
    import atheris

    _imports()
    for each in gc.get_objects():
        if type(each) is types.FunctionType:  # isinstance would wake lazy objects of torch
            module = str(each.__globals__.get("__name__"))
            if any(module == name or module.startswith(f"{name}.") for name in WATCHED):
                atheris.instrument_func(each)


def _guided(name: str, folder: Path, options: list[str], log: Path) -> None:
    """Has atheris call a reader, and what is said written to a file; it ends the process."""
    import atheris

    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    call = Target(name, folder)
    grown = BUILD / f"corpus-{name}"
    grown.mkdir(exist_ok=True)
    for number, seed in enumerate(call.seeds):
        (grown / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(grown)], lambda data: call(data) and None)
    atheris.Fuzz()


def run_guided(name: str, runs: int, seconds: int) -> bool:
    """Run a reader in a process of its own, and say what was run; False if something was found.

    The process is a fork of this one, which has all that atheris follows (:func:`_instrument`).
    """
    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={TIMEOUT}"]
    options += [f"-rss_limit_mb={MEMORY}", f"-max_len={LONGEST}", "-len_control=0"]
    options += [f"-artifact_prefix={BUILD}/{name}-"]
    BUILD.mkdir(exist_ok=True)
    log = BUILD / f"{name}.log"
    started = time.monotonic()
    fork = multiprocessing.get_context("fork")
    with new_folder() as folder:
        process = fork.Process(target=_guided, args=(name, folder, options, log))
        process.start()
        process.join()
    seconds = round(time.monotonic() - started)
    text = log.read_text(errors="replace")
    count = re.search(r"Done (\d+) (?:runs )?in", text)
    if process.exitcode != 0 or count is None:
        said = [line for line in text.splitlines() if not line.startswith(("#", "INFO"))]
        print("\n".join(said[-60:]))
        print(f"{name}: failed after {seconds} s", flush=True)
        return False
    edges = re.findall(r"cov: (\d+)", text)[-1]
    print(f"{name}: {int(count[1]):,} runs, {edges} edges, {seconds} s", flush=True)
    return True


def main() -> int:
    """The exit status: 0 if nothing was found."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each reader")
    parser.add_argument("--minutes", type=float, default=0, help="of each reader, at most")
    parser.add_argument("--input", type=Path, help="call the reader with this file")
    options = parser.parse_args()
    known = list(readers())
    wrong = [name for name in options.readers if name not in known]
    if wrong:
        parser.error(f"no such reader: {', '.join(wrong)}; there are {', '.join(known)}")
    names = options.readers or known
    if options.input:
        with new_folder() as folder:
            call = Target(names[0], folder)
            print("taken" if call(options.input.read_bytes()) else "refused by name")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install 'dhcl[fuzz]'): random changes of good files")
        for name in names:
            print(f"{name}: {run_random(name, options.runs):,} of {options.runs:,} inputs taken")
        return 0
    _instrument()
    gc.freeze()  # what is there already is not looked through again and again
    seconds = round(60 * options.minutes)
    results = [run_guided(name, options.runs, seconds) for name in names]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
