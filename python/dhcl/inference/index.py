"""An index: the features of a gallery on disk, to search in, with the commands for it.

A folder with ``index.json``, which names the model and the two files of the present generation:
``features-G.npy``, (N, d) float32, memory-mapped, and ``images-G.jsonl``, a line per row. A change
writes the next generation beside it and then replaces ``index.json``: at any moment, whatever
happens, the index is the old one or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.config import ConfigError
from dhcl.data import DataError, image_files, path_reader
from dhcl.files import NpyRows, only_writer, write_atomic
from dhcl.inference.reid import Found, ReID, search
from dhcl.words import first_ones, show
from dhcl_ops import knn

__all__ = ["Index", "Record", "Update", "add_images", "create_index", "remove_images"]

Backend = Literal["auto", "torch", "faiss"]

_FORMAT = 1
# Gallery rows in memory at a time.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Record:
    """An image of an index.

    Attributes:
        root: number of the folder it was found in.
        path: below that folder, with ``/``.
        id, camera: as the index's pattern reads them off the path, -1 for unknown.
        size, mtime_ns: of the file when its features were extracted.
    """

    root: int
    path: str
    id: int | str
    camera: int | str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Update:
    """What a change of an index did: numbers of images, and what was left out."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    total: int = 0
    bad: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{count:,} {name}"
            for name in ("added", "changed", "unchanged", "removed")
            if (count := getattr(self, name))
        ]
        lines = [f"{', '.join(parts) or 'nothing to do'}; {self.total:,} images in the index"]
        if self.bad:
            lines.append(f"left out, {len(self.bad):,} that can't be read:")
            lines += [f"  {line}" for line in first_ones(self.bad)]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Index:
    """An index as it was when it was opened; later changes by others do not show.

    Attributes:
        folder: where it lies.
        model: fingerprint of the model (:attr:`dhcl.ReID.id`).
        run, which: that model's run and checkpoint.
        pattern: what identities and cameras are read with, or None.
        trained_cameras: whether cameras are those of the training, with their statistics.
        roots: folders the images were found in.
        records: N images.
        features: (N, d) float32, memory-mapped, read-only.
        generation: number of changes so far.
    """

    folder: Path
    model: str
    run: Path
    which: Literal["last", "best"]
    pattern: str | None
    trained_cameras: bool
    roots: tuple[str, ...]
    records: tuple[Record, ...]
    features: NDArray[np.float32]
    generation: int

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """Open an index.

        Raises:
            DataError: no index there, one of another version, or damaged.
        """
        folder = Path(folder).expanduser()
        for last_try in (False, True):
            about = _read_about(folder)
            try:
                return cls._of(folder, about)
            except FileNotFoundError as error:
                # Between the two reads another process may have replaced it.
                if last_try:
                    raise _damaged(folder, f"there is no {show(str(error.filename))}") from error
        raise AssertionError

    @classmethod
    def _of(cls, folder: Path, about: dict[str, Any]) -> Index:
        try:
            generation = int(about["generation"])
            text = (folder / f"images-{generation}.jsonl").read_text(encoding="utf-8")
            records = tuple(Record(**json.loads(line)) for line in text.splitlines())
            features = np.load(folder / f"features-{generation}.npy", mmap_mode="r")
            index = cls(
                folder=folder,
                model=str(about["model"]),
                run=Path(about["run"]),
                which=about["which"],
                pattern=about["pattern"],
                trained_cameras=bool(about["trained_cameras"]),
                roots=tuple(about["roots"]),
                records=records,
                features=features,
                generation=generation,
            )
        except FileNotFoundError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, str(error)) from error
        if features.ndim != 2 or len(features) != len(records) or features.dtype != np.float32:
            raise _damaged(
                folder, f"{len(records)} images, features {features.shape} {features.dtype}"
            )
        return index

    def __len__(self) -> int:
        return len(self.records)

    def path(self, row: int) -> Path:
        """The file of a row."""
        record = self.records[row]
        return Path(self.roots[record.root], record.path)

    def load_model(self, run: Path | None = None, device: str | torch.device = "auto") -> ReID:
        """The model that made the index, from its run or another one.

        Raises:
            ConfigError: as :meth:`dhcl.ReID.load`, or another model.
        """
        model = ReID.load(self.run if run is None else run, self.which, device)
        self.check_model(model)
        return model

    def check_model(self, model: ReID) -> None:
        """Raise :class:`dhcl.errors.ConfigError` unless the index was made by this model."""
        if model.id != self.model:
            raise ConfigError(
                f"index: {show(self.folder)} was made by model {self.model[:12]} (of "
                f"{show(self.run)}, {self.which}), and {show(model.run)}, {model.which}, now is "
                f"{model.id[:12]}; features of two models can't be compared. Make the index anew, "
                "or name the run it was made with"
            )

    def search(
        self,
        query: torch.Tensor,
        topk: int = 20,
        *,
        cameras: Iterable[int | str] | None = None,
        leave_out: Sequence[int | str] | None = None,
        rerank: bool = False,
        backend: Backend = "auto",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Found]:
        """Rank the images for each query: exactly, best first, ties by row.

        Without re-ranking, memory does not grow with the index.

        Args:
            query: (Q, d) float32, rows of length 1, of the model that made the index.
            topk: images for each query; fewer where there are fewer.
            cameras: only images of these.
            leave_out: (Q,) a camera for each query whose images are left out; -1 leaves out none.
            rerank: by k-reciprocal re-ranking, all queries with the same camera left out together.
            backend: what computes similarities: ``faiss``, ``torch``, or faiss where it is
                installed. They differ in the last places at most.
            progress: as of :func:`dhcl_ops.knn`.

        Returns:
            For each query, :class:`dhcl.inference.reid.Found` of one dimension; indices are rows.

        Raises:
            ConfigError: queries of another width, topk below 1, an unknown camera, no faiss.
        """
        width = self.features.shape[1]
        if query.dim() != 2 or query.shape[1] != width:
            raise ConfigError(
                f"query: features must be (Q, {width}), as the index has them "
                f"(got {tuple(query.shape)})"
            )
        if topk < 1:
            raise ConfigError(f"topk: must be at least 1 (got {topk})")
        allowed = self._of_cameras(cameras)
        groups: dict[int | str, list[int]] = {}
        for number in range(len(query)):
            groups.setdefault(-1 if leave_out is None else leave_out[number], []).append(number)
        results: list[Found] = [_NOTHING] * len(query)
        for camera, numbers in groups.items():
            rows = allowed
            if camera != -1:
                others = np.array([record.camera != camera for record in self.records])
                rows = np.flatnonzero(others if rows is None else others[rows])
                rows = rows if allowed is None else allowed[rows]
            found = self._search(query[numbers], rows, topk, rerank, backend, progress)
            for place, number in enumerate(numbers):
                results[number] = Found(*(None if x is None else x[place] for x in found))  # type: ignore[arg-type]
        return results

    def _of_cameras(self, cameras: Iterable[int | str] | None) -> NDArray[np.int64] | None:
        if cameras is None:
            return None
        wanted = set(cameras)
        known = {record.camera for record in self.records} - {-1}
        if not wanted <= known:
            there = ", ".join(map(str, sorted(known, key=str)[:20]))
            strange = ", ".join(map(str, sorted(wanted - known, key=str)))
            rule = f"known are {there}" if known else "none is known; --pattern says where they are"
            raise ConfigError(f"camera: there is no {strange} in {show(self.folder)}, {rule}")
        return np.flatnonzero([record.camera in wanted for record in self.records])

    def _search(
        self,
        query: torch.Tensor,
        rows: NDArray[np.int64] | None,
        topk: int,
        rerank: bool,
        backend: Backend,
        progress: Callable[[str, int, int], None] | None,
    ) -> Found:
        count = len(self) if rows is None else len(rows)
        if rerank and count:
            part = self.features if rows is None else self.features[rows]
            gallery = torch.from_numpy(np.array(part))
            found = search(query, gallery, topk, True, progress=progress)
        else:
            found = self._nearest(query, rows, count, min(topk, count), backend, progress)
        if rows is None:
            return found
        return found._replace(indices=torch.from_numpy(rows)[found.indices])

    def _nearest(
        self,
        query: torch.Tensor,
        rows: NDArray[np.int64] | None,
        count: int,
        topk: int,
        backend: Backend,
        progress: Callable[[str, int, int], None] | None,
    ) -> Found:
        """Block by block; the best so far come first, so that a stable sort keeps ties in order."""
        near = _faiss_nearest if _use_faiss(backend) else _torch_nearest
        best = torch.empty(len(query), 0)
        found = torch.empty(len(query), 0, dtype=torch.int64)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            part = slice(start, stop) if rows is None else rows[start:stop]
            similarities, indices = near(query, self.features[part], min(topk, stop - start))
            best = torch.cat([best, similarities], 1)
            found = torch.cat([found, indices + start], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, found = best[:, :topk], found.gather(1, order)[:, :topk]
            if progress:
                progress("search", stop, count)
        return Found(found, best)


_NOTHING = Found(torch.empty(0, dtype=torch.int64), torch.empty(0))


def _use_faiss(backend: Backend) -> bool:
    there = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not there:
        raise ConfigError(
            "backend: faiss is not installed (pip install faiss-cpu); torch needs nothing and "
            "finds the same"
        )
    return there and backend != "torch"


def _torch_nearest(
    query: torch.Tensor, gallery: NDArray[np.float32], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    near = knn(torch.from_numpy(np.array(gallery)), k, queries=query)
    return near.similarities, near.indices


def _faiss_nearest(
    query: torch.Tensor, gallery: NDArray[np.float32], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By faiss's flat inner product, straight from the memory-mapped rows."""
    import faiss

    similarities, indices = faiss.knn(
        np.ascontiguousarray(query.numpy()),
        np.ascontiguousarray(gallery),
        k,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    # Among equals, the lower row first.
    order = np.lexsort((indices, -similarities), axis=1)
    return (
        torch.from_numpy(np.take_along_axis(similarities, order, 1)),
        torch.from_numpy(np.take_along_axis(indices, order, 1).astype(np.int64)),
    )


# ---- on disk ------------------------------------------------------------------------------------


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    if not file.is_file():
        what = "it has no index.json" if folder.is_dir() else "there is no such folder"
        raise DataError(f"index: {show(folder)} is not an index, {what}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(folder, f"index.json, {error}") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        got = about.get("format") if isinstance(about, dict) else about
        raise DataError(
            f"index: {show(folder)} must be of format {_FORMAT} (got {got!r}); make it anew"
        )
    return about


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(f"index: {show(folder)} is damaged ({why}); make it anew")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with its holder, and leave no folder that is no index."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_writer(folder / ".lock"))
        except TimeoutError as error:
            raise ConfigError(
                f"index: another process is changing {show(folder)}; try again when it is done"
            ) from error
        try:
            yield
        finally:
            _tidy(folder)
            if made and not (folder / "index.json").exists():
                (folder / ".lock").unlink()
                folder.rmdir()


def _tidy(folder: Path) -> None:
    """Remove the files of other generations than the present one."""
    about = _read_about(folder) if (folder / "index.json").is_file() else {}
    present = f"-{about.get('generation')}."
    for pattern in ("features-*.npy", "images-*.jsonl", "*.partial"):
        for file in folder.glob(pattern):
            if present not in file.name:
                file.unlink(missing_ok=True)


def _replace(
    old: Index, keep: NDArray[np.int64], new: Iterable[tuple[list[Record], torch.Tensor]]
) -> int:
    """Write the next generation: rows of the old one, then new ones. Returns their number."""
    generation = old.generation + 1
    rows = NpyRows(old.folder / f"features-{generation}.npy", old.features.shape[1])
    lines: list[str] = []

    def note(records: Iterable[Record]) -> None:
        lines.extend(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)

    # What an exception leaves behind goes with the lock.
    for start in range(0, len(keep), _BLOCK):
        rows.append(old.features[keep[start : start + _BLOCK]])
    note(old.records[row] for row in keep)
    for records, features in new:
        rows.append(features)
        note(records)
    if not rows.rows:
        raise ConfigError(f"index: {show(old.folder)} would be empty; remove the folder instead")
    rows.close()
    write_atomic(old.folder / f"images-{generation}.jsonl", "".join(lines).encode())
    about = {
        "format": _FORMAT,
        "generation": generation,
        "images": rows.rows,
        "dim": rows.width,
        "model": old.model,
        "run": str(old.run),
        "which": old.which,
        "pattern": old.pattern,
        "trained_cameras": old.trained_cameras,
        "roots": list(old.roots),
    }
    write_atomic(old.folder / "index.json", (json.dumps(about, indent=1) + "\n").encode())
    return rows.rows


def create_index(
    folder: str | os.PathLike[str],
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    pattern: str | None = None,
    trained_cameras: bool = False,
    **options: Any,
) -> Update:
    """Make an index of images.

    Args:
        folder: of the index, new or empty.
        gallery: folders of images, on all levels, and files.
        model: extracts the features.
        pattern: identities and cameras in the paths, as of :func:`dhcl.data.load_data`.
        trained_cameras: the cameras are those the model was trained on, under the same names; their
            statistics are used.
        options: ``batch_size``, ``workers``, ``on_bad`` and ``progress`` of
            :meth:`dhcl.ReID.features`.

    Raises:
        ConfigError: the folder holds an index or something else, or is being written.
        DataError: as :meth:`dhcl.ReID.features`; a pattern that is none.
    """
    folder = Path(folder).expanduser()
    path_reader(pattern)
    if (folder / "index.json").exists():
        raise ConfigError(
            f"out: {show(folder)} is an index already; --add, --sync and --remove change it"
        )
    if folder.exists() and (not folder.is_dir() or any(_strangers(folder))):
        raise ConfigError(f"out: must be a new or empty folder (got {show(folder)})")
    nothing = Index(
        folder=folder,
        model=model.id,
        run=Path(os.path.abspath(model.run)),
        which="best" if model.which == "best" else "last",
        pattern=pattern,
        trained_cameras=trained_cameras,
        roots=(),
        records=(),
        features=np.empty((0, model.dim), np.float32),
        generation=0,
    )
    wanted = _listed(gallery)
    with _writing(folder):
        return _change(nothing, wanted, model, False, options)


def _strangers(folder: Path) -> Iterator[Path]:
    """What no interrupted attempt to make an index has left."""
    for file in folder.iterdir():
        if not any(map(file.match, (".lock", "features-*.npy", "images-*.jsonl", "*.partial"))):
            yield file


def add_images(
    folder: str | os.PathLike[str],
    gallery: Sequence[str | os.PathLike[str]],
    model: ReID,
    *,
    sync: bool = False,
    **options: Any,
) -> Update:
    """Add images to an index; of those in it already, only changed files are looked at again.

    Args:
        folder: of the index.
        gallery: folders of images, on all levels, and files.
        model: the one that made the index.
        sync: also remove images of the index that lie below these folders no longer.
        options: as of :func:`create_index`.

    Raises:
        ConfigError: another model. DataError: no index; as :meth:`dhcl.ReID.features`.
    """
    folder = Path(folder).expanduser()
    Index.open(folder).check_model(model)
    wanted = _listed(gallery)
    with _writing(folder):
        old = Index.open(folder)
        old.check_model(model)
        return _change(old, wanted, model, sync, options)


def remove_images(
    folder: str | os.PathLike[str], paths: Sequence[str | os.PathLike[str]]
) -> Update:
    """Remove images from an index: files, and all below folders, whether still there or not.

    Raises:
        ConfigError: a path of which the index has nothing; nothing would be left.
        DataError: no index.
    """
    folder = Path(folder).expanduser()
    Index.open(folder)
    with _writing(folder):
        old = Index.open(folder)
        places = [_absolute(path) for path in paths]
        hits = dict.fromkeys(places, 0)
        keep = []
        for row in range(len(old)):
            place = next((p for p in places if _below(str(old.path(row)), p)), None)
            if place is None:
                keep.append(row)
            else:
                hits[place] += 1
        without = [place for place, count in hits.items() if not count]
        if without:
            raise ConfigError(f"remove: {show(old.folder)} has no image {show(without[0])}")
        _replace(old, np.array(keep, np.int64), ())
        return Update(removed=len(old) - len(keep), total=len(keep))


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(Path(path).expanduser())


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@dataclass(frozen=True)
class _Wanted:
    """Files by absolute path with the folder they were found in, and the folders themselves."""

    roots: dict[str, str]
    folders: list[str]


def _listed(gallery: Sequence[str | os.PathLike[str]]) -> _Wanted:
    wanted = _Wanted({}, [])
    for each in gallery:
        place = _absolute(each)
        if os.path.isfile(place):
            wanted.roots.setdefault(place, os.path.dirname(place))
            continue
        wanted.folders.append(place)
        for file in image_files(place):
            wanted.roots.setdefault(str(file), place)
    if not wanted.roots:
        raise DataError("gallery: a folder of images or files must be given")
    return wanted


def _change(
    old: Index, wanted: _Wanted, model: ReID, sync: bool, options: dict[str, Any]
) -> Update:
    rows = {str(old.path(row)): row for row in range(len(old))}
    roots = list(old.roots)
    numbers = {root: number for number, root in enumerate(roots)}
    read = path_reader(old.pattern)
    drop: set[int] = set()
    new: list[tuple[str, Record]] = []
    for path, root in wanted.roots.items():
        about = os.stat(path)
        row = rows.get(path)
        if row is not None:
            record = old.records[row]
            if (record.size, record.mtime_ns) == (about.st_size, about.st_mtime_ns):
                continue
            drop.add(row)
            root = old.roots[record.root]
        if root not in numbers:
            numbers[root] = len(roots)
            roots.append(root)
        name = Path(path).relative_to(root).as_posix()
        record = Record(numbers[root], name, *read(name), about.st_size, about.st_mtime_ns)
        new.append((path, record))
    changed = len(drop)
    if sync:
        gone = {
            row
            for path, row in rows.items()
            if path not in wanted.roots and any(_below(path, f) for f in wanted.folders)
        }
        drop |= gone
    removed = len(drop) - changed
    unchanged = len(old) - len(drop)
    if not new and not drop:
        return Update(unchanged=unchanged, total=len(old))
    keep = np.array([row for row in range(len(old)) if row not in drop], np.int64)
    bad: list[tuple[int, str]] = []
    batches = _extracted(old, model, new, bad, options)
    total = _replace(dataclasses.replace(old, roots=tuple(roots)), keep, batches)
    # A changed file that can't be read any more counts as left out.
    left_out = {index for index, _ in bad}
    again = sum(new[index][0] in rows for index in left_out)
    return Update(
        added=len(new) - changed - (len(left_out) - again),
        changed=changed - again,
        unchanged=unchanged,
        removed=removed,
        total=total,
        bad=tuple(f"{show(new[index][0])}: {reason}" for index, reason in sorted(bad)),
    )


def _extracted(
    index: Index,
    model: ReID,
    new: list[tuple[str, Record]],
    bad: list[tuple[int, str]],
    options: dict[str, Any],
) -> Iterator[tuple[list[Record], torch.Tensor]]:
    if not new:
        return
    cameras = None
    if index.trained_cameras:
        cameras = model.camera_indices([record.camera for _, record in new])
    paths = [path for path, _ in new]
    try:
        for batch in model.batches(paths, cameras, bad=bad, **options):
            yield [new[i][1] for i in batch.indices], batch.features
    except DataError:
        # Where all new images are bad and are to be skipped, the old ones are still worth keeping.
        if not (len(index) and options.get("on_bad") == "skip" and len(bad) == len(new)):
            raise
