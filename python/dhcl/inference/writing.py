"""Features to .npz and .parquet files, batch by batch; whole files, or none.

Needs torch and NumPy alone; pyarrow for .parquet.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.errors import FeatureError
from dhcl.files import NpyRows, replacing
from dhcl.inference.features import pyarrow_parquet
from dhcl.words import show

__all__ = ["FeatureWriter", "feature_writer"]

# Rows of a group of a .parquet file.
_ROW_GROUP = 4096


class FeatureWriter(Protocol):
    """Takes features batch by batch."""

    def append(
        self,
        features: torch.Tensor,
        paths: Sequence[str],
        ids: Sequence[int | str] | None,
        cameras: Sequence[int | str] | None,
    ) -> None:
        """Add rows (n, d) with their paths, and identities and cameras or None."""


@contextlib.contextmanager
def feature_writer(path: Path, width: int, model: str) -> Iterator[FeatureWriter]:
    """Write features to ``path`` (.npz or .parquet) as they come; whole, or not at all.

    A ``.npz`` file holds ``features`` (N, d) float32, ``paths``, ``model`` and, where they are
    given, ``ids`` and ``cameras``: int64 if all are whole numbers, else text. A ``.parquet`` file
    has a row per image with columns of the same names, and the model in its metadata. Features are
    never all in memory; paths are.

    Raises:
        FeatureError: another kind of file; no pyarrow; nothing appended.
    """
    kind = path.suffix.lower()
    if kind not in (".npz", ".parquet"):
        raise FeatureError(f"features: must be written to .npz or .parquet (got {show(path.name)})")
    if kind == ".parquet":
        pyarrow_parquet()
    rows = NpyRows(path, width)  # which never gets that name
    columns = _Columns(rows)
    try:
        yield columns
        if not rows.rows:
            raise FeatureError(f"features: none to write to {show(path)}")
        with replacing(path) as file:
            (_write_npz if kind == ".npz" else _write_parquet)(file, columns, model)
    finally:
        rows.discard()


class _Columns:
    """Features in a file, what goes with them in memory."""

    def __init__(self, rows: NpyRows) -> None:
        self.rows = rows
        self.texts: dict[str, list[int | str]] = {"paths": []}

    def append(
        self,
        features: torch.Tensor,
        paths: Sequence[str],
        ids: Sequence[int | str] | None,
        cameras: Sequence[int | str] | None,
    ) -> None:
        self.rows.append(features)
        self.texts["paths"] += paths
        for name, values in (("ids", ids), ("cameras", cameras)):
            if values is not None:
                self.texts.setdefault(name, []).extend(values)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Whole numbers where all are, else texts, unknown ones empty."""
        arrays = {}
        for name, values in self.texts.items():
            if all(isinstance(value, int) for value in values):
                arrays[name] = np.array(values, np.int64)
            else:
                arrays[name] = np.array(["" if value == -1 else str(value) for value in values])
        return arrays


def _write_npz(file: BinaryIO, columns: _Columns, model: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as target:
            shutil.copyfileobj(columns.rows.finish(), target, 1 << 20)
        for name, array in {**columns.arrays(), "model": np.array(model)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as target:
                np.lib.format.write_array(target, array, allow_pickle=False)


def _write_parquet(file: BinaryIO, columns: _Columns, model: str) -> None:
    import pyarrow

    parquet = pyarrow_parquet()
    features = columns.rows.mapped()
    arrays = columns.arrays()
    width = features.shape[1]
    kinds = {
        name: pyarrow.int64() if array.dtype.kind == "i" else pyarrow.string()
        for name, array in arrays.items()
    }
    schema = pyarrow.schema(
        {"features": pyarrow.list_(pyarrow.float32(), width), **kinds},
        metadata={"dhcl.model": model},
    )
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(features), _ROW_GROUP):
            part = slice(start, start + _ROW_GROUP)
            flat = pyarrow.array(np.array(features[part]).reshape(-1))
            rows = {"features": pyarrow.FixedSizeListArray.from_arrays(flat, width)}
            for name, array in arrays.items():
                values = array[part].tolist()
                if array.dtype.kind != "i":  # names of files may hold any bytes
                    values = [v.encode("utf-8", "backslashreplace").decode() for v in values]
                rows[name] = pyarrow.array(values, kinds[name])
            writer.write_table(pyarrow.table(rows, schema=schema))
