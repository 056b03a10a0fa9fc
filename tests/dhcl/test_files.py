import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from dhcl.files import NpyRows, only_writer

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
