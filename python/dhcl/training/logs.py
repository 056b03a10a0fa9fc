"""What a run writes beside its checkpoints: JSON lines, CSV and loggers, one entry an epoch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dhcl.errors import CheckpointError
from dhcl.files import naming, open_log, write_atomic
from dhcl.stored import MAX_TEXT, Damaged, parse_json
from dhcl.training.trackers import Trackers
from dhcl.words import first_line, show

__all__ = ["RunLog", "flat"]


class RunLog:
    """``log.jsonl`` is the record; ``log.csv``, ``tensorboard/`` and loggers follow from it.

    Args:
        folder: of the run.
        size: bytes of ``log.jsonl`` that count; what an interrupted run wrote after its last
            checkpoint is cut off.
        trackers: loggers of other projects.

    Raises:
        NotPlainFile: ``log.jsonl`` is a link, a FIFO or a device.
        CheckpointError: it is not what a run has written.
    """

    def __init__(self, folder: Path, size: int = 0, trackers: Trackers | None = None) -> None:
        self._folder, self._trackers = folder, trackers
        from torch.utils.tensorboard import SummaryWriter  # a second that only training needs

        self._path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        with naming(self._path), open_log(self._path) as file:
            file.truncate(min(size, file.seek(0, os.SEEK_END)))
            self.entries = _entries(self._path, file)
        # Later steps of an interrupted run are dropped there too.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=len(self.entries))

    @property
    def size(self) -> int:
        """Bytes of ``log.jsonl`` so far."""
        return self._path.stat().st_size

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add the entry of an epoch."""
        self.entries.append(dict(entry))
        with naming(self._path), open_log(self._path) as file:
            file.write((json.dumps(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        rows = [flat(each) for each in self.entries]
        table = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._folder / "log.csv", table.getvalue().encode())
        self._show(rows[-1], rows[-1]["epoch"])

    def add_metrics(self, results: Mapping[str, Any]) -> None:
        """Show what ``metrics.json`` holds, its record, with the last epoch's numbers."""
        self._show(flat(results), self.entries[-1]["epoch"])

    def _show(self, row: Mapping[str, Any], epoch: int) -> None:
        """Give TensorBoard and the loggers the numbers of a row, ``a.b`` by the name ``a/b``."""
        numbers = {
            name.replace(".", "/"): value
            for name, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        with naming(self._folder / "tensorboard"):
            for name, value in numbers.items():
                self._board.add_scalar(name, value, epoch)
            self._board.flush()
        if self._trackers:
            self._trackers.log(numbers, epoch)

    def close(self) -> None:
        """Finish the TensorBoard file and the loggers' runs."""
        with naming(self._folder / "tensorboard"):
            self._board.close()
        if self._trackers:
            self._trackers.close()


def _entries(path: Path, file: BinaryIO) -> list[dict[str, Any]]:
    """The lines of a log, each an object of JSON with the number of its epoch."""
    file.seek(0)
    data = file.read(MAX_TEXT + 1)
    try:
        if len(data) > MAX_TEXT:
            raise Damaged(f"it must be no larger than {MAX_TEXT:,} bytes")
        entries = [parse_json(line) for line in data.decode().split("\n") if line]
        if not all(isinstance(each, dict) and type(each.get("epoch")) is int for each in entries):
            raise Damaged("a line must be an object with the number of its epoch")
    except ValueError as error:  # also bytes that are no text
        raise CheckpointError(
            f"log: {show(path)} is damaged ({first_line(error)}); move it away, and the run goes "
            "on with a new one"
        ) from error
    return entries


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out
