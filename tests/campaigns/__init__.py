"""Accidents, many of them, at random moments; a short form of the first is in the test suite.

    python -m tests.campaigns writers --n 50           # SIGKILLs of each writer of files
    python -m tests.campaigns kills --n 100            # SIGKILLs of trainings, which are resumed
    python -m tests.campaigns disks --n 1              # full disks, for each file that is written
    python -m tests.campaigns network-folder --n 20    # the folder of a run is unmounted meanwhile
    python -m tests.campaigns two-processes --n 20     # on one run, and on one index
    python -m tests.campaigns clock --n 10             # one that goes back, and files of the future

Each prints what was done as one line of JSON and ends with status 0, or raises at the first wrong
thing, with the seed that shows it again (`--seed`). Processes are forked from one that has imported
what they need, and kills are real.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.campaigns.accidents import clock, kills, two_processes
from tests.campaigns.places import disks, network_folder
from tests.campaigns.writing import WRITERS, writers

__all__ = ["CAMPAIGNS", "WRITERS", "campaign"]

CAMPAIGNS: dict[str, Callable[[Path, int, random.Random], dict[str, Any]]] = {
    "writers": writers,
    "kills": kills,
    "disks": disks,
    "network-folder": network_folder,
    "two-processes": two_processes,
    "clock": clock,
}


def campaign(name: str, n: int, seed: int) -> dict[str, Any]:
    """Run one, in a folder of its own; its figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dhcl-campaign-") as folder:
        return CAMPAIGNS[name](Path(folder).resolve(), n, random.Random(seed))
