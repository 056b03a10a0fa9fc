import argparse
import collections
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from dhcl.files import (
    NpyRows,
    new_file,
    only_writer,
    open_log,
    write_atomic,
    writing_folder,
)
from dhcl.torch_files import ForeignCode, load_tensors

HOLDER = """
import sys, time
from pathlib import Path
from dhcl.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_writer_is_told_at_once(holder, tmp_path):
    with pytest.raises(TimeoutError), only_writer(tmp_path / ".lock"):
        pass
    assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_free_and_its_file_harmless(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    mine, another = only_writer(tmp_path / ".lock"), only_writer(tmp_path / ".lock")
    with mine, pytest.raises(TimeoutError), another:
        pass
    with only_writer(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("beneath", ["nothing", "another folder"])
def test_a_locked_folder_that_was_taken_away_is_not_made_anew(tmp_path, beneath):
    """As where one of a network is unmounted: what is written then would be lost beneath it."""
    run = tmp_path / "run"
    with writing_folder(run, "proof"):
        write_atomic(run / "checkpoints" / "last.pt", b"whole")
        run.rename(tmp_path / "away")
        if beneath == "another folder":
            run.mkdir()
        for write in (lambda path: write_atomic(path, b""), open_log):
            with pytest.raises(FileNotFoundError, match="it was unmounted, moved or removed") as e:
                write(run / "checkpoints" / "last.pt")
            assert e.value.filename == str(run)
        write_atomic(tmp_path / "elsewhere", b"")
        assert run.exists() == (beneath == "another folder")
        assert not run.exists() or not list(run.iterdir())
        shutil.rmtree(run, ignore_errors=True)
        (tmp_path / "away").rename(run)
        write_atomic(run / "checkpoints" / "last.pt", b"again")
    assert (run / "checkpoints" / "last.pt").read_bytes() == b"again"


@contextlib.contextmanager
def limited_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def grow(path):
    rows = NpyRows(path, 1)
    try:
        rows.append(np.ones((1000, 1)))
        rows.close()
    finally:
        rows.discard()


def fill(path):
    with new_file(path) as file:
        file.write(bytes(4000))


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, bytes(4000)), grow, fill])
def test_a_file_that_can_not_grow_is_named(tmp_path, write):
    """As on a full disk; the system's own error of a write names none."""
    with limited_files(), pytest.raises(OSError, match="File too large") as error:
        write(tmp_path / "file")
    assert error.value.filename == str(tmp_path / "file")


def test_rows_that_grow(tmp_path):
    rows = NpyRows(tmp_path / "rows.npy", 3)
    parts = [torch.arange(6.0).view(2, 3), np.zeros((0, 3)), torch.ones(1000, 6)[:, ::2]]
    for part in parts:
        rows.append(part)
    with pytest.raises(ValueError, match=r"must be \(n, 3\) \(got \(2, 4\)\)"):
        rows.append(torch.ones(2, 4))
    rows.close()
    read = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert read.dtype == np.float32
    assert np.array_equal(read, np.concatenate([np.asarray(part) for part in parts]))
    other = NpyRows(tmp_path / "other.npy", 3)
    other.discard()
    assert not (tmp_path / "other.npy").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_containers_are_read_with_what_they_hold(tmp_path, zipped):
    content = {
        "default": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2], maxlen=2),
        "scalar": np.float64(2.5),
        "text": np.array(["a", "b"]),
        "options": argparse.Namespace(lr=0.5, out=Path("a/b")),
    }
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    found = load_tensors(tmp_path / "f.pt")
    assert found["default"] == {"a": [1]}
    assert found["deque"] == [1, 2]
    assert found["scalar"] == 2.5
    assert found["text"].tolist() == ["a", "b"]
    assert vars(found["options"]) == {"lr": 0.5, "out": PurePosixPath("a/b")}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    class Harmful:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'run'}",))

    save = {"_use_new_zipfile_serialization": zipped}
    torch.save({"a": torch.ones(1), "b": Harmful()}, tmp_path / "f.pt", **save)
    with pytest.raises(ForeignCode, match=r"posix\.system; code that a file names is not run"):
        load_tensors(tmp_path / "f.pt")
    assert not (tmp_path / "run").exists()
