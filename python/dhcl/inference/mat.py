"""MATLAB's files, read by SciPy in a process of its own: damaged ones may end it."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["MatError", "read_mat"]

# It finds modules where its parent does, and leaves standard output to what it answers.
_CHILD = """
import sys
sys.path[:] = sys.argv[2:]
import os, pickle
with os.fdopen(os.dup(1), "wb") as answer:
    os.dup2(2, 1)
    try:
        from scipy.io import loadmat
        content = {k: v for k, v in loadmat(sys.argv[1]).items() if not k.startswith("__")}
        pickle.dump((content, "", ""), answer, protocol=5)
    except Exception as error:
        pickle.dump((None, type(error).__name__, str(error)), answer)
"""


class MatError(Exception):
    """A file that SciPy can't read; ``kind`` is the name of its exception, or of the signal."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a file of version 4 to 7, by name, as ``scipy.io.loadmat`` gives them.

    Raises:
        MatError: SciPy is not installed, the file is not of these versions or is damaged, also
            where that ended the process that read it.
    """
    command = [sys.executable, "-I", "-c", _CHILD, str(path.absolute()), *filter(None, sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        try:
            content, kind, message = pickle.load(child.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            child.stdout.close()
            raise MatError(*_ended(child.wait())) from error
        except BaseException:
            child.kill()
            raise
    if kind:
        raise MatError(kind, message)
    variables: dict[str, Any] = content
    return variables


def _ended(status: int) -> tuple[str, str]:
    """What ended the process, and what that means."""
    by = signal.Signals(-status).name if status < 0 else f"status {status}"
    return by, "the process that read it has ended: the file is damaged, or memory is short"
