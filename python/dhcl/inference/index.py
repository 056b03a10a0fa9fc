"""An index: the features of a gallery on disk, to search in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.errors import ConfigError, as_path
from dhcl.inference.reid import ReID
from dhcl.inference.search import Backend, Found, nearest, search
from dhcl.inference.store import Record, read_stored
from dhcl.words import show

__all__ = ["Index"]

_NOTHING = Found(torch.empty(0, dtype=torch.int64), torch.empty(0))


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
        return cls(**read_stored(as_path("index", folder)))

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
            cameras: only images of these; ``"07"`` is camera 7.
            leave_out: (Q,) a camera for each query whose images are left out; -1 leaves out none.
            rerank: by k-reciprocal re-ranking, all queries with the same camera left out together.
            backend: what computes similarities: ``faiss``, ``torch``, or faiss where it is
                installed. They differ in the last places at most.
            progress: as of :func:`dhcl_ops.knn`.

        Returns:
            For each query, :class:`dhcl.inference.search.Found` of one dimension; indices are rows.

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
            camera = -1 if leave_out is None else identifier(str(leave_out[number]))
            groups.setdefault(camera, []).append(number)
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
        wanted = {identifier(str(camera)) for camera in cameras}
        known = {record.camera for record in self.records} - {-1}
        if not wanted <= known:
            there = ", ".join(show(str(each)) for each in sorted(known, key=str)[:20])
            strange = ", ".join(show(str(each)) for each in sorted(wanted - known, key=str))
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
        if not rerank or not (len(self) if rows is None else len(rows)):
            return nearest(query, self.features, rows, topk, backend=backend, progress=progress)
        part = self.features if rows is None else self.features[rows]
        gallery = torch.from_numpy(np.array(part))
        found = search(query, gallery, topk, True, progress=progress)
        if rows is None:
            return found
        return found._replace(indices=torch.from_numpy(rows)[found.indices])
