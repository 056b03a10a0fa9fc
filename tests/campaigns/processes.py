"""Commands of ``dhcl`` in processes that are forked from this one and need not import anything."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dhcl.cli import main as dhcl

# Seconds after which a command is taken for one that never ends.
LONGEST = 300.0
# A file that fills a disk, which no command writes.
FILLER = "filler"


class Command:
    """A command that runs, or has run, as from a terminal.

    Args:
        words: those after ``dhcl``.
        prepare: called in its process, before it begins.

    Attributes:
        pid: of its process.
        status: the exit status, -n of one that signal n ended; None while it runs.
    """

    def __init__(self, words: Sequence[str], prepare: Callable[[], object] = int) -> None:
        self._said, says = os.pipe()
        os.set_blocking(self._said, False)  # a loader of a killed training may live on, and hold it
        self.pid = fork()
        if not self.pid:
            _become(words, says, prepare)
        os.close(says)
        self._handle = os.pidfd_open(self.pid)
        self.status: int | None = None
        self.said = ""

    def ends(self, seconds: float = LONGEST) -> bool:
        """Whether it ends within this time."""
        if self.status is None and select.select([self._handle], [], [], seconds)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._handle)
            with contextlib.suppress(BlockingIOError):
                self.said = os.read(self._said, 1 << 16).decode()
            os.close(self._said)
        return self.status is not None

    def is_killed(self, seconds: float) -> bool:
        """Kill it after this time; False if it had ended by then, which must be well."""
        if self.ends(seconds):
            assert not self.status, self.said
            return False
        os.kill(self.pid, signal.SIGKILL)
        assert self.ends()
        return self.status == -signal.SIGKILL

    def succeeds(self) -> None:
        """Wait for its end, which must be well."""
        assert self.ends(), "it does not end"
        assert not self.status, self.said


def fork() -> int:
    """As of the system; Lance warns of it wherever it is imported, and here it is used by none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        return os.fork()


def _become(words: Sequence[str], says: int, prepare: Callable[[], object]) -> None:
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(says, 2)
        torch.set_num_threads(1)
        prepare()
        status = dhcl(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def import_what(words: Sequence[str], place: Path) -> None:
    """Run a command that must succeed, and import here what it has imported.

    Most of the time of a short command is that of its imports. The names go through a file.
    """
    names = place / "modules.json"

    def tell() -> None:
        real = os._exit

        def leave(status: int) -> None:
            names.write_text(json.dumps(sorted(sys.modules)))
            real(status)

        os._exit = leave  # type: ignore[assignment]

    Command(words, tell).succeeds()
    for name in json.loads(names.read_text()):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # some are made by others, not imported
                importlib.import_module(name)


def told(work: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own, in plain values."""
    reads, writes = os.pipe()
    pid = fork()
    if not pid:
        try:
            os.write(writes, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as told:
        text = told.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


# ---- what a process writes -----------------------------------------------------------------------


def final_name(path: Path) -> str:
    """The name that a file will have, without what differs from run to run; one for all images."""
    parts: list[str] = []
    for part in path.parts:
        whole = re.sub(r"^\.(.+)\.partial-.*$", r"\1", part)
        if whole == part or parts[-1:] != [whole]:  # it may stand beside the folder, or in it
            parts.append(whole)
    parts[-1] = re.sub(r"(\.[0-9a-f]{8})?\.partial$", "", parts[-1])
    parts[-1] = re.sub(r"(events\.out\.tfevents)\..*", r"\1", parts[-1])
    parts[-1] = re.sub(r"^.*\.(png|jpg)$", r"*.\1", parts[-1]) if len(parts) > 1 else parts[-1]
    return "/".join(parts)


def on_writes(place: Path, act: Callable[[str], object]) -> None:
    """From here on, call a function whenever this process opens a file there to write."""

    def hook(event: str, about: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = about
        if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR):
            file = Path(os.fsdecode(path))
            if place in file.parents and file.name != FILLER:
                act(final_name(file.relative_to(place)))

    sys.addaudithook(hook)
