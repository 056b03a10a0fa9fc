"""An index: the features of a gallery in a store, to search in."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.errors import ConfigError, as_path
from dhcl.inference.changes import Update, add, remove
from dhcl.inference.gallery.head import damaged
from dhcl.inference.gallery.places import Address, is_folder, open_store
from dhcl.inference.gallery.schema import (
    ABOUT_COLUMNS,
    FEATURE_COLUMNS,
    Record,
    checked_features,
    checked_records,
)
from dhcl.inference.gallery.store import EVERYTHING, Store, Where
from dhcl.inference.images import Images
from dhcl.inference.neighbours import Lists, reranked
from dhcl.inference.reid import ReID
from dhcl.inference.search import Backend, Found, search
from dhcl.stored import Damaged
from dhcl.words import show

__all__ = ["Index", "Records"]

_NOTHING = Found(torch.empty(0, dtype=torch.int64), torch.empty(0))

# Records that are read together when one is asked for.
_PAGE = 1 << 10


class Records(Sequence[Record]):
    """The images of an index in the order of its rows, read from the store when they are asked for.

    As many as are read together are kept, those around the last few that were asked for.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._page = functools.lru_cache(8)(self._read_page)

    def __len__(self) -> int:
        return len(self._index)

    def _read_page(self, page: int) -> list[Record]:
        numbers = self._index.numbers[page * _PAGE : (page + 1) * _PAGE]
        return self._index.records_of(numbers)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return self._index.records_of(self._index.numbers[row])
        place = range(len(self))[row]
        return self._page(place // _PAGE)[place % _PAGE]

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self._index.images())


class Index:
    """An index as it was when it was opened, where its store has versions, as a folder has.

    Rows are images, from 0 to ``len(index) - 1`` in the order of their coming. A store's own number
    of a row is kept when others are removed; ``numbers[row]`` is that.

    Attributes:
        store: where the rows are kept.
        address: of the store, a folder or a URL.
        model: fingerprint of the model (:attr:`dhcl.ReID.id`).
        run, which: that model's run and checkpoint.
        pattern: what identities, cameras and times are read with, or None.
        trained_cameras: whether cameras are those of the training, with their statistics.
        roots: folders the images were found in.
        records: N images.
        generation: number of changes so far.
    """

    def __init__(self, store: Store) -> None:
        about = store.about
        self.store, self.address, self.generation = store, store.address, store.version
        self.model, self.run = about.model, Path(about.run)
        self.which: Literal["last", "best"] = about.which
        self.pattern, self.trained_cameras = about.pattern, about.trained_cameras
        self.roots, self.width = about.roots, about.width
        self.records = Records(self)

    @classmethod
    def open(cls, store: Address) -> Index:
        """Open an index.

        Args:
            store: its folder, or the URL of another store.

        Raises:
            ConfigError: a store of an unknown kind, or whose library is missing.
            DataError: no index there, one of another version, damaged, or out of reach.
        """
        address = store if isinstance(store, str) and not is_folder(store) else None
        return cls(open_store(as_path("index", store) if address is None else address))

    def __len__(self) -> int:
        return len(self.store)

    @property
    def folder(self) -> Path:
        """Where it lies, if it lies in a folder."""
        return Path(self.address)

    @functools.cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(N,) the store's numbers of the rows, ascending."""
        parts = [batch["row"].to_numpy(zero_copy_only=False) for batch in self.store.scan(["row"])]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, d) float32, all of them, read and checked; :meth:`batches` has them in parts."""
        parts = [features for _, features in self.batches()]
        return np.concatenate(parts) if parts else np.empty((0, self.width), np.float32)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.path_of(self.records[row])

    def path_of(self, record: Record) -> Path:
        """The file of an image."""
        return Path(self.roots[record.root], record.path)

    def images(self, where: Where = EVERYTHING) -> Iterator[tuple[int, Record]]:
        """Numbers and images that fulfil a condition, in the order of rows.

        Raises:
            DataError: one is not as it was written.
        """
        for batch in self.store.scan(ABOUT_COLUMNS, where):
            yield from zip(batch["row"].to_pylist(), self._records(batch), strict=True)

    def batches(
        self, where: Where = EVERYTHING
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Numbers (n,) and features (n, d) float32 that fulfil a condition, part by part.

        Raises:
            DataError: one is not as it was written.
        """
        for batch in self.store.scan(FEATURE_COLUMNS, where):
            try:
                yield checked_features(batch, self.width)
            except Damaged as error:
                raise damaged(self.address, str(error)) from error

    def records_of(self, numbers: NDArray[np.int64]) -> list[Record]:
        """The images of numbers, in their order.

        Raises:
            DataError: a number that is not there; one is not as it was written.
        """
        return self._records(self.store.take(numbers, ABOUT_COLUMNS)) if len(numbers) else []

    def features_of(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features (n, d) float32 of numbers, in their order.

        Raises:
            DataError: a number that is not there; one is not as it was written.
        """
        try:
            batch = self.store.take(numbers, FEATURE_COLUMNS)
            return checked_features(batch, self.width)[1]
        except Damaged as error:
            raise damaged(self.address, str(error)) from error

    def _records(self, batch: Any) -> list[Record]:
        try:
            return checked_records(batch, self.model, len(self.roots))
        except Damaged as error:
            raise damaged(self.address, str(error)) from error

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
                f"index: {show(self.address)} was made by model {self.model[:12]} (of "
                f"{show(self.run)}, {self.which}), and {show(model.run)}, {model.which}, now is "
                f"{model.id[:12]}; features of two models can't be compared. Make the index anew, "
                "or name the run it was made with"
            )

    def add(
        self,
        images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        sync: bool = False,
        model: ReID | None = None,
        **options: Any,
    ) -> Update:
        """Add images to the store; :meth:`open` it anew to see them, this one stays as it was.

        Args:
            images: folders of images, on all levels, and files; of those in it already, only
                changed files are looked at again.
            sync: also remove images that lie below these folders no longer.
            model: the one that made the index; without it, that is loaded once.
            options: ``batch_size``, ``workers``, ``on_bad`` and ``progress`` of
                :meth:`dhcl.ReID.features`.

        Returns:
            What was done, and what was left out.

        Raises:
            ConfigError: another model; another process is changing the index.
            DataError: as :meth:`dhcl.ReID.features`.
        """
        used = self._own_model if model is None else model
        return add(type(self), self.address, _several(images), used, sync=sync, **options)

    def remove(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Update:
        """Remove files, and all below folders, from the store; this one stays as it was.

        Args:
            paths: whether still there or not.

        Returns:
            What was done.

        Raises:
            ConfigError: a path of which the index has nothing; nothing would be left; another
                process is changing the index.
        """
        return remove(type(self), self.address, _several(paths))

    def where(
        self,
        *,
        cameras: Iterable[int | str] | None = None,
        ids: Iterable[int | str] | None = None,
        since: float | None = None,
        until: float | None = None,
        below: Iterable[str | os.PathLike[str]] | None = None,
    ) -> Where:
        """A condition on the images that may be found.

        Args:
            cameras, ids: one of these; ``"07"`` is 7.
            since, until: seconds, both included, for images with a time.
            below: in one of these folders, or one of these files.

        Raises:
            ConfigError: a camera or folder of which the index has nothing; a time that is none.
        """
        for name, value in (("since", since), ("until", until)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name}: must be a number of seconds (got {value})")
        return Where(
            cameras=self._known_cameras(cameras),
            ids=None if ids is None else frozenset(identifier(str(each)) for each in ids),
            since=since,
            until=until,
            below=None if below is None else tuple(self._below(below)),
        )

    def _below(self, folders: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[int, str]]:
        for folder in folders:
            place = os.path.abspath(as_path("below", folder))
            found = self.places(place)
            if not found:
                roots = ", ".join(show(root) for root in self.roots[:5])
                raise ConfigError(
                    f"below: {show(self.address)} has nothing below {show(place)}, its images are "
                    f"below {roots}"
                )
            yield from found

    def places(self, path: str) -> list[tuple[int, str]]:
        """Where in which roots this absolute path is, or which roots lie below it."""
        found = []
        for number, root in enumerate(self.roots):
            home = root.rstrip(os.sep) + os.sep
            if path.startswith(home):
                found.append((number, path[len(home) :]))
            elif (path.rstrip(os.sep) + os.sep) == home[: len(path.rstrip(os.sep)) + 1]:
                found.append((number, ""))
        return found

    def search(
        self,
        query: torch.Tensor | NDArray[np.float32] | Images,
        topk: int = 20,
        *,
        where: Where = EVERYTHING,
        cameras: Iterable[int | str] | None = None,
        leave_out: Sequence[int | str] | None = None,
        rerank: bool = False,
        approximate: bool = False,
        backend: Backend = "auto",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Found]:
        """Rank the images for each query: best first, ties by row, and exactly, unless told not to.

        Without re-ranking, memory does not grow with the index.

        Args:
            query: (Q, d) float32, rows of length 1, of the model that made the index; or images, as
                :meth:`dhcl.ReID.features` takes them, for which that model is loaded once.
            topk: images for each query; fewer where there are fewer.
            where: only images that fulfil it, see :meth:`where`.
            cameras: only images of these; ``"07"`` is camera 7.
            leave_out: (Q,) a camera for each query whose images are left out; -1 leaves out none.
            rerank: by k-reciprocal re-ranking, all queries with the same camera left out together.
            approximate: let the store's index for it propose images, so that not all of them are
                read. Some of the nearest may be missing, how many ``store.recall()`` says;
                similarities are those of exact search. In a folder, `dhcl index --ann` builds it.
            backend: what computes similarities: ``faiss``, ``torch``, or faiss where it is
                installed. They differ in the last places at most.
            progress: as of :func:`dhcl_ops.knn`.

        Returns:
            For each query, :class:`dhcl.inference.search.Found` of one dimension; indices are rows.

        Raises:
            ConfigError: queries of another width, topk below 1, an unknown camera, no faiss;
                ``approximate`` with re-ranking, or without an index for it.
        """
        found = self.find(
            query,
            topk,
            where=where,
            cameras=cameras,
            leave_out=leave_out,
            rerank=rerank,
            approximate=approximate,
            backend=backend,
            progress=progress,
        )
        rows = torch.from_numpy(self.numbers)
        return [one._replace(indices=torch.searchsorted(rows, one.indices)) for one in found]

    def find(
        self,
        query: torch.Tensor | NDArray[np.float32] | Images,
        topk: int = 20,
        *,
        where: Where = EVERYTHING,
        cameras: Iterable[int | str] | None = None,
        leave_out: Sequence[int | str] | None = None,
        rerank: bool = False,
        approximate: bool = False,
        backend: Backend = "auto",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Found]:
        """As :meth:`search`, but indices are the store's numbers, for :meth:`records_of`."""
        query = self._features_of_query(query)
        if query.dim() != 2 or query.shape[1] != self.width:
            raise ConfigError(
                f"query: features must be (Q, {self.width}), as the index has them "
                f"(got {tuple(query.shape)})"
            )
        if topk < 1:
            raise ConfigError(f"topk: must be at least 1 (got {topk})")
        if rerank and approximate:
            raise ConfigError("approximate: re-ranking compares all images; choose one of them")
        if cameras is not None:
            where = _both(where, self._known_cameras(cameras))
        groups: dict[int | str, list[int]] = {}
        for number in range(len(query)):
            camera = -1 if leave_out is None else identifier(str(leave_out[number]))
            groups.setdefault(camera, []).append(number)
        results: list[Found] = [_NOTHING] * len(query)
        for camera, numbers in groups.items():
            rows = where if camera == -1 else _without(where, camera)
            some = query[numbers]
            if rerank:
                found = self._reranked(some, topk, rows, progress)
            else:
                nearest = self.store.nearest(
                    some, topk, rows, approximate=approximate, backend=backend, progress=progress
                )
                found = Found(*nearest)
            for place, number in enumerate(numbers):
                results[number] = Found(*(None if x is None else x[place] for x in found))  # type: ignore[arg-type]
        return results

    def _features_of_query(
        self, query: torch.Tensor | NDArray[np.float32] | Images
    ) -> torch.Tensor:
        if isinstance(query, np.ndarray) and query.dtype.kind == "f":
            return torch.from_numpy(np.ascontiguousarray(query, np.float32))
        if isinstance(query, torch.Tensor) and query.is_floating_point():
            return query
        return cast(torch.Tensor, self._own_model.features(query))

    @functools.cached_property
    def _own_model(self) -> ReID:
        return self.load_model()

    def _known_cameras(self, cameras: Iterable[int | str] | None) -> frozenset[int | str] | None:
        if cameras is None:
            return None
        wanted = frozenset(identifier(str(camera)) for camera in cameras)
        known = self.store.cameras()
        if not wanted <= known:
            there = ", ".join(show(str(each)) for each in sorted(known, key=str)[:20])
            strange = ", ".join(show(str(each)) for each in sorted(wanted - known, key=str))
            rule = f"known are {there}" if known else "none is known; --pattern says where they are"
            raise ConfigError(f"camera: there is no {strange} in {show(self.address)}, {rule}")
        return wanted

    def _reranked(
        self,
        query: torch.Tensor,
        topk: int,
        where: Where,
        progress: Callable[[str, int, int], None] | None,
    ) -> Found:
        if where == EVERYTHING and where.rows is None and self.lists is not None:
            return self._with_lists(query, topk, self.lists, progress)
        parts = list(self.batches(where))
        numbers = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
        rows = [part[1] for part in parts] or [np.empty((0, self.width), np.float32)]
        gallery = torch.from_numpy(np.concatenate(rows))
        found = search(query, gallery, topk, True, progress=progress)
        return found._replace(indices=torch.from_numpy(numbers)[found.indices])

    @functools.cached_property
    def lists(self) -> Lists | None:
        """The nearest rows of each row, if they were found after the last change."""
        return Lists.of(self)

    def _with_lists(
        self,
        query: torch.Tensor,
        topk: int,
        lists: Lists,
        progress: Callable[[str, int, int], None] | None,
    ) -> Found:
        found = reranked(self, lists, query, topk, progress=progress)
        return found._replace(indices=torch.from_numpy(self.numbers)[found.indices])


def _several(
    given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> Sequence[str | os.PathLike[str]]:
    """One path is a list of one, and no list of letters."""
    return [given] if isinstance(given, str | os.PathLike) else given


def _both(where: Where, cameras: frozenset[int | str] | None) -> Where:
    """That, and one of these cameras."""
    if cameras is not None and where.cameras is not None:
        cameras &= where.cameras
    return dataclasses.replace(where, cameras=cameras)


def _without(where: Where, camera: int | str) -> Where:
    """That, and another camera than this."""
    if where.not_camera is not None:
        raise ConfigError("where: leaves out a camera already, beside leave_out")
    return dataclasses.replace(where, not_camera=camera)
