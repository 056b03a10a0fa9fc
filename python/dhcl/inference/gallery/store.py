"""What an index asks of the place that keeps its rows; each kind of store is a module beside this.

A store keeps the columns of :mod:`dhcl.inference.gallery.schema` and finds rows by number and by
:class:`Where`. It knows nothing of models, files or re-ranking, which the index does. Rows have
numbers which ascend in the order of coming and are never given twice, so that ties have an order,
that an interrupted insert can be repeated, and that lists of neighbours stay true. An address is a
folder, or a URL whose scheme says which module serves it (:func:`dhcl.inference.gallery.places`).

Whatever goes wrong with a store is raised as :class:`dhcl.errors.DataError` (it is damaged, or does
not answer) or :class:`dhcl.errors.ConfigError` (what was asked for is wrong), in one line that
begins with ``index:`` and the address, without credentials.

The module of a store has two functions: ``open_store(address)`` gives a :class:`Store`, and
``creating(address, about)`` is a context that gives a :class:`Writer` of a new, empty one. If its
block ends with an exception, no store is left, or one that ``creating`` goes on with the next time;
where there is one already, it raises :class:`dhcl.errors.ConfigError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.inference.gallery.schema import About
from dhcl.inference.search import Backend

if TYPE_CHECKING:
    import pyarrow

__all__ = ["BLOCK", "EVERYTHING", "Hits", "Neighbours", "Recall", "Store", "Where", "Writer"]

BLOCK = 1 << 14
"""Rows that a scan gives together, but for the last ones of a range or of a filter."""


@dataclass(frozen=True)
class Where:
    """Which rows count; a row must fulfil all that is given. Stores filter by it themselves.

    Values are plain ones and never text of a query language: a store quotes them, or hands them on
    as parameters.

    Attributes:
        cameras: one of these, None for any; of :func:`dhcl.data.lists.identifier`, as stored.
        not_camera: another one than this; None for any.
        ids: one of these identities, None for any.
        since, until: seconds, both included; a row without a time fulfils neither. None for any.
        below: (root, path) pairs: in one of these roots, below that path, or the file itself; with
            an empty path, anywhere in the root. None for any.
        paths: (root, path) pairs: one of these files. None for any.
        rows: numbers of rows, ascending. None for any.
    """

    cameras: frozenset[int | str] | None = None
    not_camera: int | str | None = None
    ids: frozenset[int | str] | None = None
    since: float | None = None
    until: float | None = None
    below: tuple[tuple[int, str], ...] | None = None
    paths: frozenset[tuple[int, str]] | None = None
    rows: NDArray[np.int64] | None = field(default=None, compare=False)


EVERYTHING = Where()


class Hits(NamedTuple):
    """The nearest rows of each query, best first, ties by number.

    ``rows`` (Q, k) int64 numbers, ``similarities`` (Q, k) float32 cosines in [-1, 1].
    """

    rows: torch.Tensor
    similarities: torch.Tensor


class Recall(NamedTuple):
    """How good approximate search was when its index was built.

    ``share`` in [0, 1] is the mean, over ``queries`` rows of the gallery, of the share of a row's
    nearest other rows that were found.
    """

    share: float
    queries: int


class Neighbours(NamedTuple):
    """What re-ranking knows of the gallery beforehand, a list for each of n rows.

    ``rows`` (n,) int64 numbers; ``lists`` (n, k) int64 numbers of its nearest rows, itself among
    them, best first, ties by number; ``similarities`` (n, k) float32 of these; ``least`` (n,)
    float32, the smallest similarity to any row, and ``farthest`` (n,) int64 the number of that row.
    Numbers in them may be of rows that were removed since.
    """

    rows: NDArray[np.int64]
    lists: NDArray[np.int64]
    similarities: NDArray[np.float32]
    least: NDArray[np.float32]
    farthest: NDArray[np.int64]


class Writer(Protocol):
    """Changes a store while it is held by :meth:`Store.writing`, or makes it, by `creating`.

    Where the store has transactions, nothing of it shows before the block of ``writing`` ends
    without an exception, and nothing remains if it ends with one, or with the process. Else what
    was done until then remains, rows that a row replaces go last, and doing the same again ends in
    the same place.

    Attributes:
        now: the store as it was when the lock was taken; a change is made from this.
    """

    now: Store

    def insert(self, batches: Iterator[pyarrow.RecordBatch]) -> int:
        """Put rows of :func:`dhcl.inference.gallery.schema.arrow_batch`; returns how many.

        Their numbers ascend from ``now.next_row``. Without transactions, where an interrupted
        change may have left rows of these numbers, new ones take their places. An exception of the
        iterator is raised as it is.
        """

    def delete(self, rows: NDArray[np.int64]) -> None:
        """Remove rows by number, and their lists; numbers that are not there are no error."""

    def set_about(self, about: About) -> None:
        """Change what the index says of itself; width and model stay as they are."""

    def put_neighbours(self, lists: Neighbours) -> None:
        """Put lists of some rows in place of what is there of these rows."""

    def drop_neighbours(self) -> None:
        """Remove the lists of all rows."""


class Store(Protocol):
    """An open store, as it was when it was opened where the store has versions.

    It may be used by several threads at once, and not across a fork.

    Attributes:
        address: as people give it, without credentials.
        about: what the index says of itself.
        version: a number that is another one after each change; also after a change by others.
        next_row: a number above those of all rows that ever were in it.
    """

    address: str
    about: About
    version: int
    next_row: int

    def __len__(self) -> int:
        """Number of rows."""

    def scan(
        self, columns: Sequence[str], where: Where = EVERYTHING
    ) -> Iterator[pyarrow.RecordBatch]:
        """Rows in ascending order of their numbers, with these columns, in batches of any size."""

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Rows by number, in the order given.

        Raises:
            DataError: a number that is not there.
        """

    def nearest(
        self,
        query: torch.Tensor,
        topk: int,
        where: Where = EVERYTHING,
        *,
        approximate: bool = False,
        backend: Backend = "auto",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Hits:
        """The nearest rows of each query: exactly, unless ``approximate`` is asked for.

        Args:
            query: (Q, d) float32, rows of length 1.
            topk: how many; fewer where there are fewer, k then being that number.
            where: only these rows.
            approximate: let the store's own index propose rows, of which then not all of the
                nearest may be found; similarities are those of exact search.
            backend: ``faiss``, ``torch`` or ``auto``, for stores that compute here.
            progress: called as ``progress("search", rows_done, rows)``, by stores that compute
                here.

        Raises:
            ConfigError: ``approximate``, and no index for it.
        """

    def recall(self) -> Recall | None:
        """Of approximate search; None where the store can't tell.

        Raises:
            ConfigError: there is no index for approximate search.
        """

    def cameras(self) -> set[int | str]:
        """All cameras but the unknown one, as identifiers."""

    def neighbours(self) -> Neighbours | None:
        """The lists that there are, by ascending numbers of their rows; None if none were made."""

    def writing(self) -> AbstractContextManager[Writer]:
        """Hold the store's lock, if it has one, and change it from its present state.

        Raises:
            ConfigError: at once, if another process is changing it.
        """

    def close(self) -> None:
        """Let go of files and connections; whatever is asked for afterwards is an error."""
