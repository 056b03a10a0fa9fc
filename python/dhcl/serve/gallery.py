"""What the page asks of an index: images by number, their pictures, and ranked lists."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data import path_reader
from dhcl.data.images import read_bytes, thumbnail
from dhcl.data.limits import check_header
from dhcl.errors import ConfigError, DataError
from dhcl.inference.gallery.places import is_folder
from dhcl.inference.gallery.schema import Record
from dhcl.inference.gallery.store import Where
from dhcl.inference.index import Index
from dhcl.inference.reid import ReID
from dhcl.words import show

__all__ = ["Choice", "Gallery", "Place", "as_upload"]

# Rows of a picture: of twice as many as are shown, for screens of fine resolution.
_HEIGHT = 300

# Times from here on, in March 1973, are dates; those below count from something else.
_DATES = 1e8
_LONG_AGO = 1e15


@dataclass(frozen=True)
class Choice:
    """Which images are meant: all, but for what is said here.

    Attributes:
        cameras: numbers into :attr:`Gallery.cameras`; none for all.
        id: an identity as :func:`dhcl.words.show` has it; None for all.
        since, until: seconds, both included; None for no bound.
    """

    cameras: tuple[int, ...] = ()
    id: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True)
class Place:
    """A place in a ranked list: a row, its cosine, and its distance if re-ranked."""

    row: int
    similarity: float
    distance: float | None


class Gallery:
    """An index with its model, as a page asks for them.

    Rows are the store's numbers, which stay with their images.

    Attributes:
        index, model: the model is the one that made the index.
        name: of the index, for its page.
        cameras: names of the index's cameras, in order.
        identities: whether the index's pattern reads any.
        times: what times are, ``dates`` since 1970 or other ``seconds``; None where none is known.
    """

    def __init__(self, index: Index, model: ReID) -> None:
        self.index, self.model = index, model
        here = is_folder(index.address)
        self.name = index.folder.resolve().name if here else index.address.rpartition("/")[2]
        names = index.store.cameras()
        self.cameras = tuple(sorted(names, key=lambda name: (isinstance(name, str), name)))
        self.identities = "(?P<id>" in (index.pattern or "")
        first = next(iter(index.images(Where(since=-_LONG_AGO))), None)
        self.times = None
        if first is not None and first[1].time is not None:
            self.times = "dates" if first[1].time >= _DATES else "seconds"
        self._numbers = functools.lru_cache(4)(self._read_numbers)

    def rows(self, choice: Choice) -> NDArray[np.int64]:
        """The rows that are meant, ascending."""
        return self._numbers(choice)

    def _read_numbers(self, choice: Choice) -> NDArray[np.int64]:
        if choice == Choice():
            return self.index.numbers
        batches = self.index.store.scan(["row"], self._where(choice))
        parts = [batch["row"].to_numpy(zero_copy_only=False) for batch in batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _where(self, choice: Choice) -> Where:
        if any(number >= len(self.cameras) for number in choice.cameras):
            raise DataError(f"camera: must be below {len(self.cameras)} (got {choice.cameras})")
        return self.index.where(
            cameras=[self.cameras[number] for number in choice.cameras] or None,
            ids=None if choice.id is None else [choice.id],
            since=choice.since,
            until=choice.until,
        )

    def about(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of images: numbers, and text that can be shown; unknown is None.

        Raises:
            DataError: a row that is not there.
        """
        images = self.index.records_of(np.array(rows, np.int64))
        return [
            {
                "row": row,
                "path": show(image.path),
                **{
                    name: None if value == -1 else value if isinstance(value, int) else show(value)
                    for name, value in (("id", image.id), ("camera", image.camera))
                },
                "time": image.time,
                "changed": image.mtime_ns / 1e9,
            }
            for row, image in zip(rows, images, strict=True)
        ]

    def _record(self, row: int) -> Record:
        return self.index.records_of(np.array([row], np.int64))[0]

    def picture(self, row: int) -> bytes:
        """A small picture of an image, as JPEG, decoded and written anew.

        Raises:
            DataError: the file is gone, no image, or lies outside of the folder it was found in.
        """
        record = self._record(row)
        root = Path(self.index.roots[record.root])
        try:
            with _below(root, record.path) as file:
                small = thumbnail(file, _HEIGHT)
        except FileNotFoundError as error:
            raise DataError(
                f"picture: there is no file {show(record.path)} in {show(root)} any more; if the "
                "gallery has moved, the index's folders have to be named anew"
            ) from error
        except DataError:
            raise
        except Exception as error:  # decoders raise nearly anything on bad data
            raise DataError(f"picture: {show(record.path)} can't be read any more") from error
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def near_row(
        self, row: int, topk: int, choice: Choice, *, rerank: bool, other_cameras: bool
    ) -> list[Place]:
        """The nearest images to one of the index, without itself.

        Raises:
            DataError: there is no such row. ConfigError: ``other_cameras``, and its is unknown.
        """
        number = np.array([row], np.int64)
        query = torch.from_numpy(np.array(self.index.features_of(number)))
        own = self._record(row).camera if other_cameras else None
        found = self._search(query, topk + 1, choice, rerank, own)
        return [place for place in found if place.row != row][:topk]

    def near_image(
        self,
        pixels: torch.Tensor,
        name: str,
        topk: int,
        choice: Choice,
        *,
        rerank: bool,
        other_cameras: bool,
    ) -> list[Place]:
        """The nearest images to another one.

        Args:
            pixels: (3, H, W) uint8, RGB.
            name: of its file, of which the index's pattern may read the camera.
            topk, choice, rerank, other_cameras: as of :meth:`near_row`.
        """
        _, camera = path_reader(self.index.pattern)(name)
        cameras = None
        if self.index.trained_cameras:
            cameras = self.model.camera_indices([camera])
        query = self.model.features([pixels.permute(1, 2, 0)], cameras)
        own = camera if other_cameras else None
        return self._search(query, topk, choice, rerank, own)

    def _search(
        self,
        query: torch.Tensor,
        topk: int,
        choice: Choice,
        rerank: bool,
        own: int | str | None,
    ) -> list[Place]:
        if own == -1:
            raise ConfigError(
                "other_cameras: the camera of the query is not known; the index's pattern is "
                f"{self.index.pattern!r}"
            )
        [found] = self.index.find(
            query,
            topk,
            where=self._where(choice),
            leave_out=None if own is None else [own],
            rerank=rerank,
        )
        return [
            Place(
                int(found.indices[place]),
                float(found.similarities[place]),
                None if found.distances is None else float(found.distances[place]),
            )
            for place in range(len(found.indices))
        ]


@contextlib.contextmanager
def _below(root: Path, name: str) -> Iterator[Path]:
    """A name of an open file below a folder, by which exactly that file is read.

    The file is judged after it has been found, by where it really lies, so that no link which is
    put in its way meanwhile counts; ``root`` may be reached by links.

    Raises:
        DataError: it lies elsewhere. OSError: it can't be found.
    """
    handle = os.open(root / name, os.O_RDONLY | os.O_PATH)  # opens no device, waits for no FIFO
    try:
        file = Path(f"/proc/self/fd/{handle}")
        if not file.readlink().is_relative_to(os.path.realpath(root)):
            raise DataError(
                f"picture: {show(name)} is a link to outside of {show(root)} and is not shown"
            )
        yield file
    finally:
        os.close(handle)


def as_upload(data: bytes) -> torch.Tensor:
    """(3, H, W) uint8, RGB, of a file that came over the network.

    Raises:
        DataError: not a JPEG, PNG or WebP, a damaged one, or one of too many pixels, which its
            header tells before room is made for them.
    """
    if not data:
        raise DataError("image: the file is empty")
    # Other formats have more code behind them than a stranger's file should reach.
    if not check_header(data):
        raise DataError("image: must be a JPEG, PNG or WebP")
    return read_bytes(data)
