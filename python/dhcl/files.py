"""Files: never half-written ones, arrays that grow row by row, one writer at a time.

Every file that the package writes is opened here, since folders come from strangers too. A new file
gets a name that nobody has, and takes the place of the one before by renaming, which replaces a
link and leaves alone what it points to; a file that is kept and changed (a log, a lock) must be a
plain one. Links to folders above a file are followed as ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dhcl.errors import DHCLError
from dhcl.words import show

__all__ = [
    "NotPlainFile",
    "NpyRows",
    "Taken",
    "naming",
    "new_file",
    "new_folder",
    "only_writer",
    "open_log",
    "replacing",
    "sync_files",
    "waiting_for",
    "write_atomic",
    "write_together",
    "writing_folder",
]

# Bytes of a write, so that an error comes soon after the disk is full.
_PIECE = 1 << 20


LONG = 60.0
"""Seconds that a file or folder may keep a process waiting before it is named."""

# Names that are tried for a file which is not whole yet.
_TRIES = 100


class NotPlainFile(DHCLError, OSError):
    """Something in the place of a file to be written that is none, such as a link or a FIFO."""

    status = 2

    def __init__(self, path: Path, kind: str) -> None:
        text = f"must be a plain file (got {kind}), nothing is written to it; remove it"
        super().__init__(errno.EEXIST, text, str(path))

    def __str__(self) -> str:
        return f"{show(self.filename)}: {self.strerror}"


@contextlib.contextmanager
def waiting_for(place: Path, seconds: float | None = None) -> Iterator[None]:
    """Name a file or folder, once, that keeps the block waiting for longer than this, or ``LONG``.

    The system gives no error where the server of a network folder hangs, and what waits for it
    can't be interrupted from here; so it is said, by a thread of its own.
    """
    seconds = LONG if seconds is None else seconds
    timer = threading.Timer(seconds, _say_waiting, (place, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_waiting(place: Path, seconds: float) -> None:
    logging.getLogger(__name__).warning(
        f"warning: {show(place)} has kept this process waiting for {seconds:g} s; its disk or "
        "network folder is slow, or has stopped answering"
    )


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace the file by these bytes; whatever happens, it holds the old ones or the new ones.

    Its folder is made where there is none. A link is replaced, not followed.

    Raises:
        NotPlainFile: it is a FIFO, a device or a socket.
        OSError: with the old file untouched, and nothing left beside it.
    """
    with replacing(path) as file:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            file.write(view[start : start + _PIECE])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write and read, which takes the place of ``path`` once the block is done.

    As :func:`write_atomic`; an exception of any kind leaves the old file and nothing beside it.
    """
    with waiting_for(path):
        new = _Unfinished(path)
        try:
            with naming(path):
                yield new.file
                new.commit()
        finally:
            new.discard()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say of which file an error of the system is, since that of a write does not say so itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_files(files: Iterable[Path]) -> None:
    """Bring files that another library has written to the disk, and their names in their folders.

    Raises:
        OSError: one can't be opened, or the disk does not take it.
    """
    written = list(files)
    for place in [*written, *sorted({file.parent for file in written})]:
        handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write at once under its own name, in a folder that is not whole yet itself.

    Raises:
        FileExistsError: there is something of that name, a link to nowhere too.
    """
    with naming(path), os.fdopen(_create(path), "w+b") as file:
        yield file


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


class _Unfinished:
    """A file beside ``path``, under a name that nobody else has, until it takes its place.

    Its name is ``path``'s with ``.partial`` where that is free, else with a random part too. While
    it is written it is locked, so that what a killed process left can be told from what another
    one is writing.
    """

    def __init__(self, path: Path) -> None:
        _check_held(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(path)
        _clear_leftovers(path)
        self.path = path
        self.partial, handle = _begin(path)
        self.file: BinaryIO = os.fdopen(handle, "w+b")

    def commit(self) -> None:
        """Bring everything to the disk, and give the file its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.partial.replace(self.path)
        self.file.close()
        # The new name itself must reach the disk too.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove the file, if it has not got its name."""
        if self.file.closed:
            return
        self.partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk does not take; it is gone anyway
            self.file.close()


def _check_replaceable(path: Path) -> None:
    """Refuse what is no file and would be lost, as ``/dev/null`` is to the superuser."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there, or a link to nothing
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # renaming refuses folders by itself
        raise NotPlainFile(path, _kind(mode))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _begin(path: Path) -> tuple[Path, int]:
    """Make and lock a file for :class:`_Unfinished`; its path and handle."""
    for attempt in range(_TRIES):
        part = f".{secrets.token_hex(4)}" if attempt else ""
        partial = path.with_name(f"{path.name}{part}.partial")
        try:
            handle = _create(partial)
        except FileExistsError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process looks whether it is a left-over
            partial.unlink(missing_ok=True)
            os.close(handle)
            continue
        except OSError:  # no locks here; then nothing is taken for a left-over either
            pass
        if os.fstat(handle).st_nlink:
            return partial, handle
        os.close(handle)  # taken for a left-over before it was locked
    raise FileExistsError(errno.EEXIST, "no name is free for its partial file", str(path))


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of this file: plain files that no process has locked."""
    ours = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.partial")
    with contextlib.suppress(OSError):  # a folder that can be written, but not listed
        for name in filter(ours.fullmatch, os.listdir(path.parent)):
            with contextlib.suppress(OSError):
                _remove_unlocked(path.with_name(name))


def _remove_unlocked(partial: Path) -> None:
    if not stat.S_ISREG(partial.lstat().st_mode):
        return
    handle = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its writer may have renamed it before the lock was free.
        if os.path.samestat(os.fstat(handle), partial.lstat()):
            partial.unlink()
    finally:
        os.close(handle)


def open_log(path: Path) -> BinaryIO:
    """Open a file that is kept and grows, to read and append; it is made where there is none.

    Raises:
        NotPlainFile: it is a link, also a hard one, a FIFO, a device or a socket: what is written
            there might end in another file.
        FileNotFoundError: as :func:`only_writer` says of its folder.
    """
    _check_held(path)
    return os.fdopen(_open_plain(path), "a+b")


def _open_plain(path: Path) -> int:
    """A handle of a file that has this name alone; opening waits for nobody."""
    with contextlib.suppress(FileNotFoundError):
        _check_plain(path, path.lstat())  # before opening, since some devices act on that already
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPlainFile(path, _kind(stat.S_IFLNK)) from error
        raise
    try:
        _check_plain(path, os.fstat(handle))
    except NotPlainFile:
        os.close(handle)
        raise
    return handle


def _check_plain(path: Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise NotPlainFile(path, _kind(about.st_mode))
    if about.st_nlink > 1:
        raise NotPlainFile(path, "a hard link, a file with another name too")


def write_together(folder: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Write files into a folder: a new folder is whole or not there, an old one keeps its others.

    In a folder that is there, all are written to the disk under other names before the first one
    gets its own, so that a full disk changes nothing; they are then renamed one by one, in the
    order given.

    Raises:
        OSError: with the folder as it was, but for a crash between two renames.
    """
    if not folder.is_dir():
        with new_folder(folder) as partial:
            for name, data in files.items():
                write_atomic(partial / name, data)
        return
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder))
    try:
        for name, data in files.items():
            write_atomic(partial / name, data)
        for name in files:
            (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole; an error leaves nothing.

    Raises:
        OSError: the folder exists already, or can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Taken(TimeoutError):
    """Another process holds a lock; ``str()`` says which one, where that is known."""


# Handles of locks that this process holds, their folders, and what these were then.
_held: dict[int, tuple[Path, os.stat_result]] = {}


def _let_go() -> None:
    """In a process that was forked: a lock is its parent's alone, and ends with that one."""
    while _held:
        os.close(_held.popitem()[0])


def _check_held(path: Path) -> None:
    """Refuse to write where a folder that is locked was, as that of a network was in a mount.

    Its folders would be made anew there, and all that follows would be lost to who looks for it.
    """
    for folder, about in _held.values():
        if folder in path.absolute().parents:
            try:
                there = os.path.samestat(folder.stat(), about)
            except FileNotFoundError:
                there = False
            if not there:
                said = "it was unmounted, moved or removed while this process wrote to it"
                raise FileNotFoundError(errno.ENOENT, said, str(folder))


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def only_writer(lock: Path) -> Iterator[None]:
    """Hold a lock that ends with its holder, however that ends; the file stays and is empty.

    While it is held, the file says by whom, and this process writes below its folder only as long
    as that is the same one: else a write raises ``FileNotFoundError``.

    Args:
        lock: the file, made where there is none. On a file system without locks there is a warning.

    Raises:
        Taken: at once, if another process holds it.
        NotPlainFile: it is a link, a FIFO, a device or a socket.
    """
    handle = _lock(lock)
    folder = lock.absolute().parent
    _held[handle] = folder, folder.stat()
    try:
        yield
    finally:
        if _held.pop(handle, None):
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)


def _lock(lock: Path) -> int:
    """The handle of the lock's file, locked, with this process named in it."""
    while True:
        handle = _open_plain(lock)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = _holder(handle)
            os.close(handle)
            raise Taken(holder) from error
        except OSError as error:
            warnings.warn(
                f"{lock}: this file system has no locks ({error.strerror}), by which a second "
                "process that writes here would be kept off",
                stacklevel=4,
            )
            return handle
        try:
            present = os.path.samestat(os.fstat(handle), lock.lstat())
        except FileNotFoundError:
            present = False
        if present:
            break
        os.close(handle)  # of a holder that removed the file with its folder
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return handle


def _holder(handle: int) -> str:
    try:
        about = json.loads(os.pread(handle, 1000, 0))
        return f"another process ({int(about['pid'])} on {about['host']})"
    except (OSError, ValueError, TypeError, KeyError):  # it has not said so yet, or never will
        return "another process"


@contextlib.contextmanager
def writing_folder(folder: Path, proof: str) -> Iterator[None]:
    """Hold the lock ``.lock`` of a folder, which is made where there is none.

    Args:
        folder: of a run, or an index.
        proof: a file that it holds once it is one; a folder that was made here and is left without
            it goes with the lock.

    Raises:
        Taken, NotPlainFile: as :func:`only_writer`.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with only_writer(lock):
        try:
            yield
        finally:
            if made and not (folder / proof).exists():
                lock.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there is something in it
                    folder.rmdir()


class NpyRows:
    """A ``.npy`` file of float32 rows that grows, so that no more than a batch is in memory.

    It gets its name when :meth:`close` is called, after the last rows.

    Raises:
        OSError: as :func:`write_atomic`.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.width, self.rows = width, 0
        self._path, self._new = path, _Unfinished(path)
        self._header_bytes = self._new.file.write(self._header())

    def _header(self) -> bytes:
        # NumPy pads headers so that the number of rows can grow in place.
        buffer = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(buffer, shape)
        return buffer.getvalue()

    def append(self, rows: Any) -> None:
        """Add rows (n, width) of an array or a tensor on the CPU."""
        array = np.ascontiguousarray(np.asarray(rows), dtype="<f4")
        if array.ndim != 2 or array.shape[1] != self.width:
            raise ValueError(f"rows: must be (n, {self.width}) (got {array.shape})")
        with naming(self._path):
            self._new.file.write(array.data)
        self.rows += len(array)

    def finish(self) -> BinaryIO:
        """Write the number of rows; the whole file, from its beginning, without its name."""
        header = self._header()
        assert len(header) == self._header_bytes
        with naming(self._path):
            self._new.file.seek(0)
            self._new.file.write(header)
            self._new.file.flush()
            self._new.file.seek(0)
        return self._new.file

    def mapped(self) -> NDArray[np.float32]:
        """The rows (n, width) so far, in the file and not in memory."""
        file, shape = self.finish(), (self.rows, self.width)
        return np.memmap(file, np.dtype("<f4"), "r", self._header_bytes, shape)

    def close(self) -> None:
        """Write the number of rows, and everything to the disk."""
        self.finish()
        with naming(self._path):
            self._new.commit()

    def discard(self) -> None:
        """Remove the file, unless it is closed."""
        self._new.discard()
