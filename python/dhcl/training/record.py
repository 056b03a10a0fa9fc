"""What lies in a run's folder, whole or not: options, log, metrics, pseudo-labels and bank."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dhcl.config import (
    RUN_FILE,
    ConfigError,
    TrainConfig,
    read_options,
    read_run,
    with_changes,
)
from dhcl.errors import as_path
from dhcl.stored import Damaged, parse_json, read_json, read_text
from dhcl.training.checkpoint import CheckpointError, Progress, load_checkpoint
from dhcl.words import show

__all__ = ["CHOSEN_BY", "Record", "measured", "read_record"]


CHOSEN_BY = "test mAP: looked up, not a fair result"
"""How the epoch of the model that looked best was chosen."""

# Values of an entry that are numbers by name, and the most seconds that a stage may have taken.
_GROUPS = ("observed", "reranked", "seconds")
_LONGEST = 10**9


@dataclass
class Record:
    """The files of a run as numbers.

    Attributes:
        run: its folder.
        options: what ``config.yaml`` says, empty if it can't be read.
        config: the same as options, None if they are not ones of this version.
        log: entries of ``log.jsonl``, one an epoch.
        metrics: of ``metrics.json``.
        labels: (N,) pseudo-labels of the training images, -1 for outliers.
        labels_epoch: the epoch they were made in, from 1.
        bank: (N, d) float32, a row per training image; None if the memory has rows per cluster,
            or lies in parts.
        images: hash of the training images' names and cameras.
        missing: what is not there, with the reason.
    """

    run: Path
    options: dict[str, Any] = field(default_factory=dict)
    config: TrainConfig | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    labels_epoch: int = 0
    bank: NDArray[np.float32] | None = None
    images: str | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name, printable."""
        return show(self.run.resolve().name)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(C,) images of each cluster."""
        if self.labels is None:
            return np.zeros(0, np.int64)
        return np.bincount(self.labels[self.labels >= 0])

    def change(self, *, root: Path | None = None, workers: int | None = None) -> None:
        """Look for the images elsewhere, or load them with other processes."""
        changes = {k: v for k, v in (("root", root), ("workers", workers)) if v is not None}
        if self.config is not None:
            self.config = with_changes(self.config, changes)

    @property
    def last(self) -> dict[str, Any]:
        """Metrics of the last epoch's model, empty if the training has not come to its end."""
        last: dict[str, Any] = self.metrics.get("last", {})
        return last


def read_record(run: str | os.PathLike[str]) -> Record:
    """Read what there is.

    Raises:
        ConfigError: no such folder, or nothing of a run in it.
    """
    run = as_path("run", run)
    if not run.is_dir():
        raise ConfigError(f"run: there is no folder {show(run)}")
    if not any((run / name).exists() for name in ("config.yaml", "log.jsonl")):
        raise ConfigError(
            f"run: {show(run)} is not the folder of a run; it holds neither config.yaml nor "
            "log.jsonl"
        )
    record = Record(run)
    _read_options(record)
    _read_log(record)
    _read_metrics(record)
    _read_checkpoint(record)
    return record


def measured(run: Path, which: str) -> dict[str, Any]:
    """What was measured of the very model in a checkpoint of a run; empty where nothing was.

    Metrics of a run that has been trained further since are of another model.

    Args:
        run: its folder.
        which: ``last`` or ``best``.
    """
    try:
        state = load_checkpoint(run / "checkpoints" / f"{which}.pt")
        stored = _read_measured(run)
        protocol = {"protocol": stored["protocol"]} if "protocol" in stored else {}
        if which == "best":
            return {**state["metrics"], "chosen_by": CHOSEN_BY, **protocol}
        at, metrics = state["progress"], stored["last"]
        done = at["epoch"] == metrics["epoch"] + 1 and not at["iteration"]
    except (CheckpointError, OSError, ValueError, LookupError, TypeError):
        return {}
    return {**metrics, **protocol} if done else {}


def _read_options(record: Record) -> None:
    try:
        record.options = read_options(record.run / RUN_FILE)
        config = read_run(record.run)
        config.validate()
        record.config = config
    except ConfigError as error:
        record.missing["configuration"] = f"config.yaml can't be used ({_why(error)})"


def _read_log(record: Record) -> None:
    file, broken = record.run / "log.jsonl", 0
    try:
        lines = read_text(file, errors="replace").splitlines()
    except (OSError, Damaged) as error:
        record.missing["log"] = f"log.jsonl can't be read ({_why(error)}), so nothing over epochs"
        return
    for line in lines:
        try:
            record.log.append(_checked(parse_json(line)))
        except ValueError:
            broken += 1
    if broken:
        record.missing["log"] = f"{broken} of {len(lines)} lines of log.jsonl can't be read"
    elif not lines:
        record.missing["log"] = "log.jsonl is empty: no epoch has come to its end yet"


def _read_metrics(record: Record) -> None:
    try:
        record.metrics = _read_measured(record.run)
    except FileNotFoundError:
        total, done = record.options.get("epochs"), len(record.log)
        why = "there were no identities to evaluate on, or it was not written"
        if isinstance(total, int) and done < total:
            why = f"the log has {done} of {total} epochs, and metrics are of the last one"
        record.missing["metrics"] = f"there is no metrics.json: {why}"
    except (OSError, ValueError) as error:
        record.missing["metrics"] = f"metrics.json can't be read ({_why(error)})"


def _read_measured(run: Path) -> dict[str, Any]:
    """What ``metrics.json`` holds: numbers of the last epoch, those of the best, and texts."""
    metrics = read_json(run / "metrics.json")
    if not isinstance(metrics, dict):
        raise Damaged("it must be an object")
    for name in {"last", "best"} & metrics.keys():
        _checked(metrics[name], texts=("chosen_by",))
    return metrics


def _checked(entry: Any, texts: Collection[str] = ()) -> dict[str, Any]:
    """An entry of an epoch, whose values are numbers, or numbers by name, but for some texts."""
    if not isinstance(entry, dict) or not _is_number(entry.get("epoch")):
        raise Damaged("an entry must be an object with an epoch")
    if not isinstance(entry["epoch"], int):
        raise Damaged(f"epoch must be a whole number (got {entry['epoch']!r})")
    for name, value in entry.items():
        if name in _GROUPS and not isinstance(value, dict):
            raise Damaged(f"{name} must hold numbers by name (got {value!r})")
        inner = value.values() if isinstance(value, dict) else [value]
        if not all(map(_is_number, inner)) and not (name in texts and isinstance(value, str)):
            raise Damaged(f"{name} must hold numbers (got {value!r})")
    seconds = entry.get("seconds", {})
    if not all(0 <= each <= _LONGEST for each in seconds.values()):
        raise Damaged(f"seconds must be from 0 to {_LONGEST:,} (got {seconds!r})")
    return dict(entry)


def _is_number(value: Any) -> bool:
    # What is not finite belongs to a training that diverged; more than 64 bits are no count.
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _read_checkpoint(record: Record) -> None:
    file = record.run / "checkpoints" / "last.pt"
    if not file.exists():
        record.missing["checkpoint"] = (
            "there is no checkpoints/last.pt, so neither model, pseudo-labels nor bank"
        )
        return
    try:
        state = load_checkpoint(file)
        at = Progress.of(state, file)
        # A memory that several processes hold is in files of its own, and not read here.
        parted = "folder" in state["bank"]
        rows = None if parted else state["bank"]["features"].float().numpy()
        record.labels = state["labels"].numpy().astype(np.int64)
        record.images = str(state["images"])
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        record.missing["checkpoint"] = f"checkpoints/last.pt can't be used ({_why(error)})"
        return
    # An epoch that is clustered already is the one of the labels, else the one before it.
    record.labels_epoch = at.epoch + at.clustered
    if rows is not None and len(rows) == len(record.labels):
        record.bank = rows


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return show(" ".join(text.split()))
