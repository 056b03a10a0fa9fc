"""Saved features, read from .npy, .npz, .pt, .mat and .parquet files.

Needs torch and NumPy alone; SciPy for .mat, pyarrow for .parquet.
"""

from __future__ import annotations

import contextlib
import importlib.util
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.errors import FeatureError, as_path
from dhcl.inference.apart import ApartError, read_apart
from dhcl.npy import NpyHeader, read_npy, read_npy_header
from dhcl.stored import Damaged, most_unpacked
from dhcl.torch_files import ForeignCode, load_tensors
from dhcl.words import first_line, show

__all__ = [
    "FEATURE_SUFFIXES",
    "FeatureError",
    "Features",
    "check_pair",
    "common_numbers",
    "pyarrow_parquet",
    "read_features",
    "unit_rows",
]

FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".mat", ".parquet")
"""Files that :func:`read_features` takes."""

Role = Literal["", "query", "gallery"]

# Names that files of this field use, after those that `dhcl export` writes.
_NAMES = {
    "features": ("features", "feature", "feats", "feat", "embeddings"),
    "ids": ("ids", "id", "labels", "label", "pids"),
    "cameras": ("cameras", "camera", "cams", "cam", "camids"),
    "paths": ("paths", "path"),
    "model": ("model",),
}
# Of a file that holds queries and gallery: query_features, or query_f as in layumi's
# Person_reID_baseline_pytorch, whose other names are query_label and query_cam.
_ROLE_NAMES = {**_NAMES, "features": (*_NAMES["features"], "f")}


@dataclass(frozen=True, eq=False)
class Features:
    """What a file holds.

    Attributes:
        values: (N, d) float32, finite, as they are in the file.
        ids: (N,) int64, or text where one is no whole number; ``01`` and ``1`` are the same. None
            where the file has none.
        cameras: (N,) like ids.
        paths: N paths; None where the file has none.
        model: fingerprint of the model, in files that ``dhcl export`` wrote.
        file: where they come from.
        keys: everything the file holds, by name.
    """

    values: torch.Tensor
    ids: NDArray[Any] | None
    cameras: NDArray[Any] | None
    paths: tuple[str, ...] | None
    model: str | None
    file: Path
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def unit(self) -> torch.Tensor:
        """Rows scaled to length 1; a row of zeros raises :class:`FeatureError`."""
        unit, zero = unit_rows(self.values)
        if len(zero):
            raise FeatureError(
                f"features: rows must have a length above 0 (got zeros in row {int(zero[0])} of "
                f"{show(self.file)}, {len(zero)} such rows)"
            )
        return unit


def unit_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, d) float32 scaled to length 1, and the numbers (n,) of those that can't be.

    Rows that are 0 or not finite can't be. Where all have length 1 they keep their bits.
    """
    lengths: torch.Tensor = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero()[:, 0]
    if ((lengths - 1).abs() <= 1e-5).all():
        return values, wrong
    return values / lengths.float()[:, None], wrong


def read_features(
    path: str | Path, *, role: Role = "", key: str | None = None, transposed: bool = False
) -> Features:
    """Read features and what lies beside them.

    A ``.npy`` file or a tensor in a ``.pt`` file is features alone. In other files features are
    under ``features`` (or ``feats``, ``embeddings``), or are the only matrix of floating numbers;
    identities under ``ids``, ``labels`` or ``pids``; cameras under ``cameras``, ``cams`` or
    ``camids``; paths under ``paths``. A file may hold both sides, as ``query_features`` and
    ``gallery_features`` (or ``query_f``, ``query_label``, ``query_cam``). Code in files is not run.
    Of a ``.npz`` file only what is used is unpacked, to 1 GiB or 100 times its size at most.

    Args:
        path: a file with one of :data:`FEATURE_SUFFIXES`.
        role: ``query`` or ``gallery``, for a file that holds both.
        key: name of the features where none of these fits.
        transposed: the file has them as (d, N), a column for each image.

    Raises:
        FeatureError: no such file, another kind or a damaged one, no features in it (the names it
            has are listed), not a finite matrix (N, d), ids, cameras or paths of another length.
    """
    path = as_path("features", path)
    if not path.is_file():
        raise FeatureError(f"features: no such file: {show(path)}")
    if path.suffix.lower() not in FEATURE_SUFFIXES:
        raise FeatureError(
            f"features: must be one of {' '.join(FEATURE_SUFFIXES)} (got {show(path.name)})"
        )
    content = _content(path)
    name, values = _matrix(path, content, role, key, transposed)
    shape = tuple(values.shape)
    return Features(
        values=values,
        ids=_column(path, content, "ids", role, shape),
        cameras=_column(path, content, "cameras", role, shape),
        paths=_paths(path, content, role, shape),
        model=_model(content),
        file=path,
        keys=tuple(content) if name else (),
    )


# ---- kinds of files -----------------------------------------------------------------------------


def _content(path: Path) -> Mapping[str, Any]:
    """What the file holds by name; a bare array is called by the empty name."""
    kind = path.suffix.lower()
    read: dict[str, Callable[[Path], Mapping[str, Any]]]
    read = {".npy": _npy, ".npz": _Archive, ".mat": _mat, ".parquet": _parquet}
    try:
        return read.get(kind, _pt)(path)
    except (FeatureError, MemoryError):
        raise
    except ForeignCode as error:
        raise FeatureError(f"features: {show(path)} {error}") from error
    except Damaged as error:
        raise FeatureError(f"features: {show(path)} can't be read ({error})") from error
    except Exception as error:  # each format has its own for a damaged file
        raise FeatureError(
            f"features: {show(path)} can't be read as {kind} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _npy(path: Path) -> dict[str, Any]:
    return {"": read_npy(path)}


class _Archive(Mapping[str, Any]):
    """The arrays of a ``.npz`` file, each read when it is asked for: others take no memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            arrays = [one for one in archive.infolist() if one.filename.endswith(".npy")]
        self._members = {one.filename.removesuffix(".npy"): one for one in arrays}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.header(name)
        with self._open(name) as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array

    def header(self, name: str) -> NpyHeader:
        """What an array is, without its numbers; one that can't be read is refused."""
        member = self._members[name]
        with self._open(name) as file:
            header = read_npy_header(file)
        if header.dtype.hasobject:
            raise FeatureError(f"features: {name!r} in {show(self._path)} holds pickled objects")
        # What the archive says of a member may be as wrong as what the member says of itself.
        packed = min(member.compress_size, self._path.stat().st_size)
        most = most_unpacked(packed)
        if header.size > member.file_size or header.size > most:
            raise FeatureError(
                f"features: {name!r} in {show(self._path)} must have the {header.size:,} bytes of "
                f"its header, and unpack to no more than {most:,} bytes "
                f"(got {member.file_size:,} bytes in {packed:,})"
            )
        return header

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._members[name]) as file:
                yield file
        except (FeatureError, MemoryError):
            raise
        except Exception as error:  # of zip files, of what packs them, and of headers
            raise FeatureError(
                f"features: {name!r} in {show(self._path)} can't be read "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error


def _pt(path: Path) -> dict[str, Any]:
    content = load_tensors(path)
    if isinstance(content, torch.Tensor):
        return {"": content}
    if isinstance(content, Mapping):
        return {str(name): value for name, value in content.items()}
    raise FeatureError(
        f"features: {show(path)} must hold a tensor or a dictionary of them "
        f"(got {type(content).__name__})"
    )


def _mat(path: Path) -> dict[str, Any]:
    try:
        return read_apart(path, "mat")
    except ApartError as error:
        if error.kind == "ModuleNotFoundError":
            raise FeatureError("features: .mat files need SciPy: pip install scipy") from error
        if error.kind == "NotImplementedError":
            raise FeatureError(
                f"features: {show(path)} is a .mat file of version 7.3; save it with -v7"
            ) from error
        raise FeatureError(
            f"features: {show(path)} can't be read as .mat ({error.kind}: {first_line(error)})"
        ) from error


def _parquet(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise FeatureError(_NO_ARROW)
    try:
        content = read_apart(path, "parquet")
    except ApartError as error:
        raise FeatureError(
            f"features: {show(path)} can't be read as .parquet ({error.kind}: {first_line(error)})"
        ) from error
    for name in [name for name in content if f"{name} lengths" in content]:
        content[name] = _lists(path, name, content[name], content.pop(f"{name} lengths"))
    return content


def _lists(path: Path, name: str, values: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
    """A column of lists as a matrix."""
    widths, missing = np.unique(lengths[lengths >= 0]), int((lengths < 0).sum())
    if missing or len(widths) > 1:
        raise FeatureError(
            f"features: every row of {name!r} in {show(path)} must have the same width "
            f"(got widths {widths.tolist()}, {missing} rows missing)"
        )
    return values.reshape(len(lengths), -1)


_NO_ARROW = "features: .parquet files need pyarrow: pip install 'dhcl[export]'"


def pyarrow_parquet() -> Any:
    """The module of that name.

    Raises:
        FeatureError: it is not installed.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise FeatureError(_NO_ARROW) from error
    return parquet


# ---- what is in them ----------------------------------------------------------------------------


def _find(content: Mapping[str, Any], what: str, role: Role) -> str | None:
    """The name under which the file holds this."""
    if role:
        for name in _ROLE_NAMES[what]:
            if f"{role}_{name}" in content:
                return f"{role}_{name}"
    return next((name for name in _NAMES[what] if name in content), None)


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array: NDArray[Any] = np.asarray(value)
    return array


def _is_matrix(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) and (
        _array(value).ndim == 2 and _array(value).dtype.kind == "f"
    )


def _matrices(content: Mapping[str, Any]) -> list[str]:
    """Names of the matrices of floating numbers."""
    if not isinstance(content, _Archive):
        return [name for name, value in content.items() if _is_matrix(value)]
    headers = {name: content.header(name) for name in content}
    return [name for name, is_ in headers.items() if len(is_.shape) == 2 and is_.dtype.kind == "f"]


def _matrix(
    path: Path, content: Mapping[str, Any], role: Role, key: str | None, transposed: bool
) -> tuple[str, torch.Tensor]:
    if key is not None and key not in content:
        raise FeatureError(f"features: there is no {key!r} in {show(path)} ({_named(content)})")
    name = key if key is not None else ("" if "" in content else _find(content, "features", role))
    if name is None:
        matrices = _matrices(content)
        if len(matrices) != 1:
            raise FeatureError(
                f"features: there is no 'features' in {show(path)} ({_named(content)}); --key NAME "
                "says which it is"
            )
        name = matrices[0]
    called = f"{name!r} in {show(path)}" if name else show(path)
    try:
        array = _array(content[name])
    except FeatureError:
        raise
    except (TypeError, ValueError) as error:
        raise FeatureError(f"features: {called} must be a matrix ({error})") from error
    if array.dtype.kind not in "fiu":
        raise FeatureError(f"features: {called} must be numbers (got {array.dtype})")
    if array.ndim != 2 or 0 in array.shape:
        raise FeatureError(
            f"features: {called} must be (N, d), a row per image (got shape {array.shape})"
        )
    array = array.T if transposed else array
    values = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    wrong = (~values.isfinite()).any(1).nonzero()
    if len(wrong):
        raise FeatureError(
            f"features: {called} must be finite in float32 (got nan or inf in row {int(wrong[0])}, "
            f"{len(wrong)} such rows)"
        )
    return name, values


def _named(content: Mapping[str, Any]) -> str:
    if "" in content:
        return "the file is a bare array"
    return f"it holds: {', '.join(map(repr, content)) or 'nothing'}"


def _column(
    path: Path, content: Mapping[str, Any], what: str, role: Role, shape: tuple[int, ...]
) -> NDArray[Any] | None:
    """Whole numbers or texts, one per row of the features, which have this shape."""
    name = _find(content, what, role)
    if name is None:
        return None
    array = _array(content[name])
    if array.size != max(array.shape, default=0) or array.size != shape[0]:
        raise FeatureError(
            f"features: {name!r} in {show(path)} must be {shape[0]} values, one per row of the "
            f"features (got shape {array.shape}){_other_axis(array.size, shape)}"
        )
    column = _identifiers(array.reshape(-1))
    if column is None:
        raise FeatureError(
            f"features: {name!r} in {show(path)} must be whole numbers or texts (got {array.dtype})"
        )
    return column


def _identifiers(array: NDArray[Any]) -> NDArray[Any] | None:
    """(N,) int64 where all are whole numbers or nothing, else equal texts for what is equal.

    None if there is something else in it.
    """
    if array.dtype.kind == "f" and np.array_equal(array, np.round(array)):
        array = array.astype(np.int64)  # Matlab's numbers
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    values = [_plain(each) for each in array]
    if array.dtype.kind not in "OSU" or not all(isinstance(each, (int, str)) for each in values):
        return None
    read = [identifier(str(value).strip()) for value in values]
    if all(isinstance(each, int) for each in read):
        return np.array(read, dtype=np.int64)
    return np.array(["" if each == -1 else str(each) for each in read])


def _plain(value: Any) -> Any:
    """What a place of a column holds: text for bytes and Matlab's cells, empty for nothing."""
    if isinstance(value, np.ndarray) and value.size <= 1:
        value = value.item() if value.size else None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return "" if value is None else value


def _other_axis(count: int, shape: tuple[int, ...]) -> str:
    """What to say where there are as many values as the features have columns."""
    if count != shape[1]:
        return ""
    return (
        f"; the features are {shape[0]} x {shape[1]}: if each column is an image, --transposed "
        "says so"
    )


def _paths(
    path: Path, content: Mapping[str, Any], role: Role, shape: tuple[int, ...]
) -> tuple[str, ...] | None:
    name = _find(content, "paths", role)
    if name is None:
        return None
    array = _array(content[name]).reshape(-1)
    if len(array) != shape[0]:
        raise FeatureError(
            f"features: {name!r} in {show(path)} must be {shape[0]} paths, one per row of the "
            f"features (got {len(array)}){_other_axis(len(array), shape)}"
        )
    texts = (str(_plain(each)) for each in array)
    return tuple(text.rstrip() if path.suffix == ".mat" else text for text in texts)


def _model(content: Mapping[str, Any]) -> str | None:
    value = content.get("model")
    array = np.asarray(value if isinstance(value, (str, np.ndarray)) else None)
    return str(array) if array.ndim == 0 and array.dtype.kind == "U" else None


# ---- two sides ----------------------------------------------------------------------------------


def check_pair(query: Features, gallery: Features) -> None:
    """Raise :class:`FeatureError` unless the two can be compared."""
    one, other = query.values.shape[1], gallery.values.shape[1]
    if one != other:
        raise FeatureError(
            f"features: query and gallery must have one width (got {one} in {show(query.file)} and "
            f"{other} in {show(gallery.file)})"
        )
    if query.model and gallery.model and query.model != gallery.model:
        raise FeatureError(
            f"features: query and gallery must be of one model (got {query.model[:12]} in "
            f"{show(query.file)} and {gallery.model[:12]} in {show(gallery.file)})"
        )


def common_numbers(*columns: NDArray[Any]) -> list[torch.Tensor]:
    """Each column as (N,) int64, equal numbers for what is equal; -1 and empty texts are -1.

    ``"01"`` equals 1, as it does where a pattern reads paths.

    Raises:
        FeatureError: something else than whole numbers and texts.
    """
    found = [_identifiers(column) for column in columns]
    for column, same in zip(columns, found, strict=True):
        if same is None:
            raise FeatureError(f"columns: must be whole numbers or texts (got {column.dtype})")
    known = [column for column in found if column is not None]
    if all(column.dtype.kind == "i" for column in known):
        return [torch.from_numpy(column) for column in known]
    names, numbers = np.unique(np.concatenate([c.astype(str) for c in known]), return_inverse=True)
    numbers[np.isin(names, ("", "-1"))[numbers]] = -1
    return list(torch.from_numpy(numbers).split([len(column) for column in columns]))
