"""What a run writes beside its checkpoints: JSON lines, CSV and TensorBoard, one entry an epoch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dhcl.files import write_atomic

__all__ = ["RunLog", "flat"]


class RunLog:
    """``log.jsonl`` is the record; ``log.csv`` and ``tensorboard/`` are made from it.

    Args:
        folder: of the run.
        size: bytes of ``log.jsonl`` that count; what an interrupted run wrote after its last
            checkpoint is cut off.
    """

    def __init__(self, folder: Path, size: int = 0) -> None:
        self._folder = folder
        from torch.utils.tensorboard import SummaryWriter  # a second that only training needs

        self._path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.truncate(min(size, file.tell()))
        self.entries = [json.loads(line) for line in self._path.read_text().splitlines()]
        # Later steps of an interrupted run are dropped there too.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=len(self.entries))

    @property
    def size(self) -> int:
        """Bytes of ``log.jsonl`` so far."""
        return self._path.stat().st_size

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add the entry of an epoch."""
        self.entries.append(dict(entry))
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        rows = [flat(each) for each in self.entries]
        table = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._folder / "log.csv", table.getvalue().encode())
        for name, value in rows[-1].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(name.replace(".", "/"), value, rows[-1]["epoch"])
        self._board.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self._board.close()


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out
