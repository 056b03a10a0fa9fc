"""What the package raises for people: one family, each member with the exit status it means.

And the one check that every function with a path makes, before anything of a library raises.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DHCLError",
    "DataError",
    "Diverged",
    "FeatureError",
    "Interrupted",
    "NoClusters",
    "PeerLost",
    "UnavailableWeights",
    "WorkerLost",
    "as_path",
]


def as_path(name: str, value: object) -> Path:
    """A path as a caller gave it, with ``~`` for the home folder.

    Args:
        name: of the argument, for the error.
        value: text or an object that stands for a path.

    Raises:
        TypeError: something else, such as a list or bytes.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{name}: must be a path (got {type(value).__name__})")
    return Path(path).expanduser()


class DHCLError(Exception):
    """Something whoever started the command can act on, said in words for them.

    Attributes:
        status: exit status of the command line: 2 where what was asked for is wrong, 1 where a run
            could not go on, 128 + n where signal n stopped it.
    """

    status: int = 1


class ConfigError(DHCLError, ValueError):
    """An option that does not exist, has a wrong value or contradicts another."""

    status = 2


class DataError(DHCLError, ValueError):
    """A data set that is not there, not what was asked for, or has images that can't be read."""

    status = 2


class FeatureError(DHCLError, ValueError):
    """A file of features that can't be read, or holds something else than was expected."""

    status = 2


class UnavailableWeights(DHCLError, RuntimeError):
    """Pretrained weights are neither in the cache nor to be downloaded; says what to put where."""

    status = 2


class CheckpointError(DHCLError, RuntimeError):
    """A checkpoint that can't be written or read, or is of another run."""


class Diverged(DHCLError, RuntimeError):
    """A loss or weight that is not finite."""


class NoClusters(DHCLError, RuntimeError):
    """No cluster for as many epochs as the patience allows."""


class PeerLost(DHCLError, RuntimeError):
    """Another process of the training was killed, does not answer or ended; says how to go on.

    Attributes:
        speaks: whether this process is the one that says so where all of them write to one place.
    """

    def __init__(self, text: str, *, speaks: bool = True) -> None:
        super().__init__(text)
        self.speaks = speaks


class WorkerLost(DHCLError, RuntimeError):
    """Processes that load images were killed, or do not answer, again and again."""


class Interrupted(DHCLError):
    """The run was asked to stop, by Ctrl-C or SIGTERM; a checkpoint has been written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.status = 128 + signal_number
