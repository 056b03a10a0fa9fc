"""The other processes of a training: which of them live, and what is said when one is lost.

Each process says again and again that it lives, from a thread of its own, in the store of
torch.distributed (its TCPStore, at ``MASTER_ADDR``); the same store has what it said when it left.
So a stage may take hours on one process while the others wait, and yet one that was killed, stopped
or cut off is found within the timeout, whatever the others wait for: a collective of NCCL that no
Python code can end too. A process that lives and does not come to a collective is left to the
timeout of the process group, which is as long.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dhcl.errors import PeerLost
from dhcl.words import first_line, say
from dhcl_ops.sharded import is_lost_peer

__all__ = ["Peers"]

# Seconds between signs of life, at most.
_INTERVAL = 1.0
# Signs of life that a process which fails with a broken connection waits for, to tell whose it was.
_ROUNDS = 6
# Seconds for a main thread to end by itself, once it is known that another process is lost.
_GRACE = 10.0
# Seconds for which the process that has the store stays for the others to read why it leaves.
_LINGER = 5.0

# Every process makes these objects in the same order, and so meets the others in the same one.
_numbers = itertools.count()


class _Loss(NamedTuple):
    """Which ranks are lost, and how."""

    ranks: tuple[int, ...]
    how: str


class Peers:
    """The processes of a training, from one of them. A process that is alone meets nobody.

    Args:
        rank, world: number of this process, and how many there are.
        seconds: how long to wait for one that gives no sign of life.
        advice: says how to go on, for whoever reads that a process is lost.

    Attributes:
        stage: what this process is at, for messages.
    """

    def __init__(self, rank: int, world: int, seconds: float, advice: Callable[[], str]) -> None:
        self.rank, self.world, self.seconds = rank, world, seconds
        self.stage = "start"
        self._advice = advice
        self._interval = min(_INTERVAL, seconds / 10)
        self._meetings = itertools.count(1)
        self._names = [f"rank {number}" for number in range(world)]
        self._heard = [b""] * world  # the last sign of life of each
        self._silent = [0.0] * world  # seconds since it changed
        self._left: dict[int, str] = {}  # what those that left said, nothing if all was well
        self._broken = False  # the store is gone
        self._loss: _Loss | None = None
        self._known = threading.Event()  # that there is a loss
        self._leaving = threading.Event()
        self._farewell = ""
        self._beating: threading.Thread | None = None
        self._number = next(_numbers)

    @classmethod
    def of_environment(cls, seconds: float, advice: Callable[[], str]) -> Peers:
        """Those that torchrun, or whoever started the processes, names in the environment.

        Waits for all of them to come.

        Raises:
            PeerLost: one did not come in time.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(os.environ.get(name) for name in names):
            return cls(0, 1, seconds, advice)
        peers = cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), seconds, advice)
        if peers.world > 1:
            peers._join()
        return peers

    # ---- coming, meeting, leaving ---------------------------------------------------------------

    @property
    def _hosts(self) -> bool:
        """Whether the store ends with this process; torchrun has one of its own."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def _client(self) -> PrefixStore:
        """A connection of its own, since one that waits keeps other threads off it."""
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world,
            self._hosts,
            timeout=datetime.timedelta(seconds=self.seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"dhcl/{start}/{self._number}", store)

    def start_group(self, backend: str, timeout: datetime.timedelta) -> None:
        """Start torch's process group, where these processes were started again by torchrun.

        Its store outlives them, and torch 2.14 looks in it for addresses by the same keys at each
        start: it would find those of processes that are gone.
        """
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if self.world == 1 or start == "0" or dist.is_initialized():
            return
        dist.init_process_group(
            backend,
            store=PrefixStore("group", self._client()),
            rank=self.rank,
            world_size=self.world,
            timeout=timeout,
        )

    def _reach(self, end: float) -> None:
        """Try to connect to the store until it is there; torch would print its C++ stack."""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        while not self._hosts:
            try:
                return socket.create_connection(place, self.seconds).close()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(self._interval / 5)

    def _join(self) -> None:
        end = time.monotonic() + self.seconds
        try:
            self._reach(end)
            self._store = self._client()
        except (OSError, RuntimeError) as error:
            raise self._error(_Loss((0,), f"did not come ({_plainly(error)})")) from error
        self._store.set(f"beat{self.rank}", "")
        about = {"process": os.getpid(), "host": socket.gethostname()}
        self._store.set(f"rank{self.rank}", json.dumps(about))
        # From here on, so that those who come too late read that this one gave up.
        self._beating = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        missing = set(range(self.world))
        while missing := {r for r in missing if not self._store.check([f"rank{r}"])}:
            if time.monotonic() > end:
                loss = _Loss(tuple(sorted(missing)), f"did not come within {self.seconds:g} s")
                self._beating = None
                self._store.set(f"beat{self.rank}", _farewell(f"{self._who(missing)} did not come"))
                raise self._error(loss)
            time.sleep(self._interval / 5)
        for rank in range(self.world):
            about = json.loads(self._store.get(f"rank{rank}"))
            self._names[rank] += f" (process {about['process']} on {about['host']})"
        self._beating.start()
        threading.Thread(target=self._watch, name="watch over peers", daemon=True).start()

    def meet(self) -> None:
        """Wait for all other processes to come here, for as long as they live.

        Raises:
            PeerLost: one does not live, or has ended.
        """
        if self.world == 1 or self._beating is None:
            return
        key, pause = f"meeting{next(self._meetings)}", 0.001
        here = self._store.add(key, 1)
        while here < self.world:
            if self._known.wait(pause):
                raise self._error(self._loss)
            pause = min(2 * pause, 0.1)
            here = self._store.add(key, 0)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What is inside is done together: whoever ends it by an error tells the others.

        Raises:
            PeerLost: in place of torch's error when another process is lost.
        """
        try:
            yield
        except PeerLost as error:
            self._leave(first_line(error))
            raise
        except BaseException as error:
            if self.world > 1 and is_lost_peer(error):
                lost = self._told(error)
                self._leave(first_line(lost))
                raise lost from error
            self._leave(first_line(error) or type(error).__name__)
            raise
        self._leave("")

    def _leave(self, why: str) -> None:
        """Say why, nothing if all is well, and watch no more."""
        self._farewell = _farewell(why)
        self._leaving.set()
        if self._beating is not None:
            self._beating.join(_LINGER + 1)

    # ---- signs of life --------------------------------------------------------------------------

    def _beat(self) -> None:
        """Give signs of life and take those of the others, until this process leaves."""
        keys = [f"beat{rank}" for rank in range(self.world)]
        try:
            store = self._client()
            number = 0
            while not self._leaving.wait(self._interval):
                number += 1
                store.set(keys[self.rank], str(number))
                self._heard = store.multi_get(keys)
            store.set(keys[self.rank], self._farewell)
            end = time.monotonic() + _LINGER
            while self._hosts and time.monotonic() < end:
                if all(map(_has_left, store.multi_get(keys))):
                    return
                time.sleep(self._interval / 10)
        except RuntimeError:
            self._broken = True

    def _watch(self) -> None:
        """Look for a loss, until this process leaves; end it if it can't do so by itself."""
        before = self._heard
        while not self._leaving.wait(self._interval):
            before = self._look(before)
            if self._loss is not None:
                break
        else:
            return
        self._known.set()
        if not self._leaving.wait(_GRACE):
            error = self._error(self._loss)
            if error.speaks:
                say(f"dhcl: {error}", sys.stderr)
            sys.stderr.flush()
            # The main thread waits in a library, which nothing else ends.
            os._exit(error.status)

    def _look(self, before: list[bytes]) -> list[bytes]:
        """Note who has been silent for how long, or left; silence is counted in own rounds.

        So neither a process that was stopped and goes on, nor a machine that slept, takes the
        time when it did not look for silence of the others.
        """
        heard = self._heard
        for rank, sign in enumerate(heard):
            if _has_left(sign):
                self._left[rank] = json.loads(sign)["left"]
            self._silent[rank] = (
                0.0 if sign != before[rank] else self._silent[rank] + self._interval
            )
        silent = [r for r in self._others() if self._silent[r] > self.seconds]
        ended = [r for r in range(self.world) if self._left.get(r)]
        if self._broken or self._silent[self.rank] > self.seconds:
            if 0 not in self._left:  # else the training is over, and the store with it
                self._loss = _Loss((0,), "does not answer, nor the store of all processes there")
        elif ended:
            self._loss = _Loss(tuple(ended[:1]), f"ended: {self._left[ended[0]]}")
        elif silent:
            how = f"gave no sign of life for {self.seconds:g} s"
            self._loss = _Loss(tuple(silent), f"was lost: it {how}")
        return heard

    def _others(self) -> Iterable[int]:
        return (r for r in range(self.world) if r != self.rank and r not in self._left)

    # ---- what is said ---------------------------------------------------------------------------

    def _told(self, error: BaseException) -> PeerLost:
        """The error for a connection that broke, or a collective that took too long."""
        self._known.wait(_ROUNDS * self._interval)
        loss = self._loss
        if loss is None:
            least = (_ROUNDS - 2) * self._interval
            silent = tuple(r for r in self._others() if self._silent[r] >= least)
            loss = _Loss(silent, f"was lost ({_plainly(error)})")
        return self._error(loss)

    def _error(self, loss: _Loss | None) -> PeerLost:
        assert loss is not None
        speaks = self.rank == min(set(range(self.world)) - set(loss.ranks), default=self.rank)
        text = f'{self._who(loss.ranks)} {loss.how}, in the stage "{self.stage}"; {self._advice()}'
        return PeerLost(text, speaks=speaks)

    def _who(self, ranks: Iterable[int]) -> str:
        return " and ".join(self._names[rank] for rank in sorted(ranks)) or "another process"


def _plainly(error: BaseException) -> str:
    """The first sentence of an error of torch, without the place in its sources."""
    text = re.sub(r"^(\[\S+:\d+\] )+", "", first_line(error))
    return text.partition(". ")[0].rstrip(".")


def _farewell(why: str) -> str:
    return json.dumps({"left": why})


def _has_left(sign: bytes) -> bool:
    return sign.startswith(b"{")
