"""A short form of :mod:`tests.dhcl.inference.gallery.kills`, in a process that never used Lance."""

import subprocess
import sys

import pytest

PROGRAM = """
import pathlib, sys
from tests.dhcl.inference.gallery import kills
folder = pathlib.Path(sys.argv[1])
print(kills.kill(folder, 4, 7))
kills.succeeds(lambda: kills.full_disk(folder))
"""


def test_killed_changes_and_a_full_disk_lose_nothing(tmp_path):
    pytest.importorskip("lance", reason="the extra index is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "index")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
