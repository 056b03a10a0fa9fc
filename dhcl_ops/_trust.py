"""Whether a place on disk may hold code that this process will run.

Who can write to a folder, or to any folder above it, or owns a link on the way, can put a library
of their own where ours is looked for. So every level is judged, from the root of the file system
down, by ``lstat``. Once a level is safe nobody else can exchange what lies in it, which is why it
is enough to look at one level after another.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

# As many as Linux follows in one path.
MAX_LINKS = 40


def _levels(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Each folder and link on the way to ``path``, from the root down, with its ``lstat``."""
    current = "/"
    yield current, os.lstat(current)
    pending = os.path.join(os.getcwd(), path).split("/")[::-1]
    links = 0
    while pending:
        part = pending.pop()
        if part == "..":
            current = os.path.dirname(current)
        if part in {"", ".", ".."}:
            continue
        place = os.path.join(current, part)
        found = os.lstat(place)
        yield place, found
        if not stat.S_ISLNK(found.st_mode):
            current = place
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = os.readlink(place)
        current = "/" if target.startswith("/") else current
        pending += target.split("/")[::-1]


def _system_owners() -> set[int]:
    """Users who may change anything anyway: the superuser, by whatever number it is seen.

    Where a container does not map the superuser, its files appear under the overflow number.
    """
    owners = {0}
    with contextlib.suppress(OSError, ValueError):
        spans = [
            [int(word) for word in line.split()]
            for line in Path("/proc/self/uid_map").read_text().splitlines()
        ]
        if not any(outside == 0 for _, outside, _ in spans):
            owners.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return owners


def _is_private_group(group: int) -> bool:
    """Whether a group is this user's alone, as many systems give each user one."""
    if os.getuid() == 0:
        return False
    try:
        name, entry = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"number {number}"


def _check_above(place: str, found: os.stat_result) -> None:
    """A level on the way: nobody else may exchange what lies in it."""
    if found.st_uid != os.getuid() and found.st_uid not in _system_owners():
        raise PermissionError(f"{place} belongs to another user ({_user(found.st_uid)})")
    if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
        return  # in a sticky folder only the owner of an entry exchanges it
    by_group = found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
    if found.st_mode & stat.S_IWOTH or by_group:
        raise PermissionError(f"{place} can be written by other users: chmod go-w {place}")


def _check_own(place: str, found: os.stat_result) -> None:
    """What holds the code itself: this user's, and written by nobody else."""
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{place} is a link")
    if found.st_uid != os.getuid():
        raise PermissionError(f"{place} belongs to another user ({_user(found.st_uid)})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{place} can be written by other users: chmod go-w {place}")


def make_folder(path: Path) -> None:
    """Make a folder of this user alone, with what is missing above it; then :func:`check_folder`.

    Raises ``PermissionError`` naming the level that another user could write, and ``OSError`` as
    making a folder does.
    """
    missing = []
    above = Path(os.path.join(os.getcwd(), path))
    while not os.path.lexists(above):
        missing.append(above)
        above = above.parent
    # Before anything is made, which a planted link would lead elsewhere.
    for place, found in _levels(above):
        _check_above(place, found)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise ``PermissionError`` if another user can write to a folder, or to one above it.

    The folder itself must be this user's, written by nobody else. Folders above it may be the
    superuser's, and sticky ones (``/tmp``) may be written by all.
    """
    levels = list(_levels(path))
    for place, found in levels:
        if place != levels[-1][0]:
            _check_above(place, found)
    _check_own(*levels[-1])


def check_file(path: Path) -> None:
    """Raise ``PermissionError`` unless a file is this user's alone, and a plain file.

    Its folder must have passed :func:`check_folder`.
    """
    found = os.lstat(path)
    _check_own(str(path), found)
    if not stat.S_ISREG(found.st_mode):
        raise PermissionError(f"{path} is not a plain file")
