"""A loader whose processes may be lost: what they were to load is loaded by new ones.

The system ends processes for want of memory, and a file system that hangs takes those that read
from it along. Batches are as they would have been, since what is random in one depends on its place
alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from dhcl.errors import WorkerLost
from dhcl.files import waiting_for
from dhcl.words import show

__all__ = ["SteadyLoader"]

# Losses in one pass over the batches, after which they are no accident.
_MOST = 3
# Seconds for a process that was killed to end; one that waits for a disk may take longer.
_KILLED = 5.0
T = TypeVar("T")


class SteadyLoader(DataLoader[T]):
    """A DataLoader that goes on where processes of its own were killed, or do not answer.

    Args:
        dataset: with items by their keys.
        batches: lists of keys; the same ones each time it is iterated over.
        seconds: how long a batch is waited for.
        place: where the images are, for messages; None where they are in no file.
        options: others of :class:`torch.utils.data.DataLoader`.

    Iterating raises:
        WorkerLost: more than three times in one pass.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Iterable[Any],
        *,
        seconds: float,
        place: Path | None = None,
        **options: Any,
    ) -> None:
        self._own: set[Any] = set()
        self._seconds, self._place = seconds, place
        self._asked: float | None = None  # since when a batch is waited for
        self._overdue = self._lost = False
        super().__init__(dataset, batch_sampler=_Rest(batches), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        done = 0
        with _deaths:
            for lost in itertools.count(1):
                try:
                    for batch in self._from(done):
                        yield batch
                        done += 1
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if not self._lost:
                        raise
                    if done == len(self):  # it had nothing left to do
                        return
                    how = self._no_answer() if self._overdue else str(error)
                    what = f"a process that loads images was lost ({how.strip()})"
                    if lost > _MOST:
                        advice = "fewer workers take less memory, of the shared kind too"
                        if self._overdue:
                            advice = "the disk or network folder is slow, or has stopped answering"
                        raise WorkerLost(f"{what}, the {lost}th in one pass; {advice}") from error
                    text = f"warning: {what}; new ones go on from batch {done + 1} of {len(self)}"
                    logging.getLogger(__name__).warning(text)

    def _no_answer(self) -> str:
        reading = "" if self._place is None else f" while it reads from {show(self._place)}"
        return f"no answer for {self._seconds:g} s{reading}"

    def _from(self, first: int) -> Iterator[Any]:
        """The batches from this one on; of those that are lost no process is left."""
        rest: Any = self.batch_sampler
        others = set(multiprocessing.active_children())
        rest.skipped, self._asked, self._overdue = first, None, False
        iterator = super().__iter__()
        _deaths.take_over()
        # Those of the pass before, where they are kept.
        self._own = set(multiprocessing.active_children()) - others or self._own
        over = threading.Event()
        if self._own:
            threading.Thread(target=self._guard, args=(over,), daemon=True).start()
        try:
            while (batch := self._next(iterator)) is not None:
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            self._lost = self._overdue or self._tells_of_death(error)
            self._end_own()
            for process in self._own:
                process.join(_KILLED)
            self._iterator = None
            raise
        finally:
            over.set()
            rest.skipped = 0

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, or None at the end."""
        for process in self._own:
            # torch looks for the dead that nobody has asked for, and waits for others in vain.
            if not process.is_alive():
                raise RuntimeError(
                    f"DataLoader worker (pid {process.pid}) ended with {process.exitcode}"
                )
        self._asked = time.monotonic()
        try:
            with _deaths.heeded(), self._named_if_slow():
                return next(batches, None)
        finally:
            self._asked = None

    def _named_if_slow(self) -> contextlib.AbstractContextManager[None]:
        """What this process reads itself can't be given up, but it can be named."""
        if self._own or self._place is None:
            return contextlib.nullcontext()
        return waiting_for(self._place, self._seconds)

    def _tells_of_death(self, error: Exception) -> bool:
        """Whether one of the processes is dead, and not only its answer an error."""
        if isinstance(error, RuntimeError):
            return str(error).startswith("DataLoader worker")
        # Its connection broke, in the middle of a tensor; it may not be seen as dead yet.
        return bool(multiprocessing.connection.wait([each.sentinel for each in self._own], 1.0))

    def _guard(self, over: threading.Event) -> None:
        """End the processes where a batch takes too long, which ends all that waits for them.

        torch's own timeout is not looked at while it fetches a tensor from one that is stopped.
        """
        while not over.wait(min(1.0, self._seconds / 4)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self._seconds:
                self._overdue = True
                self._end_own()
                return

    def _end_own(self) -> None:
        for process in self._own:
            process.kill()  # one that is stopped, or waits for a disk, heeds nothing else


class _Rest(Sized, Iterable[Any]):
    """Lists of keys, without the first ones; otherwise the sampler that makes them."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batches"], name)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._batches), self.skipped, None)


class _Deaths:
    """While it is entered, the death of a loader's process is an error where a batch is awaited.

    torch raises it from the handler of a signal, in the middle of whatever the main thread does,
    which may be half of an optimiser's step.
    """

    def __init__(self) -> None:
        self._entered, self._heeds = 0, False
        self._theirs: Any = None

    def __enter__(self) -> None:
        self._entered += 1

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1

    def take_over(self) -> None:
        """Stand before torch's handler, which is there once a loader has processes."""
        handler = signal.getsignal(signal.SIGCHLD)
        main = threading.current_thread() is threading.main_thread()
        if main and callable(handler) and handler != self._note:
            self._theirs = handler
            signal.signal(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._heeds or not self._entered:
            self._theirs(number, frame)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Here torch's handler may raise."""
        self._heeds = True
        try:
            yield
        finally:
            self._heeds = False


_deaths = _Deaths()
