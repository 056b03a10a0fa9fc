"""Files of MATLAB and Parquet, read in a process of its own: damaged ones may end it.

SciPy's reader of ``.mat`` files and Arrow's of ``.parquet`` files crash on some, and both take the
memory that a file claims. There a crash is an answer that is missing, and memory has a limit.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import numpy as np

from dhcl.stored import Damaged, most_unpacked, open_stored, parse_json

__all__ = ["ApartError", "read_answer", "read_apart"]

# It finds modules where its parent does, and leaves standard output to what it answers: a line of
# JSON, and the bytes of the arrays that this names, one after another. Pickles would be shorter,
# but what reads them trusts them.
_CHILD = """
import sys
sys.path[:] = sys.argv[3:]
import json, os, resource
def layout(value, parts):
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if type(value) is ndarray and value.dtype.kind in "biufcSU":
        parts.append(value.tobytes())
        return [value.dtype.str, value.shape, None]
    if type(value) is ndarray and value.dtype.kind == "O":
        return [None, value.shape, [layout(each, parts) for each in value.flat]]
def of_mat():
    from scipy.io import loadmat
    yield
    for name, value in loadmat(os.fdopen(0, "rb")).items():
        if not name.startswith("__"):
            yield name, value
def of_parquet():
    from pyarrow import compute, parquet
    yield
    table = parquet.ParquetFile(os.fdopen(0, "rb")).read(use_threads=False)
    for name in table.column_names:
        column = table.column(name)
        if "list" in str(column.type):
            yield name + " lengths", compute.list_value_length(column).fill_null(-1).to_numpy()
            parts = [each.flatten().to_numpy(zero_copy_only=False) for each in column.chunks]
            yield name, concatenate(parts) if parts else zeros(0)
        else:
            yield name, column.to_numpy()
    metadata = table.schema.metadata or {}
    if b"dhcl.model" in metadata:
        yield "model", metadata[b"dhcl.model"].decode()
with os.fdopen(os.dup(1), "wb") as answer:
    os.dup2(2, 1)
    try:
        from numpy import concatenate, ndarray, zeros
        content = {"mat": of_mat, "parquet": of_parquet}[sys.argv[2]]()
        next(content)
        pages = int(open("/proc/self/statm").read().split()[0])
        most = int(sys.argv[1]) + pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        parts = []
        head = json.dumps(["", "", {name: layout(value, parts) for name, value in content}])
    except Exception as error:
        head, parts = json.dumps([type(error).__name__, str(error), {}]), []
    answer.write(head.encode() + b"\\n")
    for part in parts:
        answer.write(part)
"""

# Of what the process takes: the content, copies of it on its way, and what the libraries take.
_COPIES = 3
_OWN = 1 << 28

_KINDS = "biufcSU"


class ApartError(Exception):
    """A file that a library can't read; ``kind`` is the name of its exception, or of the signal."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_apart(path: Path, kind: Literal["mat", "parquet"]) -> dict[str, Any]:
    """The variables of a file by name: arrays of numbers and texts, texts, and None for others.

    Of a column of lists in a Parquet file they are ``NAME``, all that is in its lists, and
    ``NAME lengths``, the length of each, -1 where there is none.

    Args:
        path: the file.
        kind: ``mat`` is read by SciPy, versions 4 to 7; ``parquet`` by Arrow.

    Raises:
        OSError, Damaged: as :func:`open_stored`; more than :func:`most_unpacked` allows.
        ApartError: the library is not installed, the file is not of these versions or is damaged,
            also where that ended the process that read it.
    """
    with open_stored(path) as file:
        most = most_unpacked(os.fstat(file.fileno()).st_size)
        error, message, variables = _ask(file, kind, _COPIES * most + _OWN)
    if error in ("MemoryError", "ArrowMemoryError"):
        raise Damaged(f"it must unpack to at most {most:,} bytes")
    if error:
        raise ApartError(error, message)
    return variables


def _ask(file: BinaryIO, kind: str, memory: int) -> tuple[str, str, dict[str, Any]]:
    """What the process answers, given so many bytes: kind and text of an error, and variables."""
    command = [sys.executable, "-I", "-c", _CHILD, str(memory), kind, *filter(None, sys.path)]
    # Arrow's own pools reserve more than they use.
    settings = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=file, env=settings) as child:
        assert child.stdout is not None
        try:
            return read_answer(child.stdout, memory)
        except Damaged as error:
            child.stdout.close()
            raise ApartError(*_ended(child.wait())) from error
        except BaseException:
            child.kill()
            raise


def read_answer(stream: IO[bytes], most: int) -> tuple[str, str, dict[str, Any]]:
    """Kind and text of an error, both empty if there is none, and variables by name.

    Args:
        stream: what the process of :func:`read_apart` wrote.
        most: bytes that it may be.

    Raises:
        Damaged: it is not whole, or of another form.
    """
    kind, message, found = _checked(parse_json(stream.readline(most)), [str, str, dict])
    return kind, message, {name: _array(each, stream, most) for name, each in found.items()}


def _checked(value: Any, kinds: list[type]) -> list[Any]:
    if not isinstance(value, list) or [type(each) for each in value] != kinds:
        raise Damaged("an answer of another form")
    return value


def _array(layout: Any, stream: IO[bytes], most: int) -> Any:
    """A text or number, an array whose numbers or texts come next, or one of cells."""
    if not isinstance(layout, (list, dict)):
        return layout
    try:
        code, shape, cells = layout
        count = math.prod(shape)
        if code is None:
            array = np.empty(len(cells), object)
            for number, each in enumerate(cells):
                array[number] = _array(each, stream, most)
            return array.reshape(shape)
        dtype = np.dtype(code)
        if dtype.kind not in _KINDS or count < 0 or count * dtype.itemsize > most:
            raise Damaged("an array of another form")
        return np.frombuffer(stream.read(count * dtype.itemsize), dtype).reshape(shape)
    except Exception as error:  # of NumPy, for what is no dtype, and no shape
        raise Damaged(f"an array of another form ({error})") from error


def _ended(status: int) -> tuple[str, str]:
    """What ended the process, and what that means."""
    by = signal.Signals(-status).name if status < 0 else f"status {status}"
    return by, "the process that read it has ended: the file is damaged, or memory is short"
