"""An index in a folder, its rows in a table of Lance (https://lance.org) there.

``rows.lance`` holds the rows and ``neighbours.lance`` their lists, if they were made. Each change
is a new version of a table, of which only new rows and marks of removed ones are written;
``index.json`` says which versions count, and is replaced last. What it does not name was left by a
change that was interrupted, and the next change undoes it. Lance's own ways with several writers
are not relied on: our lock is held instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.errors import ConfigError, DataError, as_path
from dhcl.files import Taken, sync_files, writing_folder
from dhcl.inference.gallery.approximate import build, check_files, propose, sums_of_files
from dhcl.inference.gallery.head import HEAD, Approximate, Head, damaged, read_head
from dhcl.inference.gallery.schema import (
    FEATURE_COLUMNS,
    About,
    arrow_schema,
    checked_features,
    read,
)
from dhcl.inference.gallery.store import (
    BLOCK,
    EVERYTHING,
    Hits,
    Neighbours,
    Recall,
    Store,
    Where,
)
from dhcl.inference.gallery.tables import (
    FILE_BYTES,
    LISTS,
    READ_BYTES,
    ROWS,
    by_bytes,
    check_described,
    check_plain,
    compact_lists,
    compact_rows,
    describing_sums,
    expression,
    library,
    place_of,
    rolled_back,
    told,
)
from dhcl.inference.search import Backend, nearest
from dhcl.stored import Damaged
from dhcl.words import show

__all__ = [
    "LanceStore",
    "build_approximate",
    "compact",
    "creating",
    "open_store",
    "replacing_old",
]

# How long searches that go on may read what a change has replaced.
_KEEP = timedelta(hours=1)

# What an interrupted attempt to make an index may have left, of this format and the one before.
_TABLES = (ROWS, LISTS)
_OLD = ("features-*.npy", "images-*.jsonl", "*.partial")
_LEFT = (*_TABLES, *_OLD)


# ---- the store ----------------------------------------------------------------------------------


class LanceStore:
    """A :class:`dhcl.inference.gallery.store.Store` in a folder, as it was when it was opened.

    For an hour after it was replaced at least; then what is read of it is gone, which is an error.
    """

    def __init__(self, folder: Path, head: Head) -> None:
        self.folder, self.head = folder, head
        self.address = str(folder)
        self.about = head.about
        self.version, self.next_row = head.generation, head.next_row
        held = contextlib.ExitStack()
        self._place = held.enter_context(place_of(folder))
        weakref.finalize(self, held.close)
        self._process = os.getpid()
        self._whole = False  # whether all features were found to be as they were written
        self._checked_index = False  # and those of the index for approximate search
        self._numbers: NDArray[np.int64] | None = None
        self._rows: Any = None
        self._rows = self._table(ROWS, head.version)
        if len(self) != head.images:
            raise Damaged(f"{len(self)} images, {HEAD} has {head.images}")

    def _table(self, name: str, version: int) -> Any:
        return library().dataset(f"{self._place}/{name}", version=version)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What goes wrong with a table, as errors for people."""
        if self._rows is None or os.getpid() != self._process:
            raise ConfigError(
                f"index: {show(self.folder)} must be opened anew in another process, and after "
                "it was closed"
            )
        try:
            with told(self.folder):
                yield
        except DataError as error:
            if read_head(self.folder).generation != self.version:
                raise DataError(
                    f"index: {show(self.folder)} was changed since it was opened; open it anew"
                ) from error
            raise

    def __len__(self) -> int:
        return int(self._rows.count_rows())

    def scan(self, columns: Sequence[str], where: Where = EVERYTHING) -> Iterator[Any]:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        width = self.about.width * 4 if "feature" in columns else 64
        with self._reading():
            yield from self._rows.scanner(
                columns=list(columns),
                filter=expression(where),
                batch_size=max(1, min(BLOCK, READ_BYTES // width)),
                batch_readahead=2,
                fragment_readahead=2,
                io_buffer_size=2 * FILE_BYTES,
                scan_in_order=True,
            ).to_batches()

    def numbers(self) -> NDArray[np.int64]:
        """Numbers of all rows, ascending; they are kept, 8 bytes for each."""
        if self._numbers is None:
            parts = [b["row"].to_numpy(zero_copy_only=False) for b in self.scan(["row"])]
            numbers = np.concatenate(parts) if parts else np.empty(0, np.int64)
            if len(numbers) != len(self) or (np.diff(numbers) <= 0).any():
                raise damaged(self.folder, "its rows are not in order")
            self._numbers = numbers
        return self._numbers

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        numbers = self.numbers()
        places = np.searchsorted(numbers, rows)
        there = places < len(numbers)
        there[there] = numbers[places[there]] == rows[there]
        if not there.all():
            raise DataError(f"index: {show(self.folder)} has no row {rows[~there][0]}")
        with self._reading():
            table = self._rows.take(places.tolist(), columns=["row", *columns])
            if not np.array_equal(table["row"].to_numpy(), rows):
                raise Damaged("its rows are not in order")
            found = table.select(list(columns)).combine_chunks().to_batches()
        return found[0] if found else _none(self.about.width, columns)

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
        """As of :class:`dhcl.inference.gallery.store.Store`; what is read is checked.

        Features that a search of all rows has found to be right are not checked again.
        """
        if approximate:
            return self._approximately(query, topk, where, backend)
        everything = where == EVERYTHING and where.rows is None
        blocks = self._features(where, check=not self._whole)
        found = nearest(query, blocks, topk, backend=backend, progress=progress, count=len(self))
        if everything:
            if found.seen != len(self):
                raise damaged(self.folder, f"{found.seen} rows were read of {len(self)}")
            self._whole = True
        return Hits(found.rows, found.similarities)

    def _approximately(
        self, query: torch.Tensor, topk: int, where: Where, backend: Backend
    ) -> Hits:
        """The nearest rows (Q, k) of queries (Q, d), of what the index proposes.

        A query for which too few are proposed is searched for exactly: then there are not so many,
        or a filter leaves few, among which that is quick.
        """
        known = self._approximate()
        width = self.about.width
        with self._reading():
            if not self._checked_index:
                check_files(self.folder, known.files)
                self._checked_index = True
            found = [propose(self._rows, width, one, topk, where, backend) for one in query]
        few = [place for place, hits in enumerate(found) if len(hits.rows) < topk]
        if len(few) == len(found):
            return self.nearest(query, topk, where, backend=backend)
        if few:
            exact = self.nearest(query[few], topk, where, backend=backend)
            for number, place in enumerate(few):
                found[place] = Hits(*(values[number] for values in exact))
        return Hits(*(torch.stack(values) for values in zip(*found, strict=True)))

    def _approximate(self) -> Approximate:
        if self.head.approximate is None:
            raise ConfigError(
                f"index: {show(self.folder)} has no index for approximate search; "
                f"`dhcl index --ann --out {show(self.folder)}` builds one"
            )
        return self.head.approximate

    def recall(self) -> Recall:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        known = self._approximate()
        return Recall(known.recall, known.queries)

    def _features(
        self, where: Where, *, check: bool
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        for batch in self.scan(FEATURE_COLUMNS if check else FEATURE_COLUMNS[:2], where):
            try:
                yield checked_features(batch, self.about.width, check=check)
            except Damaged as error:
                raise damaged(self.folder, str(error)) from error

    def cameras(self) -> set[int | str]:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        texts: set[str] = set()
        for batch in self.scan(["camera"]):
            texts.update(batch["camera"].unique().to_pylist())
        return {identifier(read(text)) for text in texts} - {-1}

    def neighbours(self) -> Neighbours | None:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        if self.head.neighbours is None:
            return None
        with self._reading():
            table = self._table(LISTS, self.head.neighbours).to_table()
            found = _lists_of(table)
        return found

    def writing(self) -> contextlib.AbstractContextManager[LanceWriter]:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        return _writing(self.folder)

    def close(self) -> None:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        self._rows = None


def _none(width: int, columns: Sequence[str]) -> Any:
    import pyarrow as pa

    fields = [arrow_schema(width).field(name) for name in columns]
    return pa.RecordBatch.from_pylist([], schema=pa.schema(fields))


def _list_sums(lists: Neighbours) -> NDArray[np.int64]:
    """CRC-32 of each list with its row's number."""
    count = len(lists.rows)
    kinds = ("<i8", "<i8", "<f4", "<f4", "<i8")
    parts = [
        np.ascontiguousarray(values, kind).reshape(count, -1).view("u1")
        for kind, values in zip(kinds, lists, strict=True)
    ]
    data = np.ascontiguousarray(np.concatenate(parts, axis=1))
    return np.fromiter(map(zlib.crc32, data), np.int64, count)  # type: ignore[arg-type]


def _table_of(lists: Neighbours) -> Any:
    import pyarrow as pa

    width = lists.lists.shape[1]
    flat = pa.array(np.ascontiguousarray(lists.lists).reshape(-1))
    values = pa.array(np.ascontiguousarray(lists.similarities).reshape(-1))
    return pa.table(
        {
            "row": lists.rows,
            "lists": pa.FixedSizeListArray.from_arrays(flat, width),
            "similarities": pa.FixedSizeListArray.from_arrays(values, width),
            "least": lists.least,
            "farthest": lists.farthest,
            "sum": _list_sums(lists),
        }
    )


def _lists_of(table: Any) -> Neighbours:
    order = np.argsort(rows := table["row"].to_numpy())
    width = table.schema.field("lists").type.list_size
    columns = {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in ("lists", "similarities")
    }
    least = table["least"].to_numpy()
    found = Neighbours(
        rows[order],
        columns["lists"].reshape(-1, width)[order],
        columns["similarities"].reshape(-1, width)[order],
        least[order],
        table["farthest"].to_numpy()[order],
    )
    if not np.array_equal(_list_sums(found), table["sum"].to_numpy()[order]):
        raise Damaged("lists of neighbours are not as they were written: a checksum is another")
    return found


def open_store(address: str | os.PathLike[str]) -> LanceStore:
    """Open an index in a folder.

    Raises:
        DataError: no index there, one of another version, or damaged.
    """
    folder = as_path("index", address)
    for last_try in (False, True):
        head = read_head(folder)
        try:
            return _opened(folder, head)
        except DataError:
            # Between the two another process may have replaced it.
            if last_try or read_head(folder).generation == head.generation:
                raise
    raise AssertionError


def _opened(folder: Path, head: Head) -> LanceStore:
    try:
        check_described(folder, head)
        with told(folder):
            return LanceStore(folder, head)
    except FileNotFoundError as error:
        raise damaged(folder, f"there is no {show(str(error.filename))}") from error
    except Damaged as error:
        raise damaged(folder, str(error)) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"index: {show(folder)} can't be read ({why})") from error


# ---- changes ------------------------------------------------------------------------------------


class LanceWriter:
    """A :class:`dhcl.inference.gallery.store.Writer` of a folder whose lock is held."""

    def __init__(self, now: LanceStore) -> None:
        self.now: Store = now
        self._committed = now.head
        self.head = now.head  # as it will be, but for what commit() finds
        self._folder = now.folder
        self._home = f"{now._place}/{ROWS}"
        self._lists_home = f"{now._place}/{LISTS}"
        self._rows = rolled_back(self._home, now.head.version)
        self._lists: Any = None
        if now.head.neighbours is not None:
            self._lists = rolled_back(self._lists_home, now.head.neighbours)
        self.changed = False

    def insert(self, batches: Iterator[Any]) -> int:
        """As of :class:`dhcl.inference.gallery.store.Writer`; numbers must be above those there."""
        lance = library()
        import pyarrow as pa
        from lance.fragment import write_fragments

        parts, count, last = [], 0, self.head.next_row - 1
        schema = arrow_schema(self.head.dim)
        for pieces in by_bytes(batches, FILE_BYTES):
            table = pa.Table.from_batches(pieces, schema)
            numbers = np.concatenate(([last], table["row"].to_numpy()))
            if (np.diff(numbers) <= 0).any():
                raise ValueError(f"insert: numbers must ascend from {self.head.next_row}")
            last, count = int(numbers[-1]), count + len(table)
            with told(self._folder):
                parts += write_fragments(table, self._home, schema, mode="append")
        if not parts:
            return 0
        with told(self._folder):
            self._rows = lance.LanceDataset.commit(
                self._home,
                lance.LanceOperation.Append(parts),
                read_version=self._rows.version,
            )
        self.head = self.head.model_copy(update={"next_row": last + 1})
        self.changed = True
        return count

    def delete(self, rows: NDArray[np.int64]) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        import pyarrow.compute as pc

        if not len(rows):
            return
        gone = pc.field("row").isin(np.asarray(rows).tolist())
        with told(self._folder):
            self._rows.delete(gone)
            if self._lists is not None:
                self._lists.delete(gone)
        self.changed = True

    def set_about(self, about: About) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        if about != self.head.about:
            self.head = self.head.with_about(about)
            self.changed = True

    def put_neighbours(self, lists: Neighbours) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`; all of them have one width."""
        table = _table_of(lists)
        with told(self._folder):
            if self._lists is None:
                mode = "overwrite" if (self._folder / LISTS).exists() else "create"
                self._lists = library().write_dataset(table, self._lists_home, mode=mode)
            else:
                merge = self._lists.merge_insert("row")
                merge.when_matched_update_all().when_not_matched_insert_all().execute(table)
                self._lists = library().dataset(self._lists_home)
        self.changed = True

    def drop_neighbours(self) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        self.changed |= self._lists is not None
        self._lists = None

    def build_approximate(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Make the index for approximate search anew, of the rows of ``now``, which are all."""
        with told(self._folder):
            known = build(self._rows, self.now, progress)
        self.head = self.head.model_copy(update={"approximate": known})
        self.changed = True

    def _approximate(self) -> Approximate | None:
        """What is known of that index, with the files that it has at the table's version."""
        known, before = self.head.approximate, self._committed.approximate
        if known is None:
            return None
        files = sums_of_files(self._folder, self._rows, {} if before is None else before.files)
        return known.model_copy(update={"files": files}) if files else None

    def commit(self, compact: bool = False) -> None:
        """Make what was done the index's state, on the disk."""
        with told(self._folder):
            self._rows = compact_rows(self._home, self._rows, self.head.dim, compact)
            if self._lists is not None:
                compact_lists(self._lists, self.head.dim, compact)
            if compact and self.head.approximate is not None:
                self.build_approximate()  # rows that were written anew are in no index
            files = describing_sums(self._folder, ROWS, self._rows)
            if self._lists is not None:
                files |= describing_sums(self._folder, LISTS, self._lists)
            head = self.head.model_copy(
                update={
                    "generation": self.head.generation + 1,
                    "images": self._rows.count_rows(),
                    "version": self._rows.version,
                    "neighbours": None if self._lists is None else self._lists.version,
                    "files": files,
                    "approximate": self._approximate(),
                }
            )
        if not head.images:
            raise ConfigError(
                f"index: {show(self._folder)} would be empty; remove the folder instead"
            )
        new = [name for name, crc in files.items() if self.head.files.get(name) != crc]
        if head.approximate is not None:
            before = self._committed.approximate
            new += [*head.approximate.files.keys() - (before.files.keys() if before else ())]
        sync_files(self._folder / name for name in new)
        head.write(self._folder)
        self.head = self._committed = head

    def roll_back(self) -> None:
        """Undo what was not committed."""
        self.head = self._committed
        self._rows = rolled_back(self._home, self.head.version)
        versions = {"version": self._rows.version}
        files = describing_sums(self._folder, ROWS, self._rows)
        if self.head.neighbours is not None:
            self._lists = rolled_back(self._lists_home, self.head.neighbours)
            versions["neighbours"] = self._lists.version
            files |= describing_sums(self._folder, LISTS, self._lists)
        self.head = self.head.model_copy(update={**versions, "files": files})
        self.head.write(self._folder)

    def tidy(self, keep: timedelta = _KEEP) -> None:
        """Remove what was replaced that long ago, and what interrupted changes have left.

        Only what ``index.json`` names is safe: it must have been written before.
        """
        with told(self._folder):
            for table in filter(None, (self._rows, self._lists)):
                table.cleanup_old_versions(older_than=keep, delete_unverified=True)
        if self._lists is None:
            shutil.rmtree(self._folder / LISTS, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with writing_folder(folder, HEAD):
            yield
    except Taken as error:
        raise ConfigError(
            f"index: {show(str(error))} is changing {show(folder)}; try again when it is done"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path, compact: bool = False) -> Iterator[LanceWriter]:
    with _locked(folder):
        for name in (ROWS, LISTS):
            check_plain(folder / name)
        writer = LanceWriter(open_store(folder))
        try:
            yield writer
            if writer.changed or compact:
                writer.commit(compact)
        except BaseException:
            # A disk that is full may not take this either; then the next change does it.
            with contextlib.suppress(OSError, DataError):
                writer.roll_back()
                writer.tidy()
            raise
        if writer.changed or compact:
            writer.tidy(timedelta(0) if compact else _KEEP)


def compact(folder: Path) -> None:
    """Write the tables of an index anew, in few files, and remove all versions but the last one.

    Raises:
        ConfigError, DataError: as :func:`open_store` and :meth:`LanceStore.writing`.
    """
    open_store(folder)
    with _writing(folder, compact=True):
        pass


def build_approximate(
    folder: Path, progress: Callable[[str, int, int], None] | None = None
) -> Recall:
    """Make the index for approximate search, or make it anew.

    Returns:
        How good it is.

    Raises:
        ConfigError, DataError: as :func:`open_store` and :meth:`LanceStore.writing`.
    """
    open_store(folder)
    with _writing(folder) as writer:
        writer.build_approximate(progress)
    return open_store(folder).recall()


@contextlib.contextmanager
def creating(address: str | os.PathLike[str], about: About) -> Iterator[LanceWriter]:
    """A new index in a folder, which is there once the block ends.

    Raises:
        ConfigError: the folder holds an index or something else, or is being written.
    """
    folder = as_path("index", address)
    _check_new(folder)
    with _locked(folder):
        _check_new(folder)
        try:
            _clear(folder, _LEFT)
            writer = _begun(folder, about)
            yield writer
            writer.commit()
            writer.tidy(timedelta(0))
        finally:
            if not (folder / HEAD).exists():
                _clear(folder, _LEFT)


@contextlib.contextmanager
def replacing_old(folder: Path, about: About) -> Iterator[LanceWriter]:
    """A new index in the place of one of format 1, which is there until the block ends."""
    with _locked(folder):
        _clear(folder, _TABLES)
        try:
            writer = _begun(folder, about)
            yield writer
            writer.commit()
        except BaseException:
            _clear(folder, _TABLES)
            raise
        writer.tidy(timedelta(0))
        _clear(folder, _OLD)


def _begun(folder: Path, about: About) -> LanceWriter:
    """A writer of a table without rows."""
    with told(folder), place_of(folder) as place:
        nothing = arrow_schema(about.width).empty_table()
        table = library().write_dataset(nothing, f"{place}/{ROWS}")
    head = Head(
        generation=0, images=0, dim=about.width, next_row=0, version=table.version,
        neighbours=None, model="", run="", which="last", pattern=None,
        trained_cameras=False, roots=[], files={},
    ).with_about(about)  # fmt: skip
    return LanceWriter(LanceStore(folder, head))


def _check_new(folder: Path) -> None:
    """Raise :class:`dhcl.errors.ConfigError` unless an index can be made in this folder."""
    if (folder / HEAD).exists():
        raise ConfigError(
            f"out: {show(folder)} is an index already; --add, --sync and --remove change it"
        )
    if not folder.exists():
        return
    if not folder.is_dir() or any(
        not any(map(f.match, (".lock", *_LEFT))) for f in folder.iterdir()
    ):
        raise ConfigError(f"out: must be a new or empty folder (got {show(folder)})")


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove what was left under these names, or put there by a stranger."""
    for file in folder.iterdir():
        if not any(map(file.match, names)):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
