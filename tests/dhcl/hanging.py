"""A folder whose server never answers, as that of a network folder that hangs."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

needs_mount = pytest.mark.skipif(
    bool(os.geteuid()) or not os.path.exists("/dev/fuse") or shutil.which("umount") is None,
    reason="only root can mount a folder, and by FUSE",
)


@contextlib.contextmanager
def hanging(folder):
    """Whoever looks into the folder waits until the block is left, and may be killed meanwhile.

    It is mounted by FUSE, over what is in it, and nobody reads what the kernel asks.
    """
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
        where = [os.fsencode(word) for word in ("hanging", folder, "fuse")]
        if ctypes.CDLL(None, use_errno=True).mount(*where, 0, options.encode()):
            pytest.skip(f"FUSE can't mount here ({os.strerror(ctypes.get_errno())})")
        yield folder
    finally:
        os.close(server)
        release(folder)


def release(folder):
    """Unmount it, by force: what waits for it gets an error."""
    if f" {folder} " in Path("/proc/mounts").read_text():  # to ask for it would wait too
        subprocess.run(["umount", "-f", "-l", str(folder)], check=True)
