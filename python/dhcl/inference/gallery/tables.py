"""Tables of Lance: the library, its errors, the files of a table, filters and upkeep."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dhcl.errors import ConfigError, DHCLError
from dhcl.files import NotPlainFile
from dhcl.inference.gallery.head import Head, damaged
from dhcl.inference.gallery.schema import text_of, written
from dhcl.inference.gallery.store import BLOCK, Where
from dhcl.stored import Damaged, checksum, open_stored
from dhcl.words import show

__all__ = [
    "FILE_BYTES",
    "LISTS",
    "READ_BYTES",
    "ROWS",
    "by_bytes",
    "check_described",
    "check_plain",
    "compact_lists",
    "compact_rows",
    "describing_sums",
    "expression",
    "library",
    "place_of",
    "rolled_back",
    "told",
    "whole_sum",
]

ROWS, LISTS = "rows.lance", "neighbours.lance"
"""Names of the tables in an index's folder."""

FILE_BYTES = 1 << 26
"""Bytes of features in a file of a table, and in memory while it is written."""

READ_BYTES = 1 << 24
"""Bytes of features that are read together."""

# Bytes at the end of a table's file that say where its columns are, at least.
_TAIL = 1 << 16

# A table is compacted when it has more files than so many that could be one, or more than this
# share of what would be written anew is gone.
_SMALL_FILES = 16
_GONE = 0.1


def library() -> Any:
    """Lance, told not to take more threads than torch does, and not to chatter.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("LANCE_CPU_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("LANCE_LOG", "error")
    try:
        import lance
    except ModuleNotFoundError as error:
        raise ConfigError(f"index: needs {error.name}: pip install 'dhcl[index]'") from error
    # Processes that load images are forked and never touch a table; ours does not after a fork.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    return lance


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """What Lance raises in the block, as errors for people. Its panics are no `Exception`.

    Raises:
        DataError: the table is not as it was written.
        OSError: what the system said, where Lance passes that on, as of a disk that is full.
    """
    try:
        yield
    except DHCLError:
        raise
    except BaseException as error:
        text = str(error)
        known = isinstance(error, ValueError | OSError | RuntimeError)
        if not known and type(error).__name__ != "PanicException":
            raise
        number = re.search(r"os error (\d+)", text)
        if isinstance(error, OSError) and number and int(number[1]) != errno.ENOENT:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        if not isinstance(error, Damaged):
            why = (text.partition(", /home/")[0].splitlines() or [type(error).__name__])[0]
            text = show(f"its table can't be read: {why[:200]}")
        raise damaged(folder, text) from error


def _manifest(version: int) -> str:
    return f"_versions/{2**64 - 1 - version:020d}.manifest"


def check_plain(table: Path) -> None:
    """Refuse a table with links, FIFOs and the like, through which others' files would be changed.

    Raises:
        NotPlainFile: there is one.
    """
    if not os.path.lexists(table):
        return
    _check_kind(table, stat.S_ISDIR)
    for place, folders, files in os.walk(table, onerror=_raise):
        for name in folders:
            _check_kind(Path(place, name), stat.S_ISDIR)
        for name in files:
            _check_kind(Path(place, name), stat.S_ISREG)


def _check_kind(path: Path, rule: Callable[[int], bool]) -> None:
    if not rule(os.lstat(path).st_mode):
        raise NotPlainFile(path, "a link, a FIFO, a device or a socket")


def _raise(error: OSError) -> None:
    raise error


def _tail_sum(file: Path) -> int:
    """CRC-32 of a file's size and of its end, which says what is where in it."""
    with open_stored(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(0, size - _TAIL))
        return checksum(opened.read(_TAIL), checksum(struct.pack("<q", size)))


def whole_sum(file: Path) -> int:
    """CRC-32 of all of a file."""
    with open_stored(file) as opened:
        start = 0
        while piece := opened.read(READ_BYTES):
            start = checksum(piece, start)
    return start


def describing_sums(folder: Path, name: str, table: Any) -> dict[str, int]:
    """Of the files that say what a version of a table is: of each by its name below the folder."""
    home = folder / name
    sums = {f"{name}/{_manifest(table.version)}": whole_sum(home / _manifest(table.version))}
    for part in table.get_fragments():
        for file in part.metadata.files:
            sums[f"{name}/data/{file.path}"] = _tail_sum(home / "data" / file.path)
        gone = part.metadata.deletion_file
        if gone is not None:
            path = gone.path(part.fragment_id)
            sums[f"{name}/{path}"] = whole_sum(home / path)
    return sums


def check_described(folder: Path, head: Head) -> None:
    """That what says where the rows are is as it was written.

    Raises:
        Damaged: it is not. OSError: it can't be read.
    """
    for name, expected in head.files.items():
        parts = Path(name).parts
        if len(parts) != 3 or parts[0] not in (ROWS, LISTS) or ".." in parts:
            raise Damaged(f"{show(name)} is no file of a table")
        found = _tail_sum(folder / name) if parts[1] == "data" else whole_sum(folder / name)
        if found != expected:
            raise Damaged(f"{show(name)} is not as it was written: its checksum is another")


@contextlib.contextmanager
def place_of(folder: Path) -> Iterator[str]:
    """The folder's path as Lance takes it, while the block runs; another one of odd names.

    A path that is no UTF-8, or holds control characters, Lance does not take.
    """
    path = os.path.abspath(folder)
    if path.isprintable():
        yield path
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def expression(where: Where) -> Any:
    """The filter as an expression of Arrow, in which values are no text of a language."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def texts(values: Iterable[str]) -> Any:
        return pa.array(list(values), pa.string())  # also of none

    row, camera, root, path = map(pc.field, ("row", "camera", "root", "path"))
    parts = []
    if where.cameras is not None:
        parts.append(camera.isin(texts(map(text_of, where.cameras))))
    if where.not_camera is not None:
        parts.append(camera != text_of(where.not_camera))
    if where.ids is not None:
        parts.append(pc.field("id").isin(texts(map(text_of, where.ids))))
    if where.since is not None:
        parts.append(pc.field("time") >= where.since)
    if where.until is not None:
        parts.append(pc.field("time") <= where.until)
    if where.rows is not None:
        parts.append(row.isin(pa.array(where.rows, pa.int64())))
    if where.paths is not None:
        roots = sorted({number for number, _ in where.paths})
        listed = {n: [written(p) for m, p in where.paths if m == n] for n in roots}
        parts.append(_any((root == n) & path.isin(texts(listed[n])) for n in roots))
    if where.below is not None:
        below = [(number, written(p)) for number, p in where.below]
        parts.append(
            _any(
                (root == n) & ((path == p) | pc.starts_with(path, f"{p}/")) if p else root == n
                for n, p in below
            )
        )
    return None if not parts else _all(parts)


def _any(parts: Iterator[Any]) -> Any:
    import pyarrow.compute as pc

    either = next(parts, None)
    if either is None:
        return pc.field("row") < 0  # of nothing
    for part in parts:
        either |= part
    return either


def _all(parts: list[Any]) -> Any:
    both = parts[0]
    for part in parts[1:]:
        both &= part
    return both


def rolled_back(home: str, version: int) -> Any:
    """The table at this path, with this version as its last one."""
    table = library().dataset(home, version=version)
    if table.latest_version != version:
        table.restore()
    return table


def by_bytes(batches: Iterator[Any], limit: int) -> Iterator[list[Any]]:
    """Batches together that have so many bytes."""
    pieces: list[Any] = []
    size = 0
    for batch in batches:
        pieces.append(batch)
        size += batch.nbytes
        if size >= limit:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces


def compact_lists(table: Any, width: int, all_of_it: bool) -> None:
    """Make one file of many small ones, and of those with many rows gone, in any order of rows."""
    parts = table.get_fragments()
    target = max(1, FILE_BYTES // (4 * width))
    small = sum(part.physical_rows < target // 2 for part in parts)
    gone = max((part.num_deletions / max(1, part.physical_rows) for part in parts), default=0.0)
    if all_of_it or small > _SMALL_FILES or gone > _GONE:
        table.optimize.compact_files(
            target_rows_per_fragment=target,
            materialize_deletions_threshold=0.0 if all_of_it else _GONE,
            num_threads=1,
            batch_size=max(1, min(BLOCK, READ_BYTES // (4 * width))),
        )


def compact_rows(home: str, table: Any, width: int, all_of_it: bool) -> Any:
    """Make few files of many small ones, and free what rows take that are gone, in order of rows.

    Lance keeps files in the order of their making. So its own compaction, which replaces any of
    them, would bring rows out of order; here all files behind the first one are replaced too. That
    is done where it pays: where there are many small files, or a share of what is written is gone.

    Args:
        home: the table's path.
        table: at its last version.
        width: d.
        all_of_it: do it wherever a file less, or a row that is gone less, comes of it.

    Returns:
        The table at its last version.
    """
    lance = library()
    from lance.fragment import write_fragments

    parts = table.get_fragments()
    target = max(1, FILE_BYTES // (4 * width))
    start = _first_to_replace(
        [(part.physical_rows, part.num_deletions) for part in parts], target, all_of_it
    )
    if start is None:
        return table
    batches = table.scanner(
        fragments=parts[start:],
        batch_size=max(1, min(BLOCK, READ_BYTES // (4 * width))),
        batch_readahead=2,
        fragment_readahead=2,
        io_buffer_size=2 * FILE_BYTES,
        scan_in_order=True,
    ).to_batches()
    new = []
    for pieces in by_bytes(batches, FILE_BYTES):
        new += write_fragments(_table(pieces), home, table.schema, mode="append")
    steps = [lance.LanceOperation.Append(new)] if new else []
    old = [part.fragment_id for part in parts[start:]]
    for step in (*steps, lance.LanceOperation.Delete([], old, "true")):
        table = lance.LanceDataset.commit(home, step, read_version=table.version)
    return table


def _table(pieces: list[Any]) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches(pieces)


def _first_to_replace(files: Sequence[tuple[int, int]], target: int, all_of_it: bool) -> int | None:
    """From which file on all are to be written anew; None for none.

    Args:
        files: rows of each, and how many of these are gone.
        target: rows that a file should have.
        all_of_it: see :func:`compact_rows`.
    """
    small = [place for place, (rows, _) in enumerate(files) if rows < target // 2]
    if all_of_it:
        # A small file is as it should be only where no other one follows.
        poor = [place for place in small if place < len(files) - 1]
        poor += [place for place, (_, gone) in enumerate(files) if gone]
        return min(poor, default=None)
    starts = [small[-_SMALL_FILES - 1]] if len(small) > _SMALL_FILES else []
    written = removed = 0
    for place in reversed(range(len(files))):
        rows, gone = files[place]
        written, removed = written + rows, removed + gone
        if gone and removed > _GONE * written:
            starts.append(place)
    return min(starts, default=None)
