"""An index on a Milvus server (https://milvus.io): Milvus Lite's, a standalone one, or a cluster.

The server filters and proposes; what counts is computed here. A search asks for more rows than are
wanted, together with their features, computes similarities as a search of a folder does, and is
done when the last row that was proposed is too far away to belong to the best, by more than both
computations may differ; else it asks for more. So results have the bits of those of a folder.

Texts are kept with all but letters, digits and ``_.-~/`` written as ``%`` and two digits, of which
a condition can be made whatever they hold: there is nothing in them that a server could take for
the end of a text. Order and beginnings stay, so folders are ranges.

A server has no transactions and no locks. A change marks the index as being changed, refreshes that
mark while it goes on, and takes it away at its end; whoever finds an old mark first removes what
the interrupted change may have left twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.data.lists import identifier
from dhcl.errors import ConfigError, DataError
from dhcl.inference.gallery.remote import Head, Holder, Link, damaged, parse_address
from dhcl.inference.gallery.schema import (
    FEATURE_COLUMNS,
    About,
    arrow_schema,
    checked_features,
    read,
    text_of,
    written,
)
from dhcl.inference.gallery.store import EVERYTHING, Hits, Neighbours, Store, Where
from dhcl.inference.search import Backend, nearest
from dhcl.stored import Damaged
from dhcl.words import show
from dhcl_ops import knn

__all__ = ["MilvusStore", "creating", "open_store"]

# Rows that an answer may have, by Milvus's rules.
_MAX_ROWS = 16384

# Bytes of an answer or a request about; Milvus takes four times as many.
_BYTES = 1 << 24

# Numbers of rows in a condition.
_LISTED = 4096

# Rows that are asked for beyond those wanted, to begin with.
_MARGIN = 16

# Cameras that a head lists.
_MAX_CAMERAS = 10_000

# Neighbours of a list.
_MAX_LIST = 4096

_TEXTS = ("path", "id", "camera")
_NEVER = "row < 0"


def open_store(address: str) -> MilvusStore:
    """Open an index on a server.

    Raises:
        ConfigError: an address that is none, or no pymilvus.
        DataError: no answer; no index there, one that is not whole, or damaged.
    """
    link = Link(parse_address(address))
    return MilvusStore(link, _whole_head(link))


def _whole_head(link: Link) -> Head:
    """The head of an index that is there and was made to the end."""
    address = link.place.address
    head = link.read_head()
    if head is None or not link.has(link.place.name):
        raise DataError(f"index: {show(address)} is not an index, there is none of this name")
    if head.state == "making":
        raise DataError(
            f"index: {show(address)} is not whole, as making it was interrupted or still goes on; "
            "the same `dhcl index` goes on where it stopped"
        )
    return head


# ---- conditions ---------------------------------------------------------------------------------


def _coded(text: str) -> str:
    return quote(text, safe="/")


def _literal(value: int | str) -> str:
    return f'"{_coded(text_of(value))}"'


def _among(column: str, values: Iterable[str]) -> str:
    listed = ", ".join(sorted(values))
    return f"{column} in [{listed}]" if listed else _NEVER


def _condition(where: Where) -> str:
    """What a row must fulfil, but for ``where.rows``; empty for any row."""
    parts = []
    if where.cameras is not None:
        parts.append(_among("camera", map(_literal, where.cameras)))
    if where.not_camera is not None:
        parts.append(f"camera != {_literal(where.not_camera)}")
    if where.ids is not None:
        parts.append(_among("id", map(_literal, where.ids)))
    for sign, bound in ((">=", where.since), ("<=", where.until)):
        if bound is not None:
            parts.append(f"time {sign} {_number(bound)}")
    if where.paths is not None:
        roots = sorted({root for root, _ in where.paths})
        listed = {r: [f'"{_coded(written(p))}"' for n, p in where.paths if n == r] for r in roots}
        parts.append(_any(f"(root == {r} and {_among('path', listed[r])})" for r in roots))
    if where.below is not None:
        parts.append(_any(_inside(root, _coded(written(path))) for root, path in where.below))
    return " and ".join(parts)


def _number(bound: float) -> str:
    if math.isnan(bound):
        raise ValueError("where: a time must be a number")
    largest = np.finfo(np.float64).max
    return repr(float(min(max(bound, -largest), largest)))


def _any(parts: Iterable[str]) -> str:
    return f"({' or '.join(parts) or _NEVER})"


def _inside(root: int, path: str) -> str:
    if not path:
        return f"root == {root}"
    # The letter after "/" is "0".
    return f'(root == {root} and (path == "{path}" or (path >= "{path}/" and path < "{path}0")))'


def _both(*parts: str) -> str:
    return " and ".join(filter(None, parts))


# ---- the store ----------------------------------------------------------------------------------


class MilvusStore:
    """A :class:`dhcl.inference.gallery.store.Store` on a server.

    It has no versions: rows that others remove are missing from then on, which is an error where
    one is asked for by its number. Rows that others add do not show.
    """

    def __init__(self, link: Link, head: Head) -> None:
        self.link, self.head = link, head
        self.address = link.place.address
        self.about = head.about
        self.version, self.next_row = head.version, head.next_row
        self._count = link.count(link.place.name)
        self._cameras: set[int | str] | None = None
        described = link.call("describe_index", link.place.name, "feature")
        self._exact = described is not None and described.get("index_type") == "FLAT"
        self._largest = max(1, _BYTES // (4 * self.about.width))

    def __len__(self) -> int:
        return self._count

    def scan(self, columns: Sequence[str], where: Where = EVERYTHING) -> Iterator[Any]:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        condition = _condition(where)
        wide = "feature" in columns
        limit = min(_MAX_ROWS, self._largest) if wide else _MAX_ROWS
        if where.rows is not None:
            for start in range(0, len(where.rows), min(limit, _LISTED)):
                part = where.rows[start : start + min(limit, _LISTED)]
                listed = _among("row", map(str, part.tolist()))
                yield from self._batches(_both(listed, condition), columns, limit)
            return
        low, span = 0, limit
        while low < self.next_row:
            high = min(low + span, self.next_row)
            bounds = f"row >= {low} and row < {high}"
            batches = self._batches(_both(bounds, condition), columns, limit)
            count = sum(map(len, batches))
            if count == limit and high - low > limit:  # there may be more
                span = max(limit, span // 2)
                continue
            yield from batches
            low = high
            # Where few numbers are in use, or few rows are meant, further ones are looked at.
            span = span * 2 if count < limit // 4 else max(limit, span // 2)

    def _batches(self, condition: str, columns: Sequence[str], limit: int) -> list[Any]:
        """None or one, in ascending order of rows."""
        asked = dict.fromkeys(("row", *columns))
        found = self.link.query(self.link.place.name, condition, [*asked], limit)
        found.sort(key=lambda row: int(row["row"]))
        return [self._arrow(found, columns)] if found else []

    def _arrow(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
        """Rows as pymilvus gives them, as :func:`dhcl.inference.gallery.schema.arrow_batch` has."""
        import pyarrow as pa

        schema = arrow_schema(self.about.width)
        arrays, fields = [], []
        try:
            for name in columns:
                values: Any = [row[name] for row in rows]
                if name in _TEXTS:
                    values = [unquote(value, errors="strict") for value in values]
                if name == "feature":
                    flat = np.asarray(values, np.float32).reshape(-1)
                    array = pa.FixedSizeListArray.from_arrays(flat, self.about.width)
                else:
                    array = pa.array(values, schema.field(name).type)
                arrays.append(array)
                fields.append(schema.field(name))
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            why = f"its rows have no column {name} of the kind it should have"
            raise damaged(self.address, why) from error
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        import pyarrow as pa

        numbers = np.unique(rows)
        parts = list(self.scan([*dict.fromkeys(("row", *columns))], Where(rows=numbers)))
        schema = pa.schema([arrow_schema(self.about.width).field(name) for name in columns])
        if not len(rows):
            return pa.RecordBatch.from_pylist([], schema=schema)
        table = pa.Table.from_batches(parts) if parts else None
        there = np.empty(0, np.int64) if table is None else table["row"].to_numpy()
        if not np.array_equal(there, numbers):
            gone = np.setdiff1d(numbers, there)
            raise DataError(
                f"index: {show(self.address)} has no row {gone[0]}; if it was changed since it was "
                "opened, open it anew"
            )
        chosen = table.select(list(columns)).take(np.searchsorted(numbers, rows))  # type: ignore[union-attr]
        return chosen.combine_chunks().to_batches()[0]

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
        """As of :class:`dhcl.inference.gallery.store.Store`.

        Rows are scanned where the server can't help: for more of them than an answer may have, for
        a long list of rows, and where an operator has given the collection an approximate index.
        """
        listed = 0 if where.rows is None else len(where.rows)
        if (self._exact or approximate) and listed <= _LISTED:
            hits = self._proposed(query, topk, where, approximate)
            if hits is not None:
                return hits
        blocks = (self._checked(batch) for batch in self.scan(FEATURE_COLUMNS, where))
        best = nearest(query, blocks, topk, backend=backend, progress=progress, count=len(self))
        return Hits(best.rows, best.similarities)

    def _checked(self, batch: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        try:
            return checked_features(batch, self.about.width)
        except Damaged as error:
            raise damaged(self.address, str(error)) from error

    def _proposed(
        self, query: torch.Tensor, topk: int, where: Where, approximate: bool
    ) -> Hits | None:
        """The nearest rows of queries (Q, d) among those that the server proposes.

        None if those of some query can't be told from others with any number of rows that an answer
        may have, or if there is no query.
        """
        listed = None if where.rows is None else _among("row", map(str, where.rows.tolist()))
        condition = _both(listed or f"row < {self.next_row}", _condition(where))
        limit, most = topk + _MARGIN, min(_MAX_ROWS, self._largest)
        best: dict[int, Hits] = {}
        waiting = [*range(len(query))]
        while waiting and limit <= most:
            unsure = []
            size = max(1, most // limit)
            for start in range(0, len(waiting), size):
                numbers = waiting[start : start + size]
                found = self._ask(query[numbers], limit, condition)
                for number, proposed in zip(numbers, found, strict=True):
                    best[number], sure = self._best(query[number], topk, proposed, limit)
                    if not (sure or approximate):
                        unsure.append(number)
            waiting = unsure
            limit = limit + 1 if limit == most else min(4 * limit, most)
        if waiting or not best:
            return None
        chosen = [best[number] for number in range(len(query))]
        if len({len(each.rows) for each in chosen}) > 1:
            return None  # an approximate index gives some queries fewer than there are
        return Hits(*(torch.stack(values) for values in zip(*chosen, strict=True)))

    def _ask(self, query: torch.Tensor, limit: int, condition: str) -> list[list[dict[str, Any]]]:
        """What the server proposes for each query: rows with their distance to it."""
        found = self.link.call(
            "search",
            self.link.place.name,
            data=query.tolist(),
            limit=limit,
            filter=condition,
            output_fields=list(FEATURE_COLUMNS),
            search_params={"metric_type": "IP"},
            consistency_level="Strong",
        )
        return [[{**hit["entity"], "ip": hit["distance"]} for hit in hits] for hits in found]

    def _best(
        self, query: torch.Tensor, topk: int, proposed: list[dict[str, Any]], limit: int
    ) -> tuple[Hits, bool]:
        """The best of what was proposed for a query (d,), and whether no other row is better."""
        if not proposed:
            return Hits(torch.empty(0, dtype=torch.int64), torch.empty(0)), True
        proposed.sort(key=lambda row: int(row["row"]))
        numbers, features = self._checked(self._arrow(proposed, FEATURE_COLUMNS))
        gallery = torch.from_numpy(np.array(features))
        near = knn(gallery, min(topk, len(proposed)), queries=query[None])
        best = Hits(torch.from_numpy(np.array(numbers))[near.indices[0]], near.similarities[0])
        # Sums of d products of unit vectors, in any order: d rounding errors, there and here.
        slack = 2 * self.about.width * 2.0**-24
        last = min(float(row["ip"]) for row in proposed)
        return best, len(proposed) < limit or last < float(best.similarities[-1]) - slack

    def recall(self) -> None:
        """As of :class:`dhcl.inference.gallery.store.Store`: its index is the operator's."""

    def cameras(self) -> set[int | str]:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        if self._cameras is None:
            if self.head.cameras is None:
                listed = {
                    text for batch in self.scan(["camera"]) for text in batch["camera"].to_pylist()
                }
            else:
                listed = {text for text in self.head.cameras if self._has_camera(text)}
            self._cameras = {identifier(read(text)) for text in listed} - {-1}
        return self._cameras

    def _has_camera(self, text: str) -> bool:
        condition = f'camera == "{_coded(text)}"'
        return bool(self.link.query(self.link.place.name, condition, ["row"], 1))

    @property
    def lists_name(self) -> str:
        """Of the collection of neighbours."""
        return f"{self.link.place.name}_lists"

    def neighbours(self) -> Neighbours | None:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        if not self.link.has(self.lists_name):
            return None
        found: list[dict[str, Any]] = []
        for low in range(0, self.next_row, _LISTED):
            bounds = f"row >= {low} and row < {low + _LISTED}"
            columns = ("row", *Neighbours._fields[1:])
            part = self.link.query(self.lists_name, bounds, columns, _LISTED)
            found += sorted(part, key=lambda row: int(row["row"]))
        if not found:
            return None
        return Neighbours(
            np.array([row["row"] for row in found], np.int64),
            np.array([list(row["lists"]) for row in found], np.int64),
            np.array([list(row["similarities"]) for row in found], np.float32),
            np.array([row["least"] for row in found], np.float32),
            np.array([row["farthest"] for row in found], np.int64),
        )

    def writing(self) -> contextlib.AbstractContextManager[MilvusWriter]:
        """As of :class:`dhcl.inference.gallery.store.Store`; another writer is kept off by a mark.

        The mark of a process that has ended counts no longer: at once on this machine, after ten
        minutes on another one.
        """
        return _writing(self.link)

    def close(self) -> None:
        """As of :class:`dhcl.inference.gallery.store.Store`."""
        self.link.close()


# ---- changes ------------------------------------------------------------------------------------


class MilvusWriter:
    """A :class:`dhcl.inference.gallery.store.Writer`, without transactions.

    What was sent remains, and sending it again puts it in the same place.
    """

    def __init__(self, link: Link, head: Head) -> None:
        self._link, self._head = link, head
        store = MilvusStore(link, head)
        self._lists = store.lists_name
        self.now: Store = store

    def insert(self, batches: Iterator[Any]) -> int:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        count = 0
        width = self._head.width
        size = max(1, min(1000, _BYTES // (4 * width)))
        for batch in batches:
            self._expect(batch)
            for start in range(0, len(batch), size):
                part = batch.slice(start, size)
                columns = {name: part[name].to_pylist() for name in part.schema.names}
                flat = part["feature"].flatten().to_numpy(zero_copy_only=False)
                columns["feature"] = list(flat.reshape(len(part), width))
                for name in _TEXTS:
                    columns[name] = [_coded(text) for text in columns[name]]
                values = zip(*columns.values(), strict=True)
                rows = [dict(zip(columns, row, strict=True)) for row in values]
                self._link.call("upsert", self._link.place.name, rows)
            count += len(batch)
        return count

    def _expect(self, batch: Any) -> None:
        """Say beforehand what will be there: its numbers and cameras; and that this goes on."""
        cameras = self._head.cameras
        if cameras is not None:
            cameras = sorted({*cameras, *batch["camera"].to_pylist()})
            if len(cameras) > _MAX_CAMERAS:
                cameras = None
        last = max(batch["row"].to_pylist(), default=-1)
        self._save(next_row=max(self._head.next_row, last + 1), cameras=cameras)

    def _save(self, **changes: Any) -> None:
        """Write the head, refreshing the mark, unless another process has taken it over."""
        present = self._link.read_head()
        holder = self._head.holder
        if holder is not None:
            if present is None or present.holder is None or present.holder.token != holder.token:
                raise DataError(
                    f"index: {show(self._link.place.address)} is being changed by another process "
                    "too, which has taken this one for ended; do it again when that is done"
                )
            changes.setdefault("holder", holder.again())
        self._head = self._head.model_copy(update=changes)
        self._link.write_head(self._head)

    def delete(self, rows: NDArray[np.int64]) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        names = [self._link.place.name]
        if self._link.has(self._lists):
            names.insert(0, self._lists)
        for start in range(0, len(rows), _LISTED):
            numbers = np.asarray(rows)[start : start + _LISTED].tolist()
            for name in names:
                self._link.call("delete", name, ids=numbers)

    def set_about(self, about: About) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        if about != self._head.about:
            self._save(**Head.fields_of(about))

    def put_neighbours(self, lists: Neighbours) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`; all of them have one width."""
        width = lists.lists.shape[1]
        if width > _MAX_LIST:
            raise ConfigError(f"index: a list may have {_MAX_LIST} neighbours (got {width})")
        if not self._link.has(self._lists):
            room = {"max_capacity": _MAX_LIST}
            self._link.create(
                self._lists,
                [
                    ("row", "INT64", {}),
                    ("lists", "ARRAY", {"element_type": _kind("INT64"), **room}),
                    ("similarities", "ARRAY", {"element_type": _kind("FLOAT"), **room}),
                    ("least", "FLOAT", {}),
                    ("farthest", "INT64", {}),
                    ("unused", "FLOAT_VECTOR", {"dim": 2}),
                ],
            )
        for start in range(0, len(lists.rows), 1000):
            part = slice(start, start + 1000)
            values = zip(*(column[part].tolist() for column in lists), strict=True)
            names = ("row", *Neighbours._fields[1:])
            rows = [{**dict(zip(names, row, strict=True)), "unused": [1.0, 0.0]} for row in values]
            self._link.call("upsert", self._lists, rows)

    def drop_neighbours(self) -> None:
        """As of :class:`dhcl.inference.gallery.store.Writer`."""
        self._link.drop(self._lists)

    def finish(self, **changes: Any) -> None:
        """Take the mark away: the change is whole."""
        self._save(version=self._head.version + 1, holder=None, **changes)

    def give_up(self) -> None:
        """Leave a mark that keeps nobody off, by which the next change looks for what is left."""
        holder = self._head.holder
        if holder is not None:
            self._save(version=self._head.version + 1, holder=holder.model_copy(update={"at": 0.0}))

    def recover(self) -> None:
        """Remove what an interrupted change has left twice, and lists that may be stale."""
        self.drop_neighbours()
        last: dict[tuple[int, str], int] = {}
        gone = []
        for batch in self.now.scan(["row", "root", "path"]):
            columns = (batch[name].to_pylist() for name in ("row", "root", "path"))
            for row, root, path in zip(*columns, strict=True):
                if (root, path) in last:
                    gone.append(last[root, path])
                last[root, path] = row
        self.delete(np.array(gone, np.int64))
        self.now = MilvusStore(self._link, self._head)


def _kind(name: str) -> Any:
    from pymilvus import DataType

    return DataType[name]


def _taken(link: Link, head: Head) -> Head:
    """The head with our mark in it.

    Raises:
        ConfigError: another process is changing the index.
    """
    address = link.place.address
    mine = Holder.me()
    present: Head | None = head
    if head.holder is None or not head.holder.is_there():
        link.write_head(head.model_copy(update={"version": head.version + 1, "holder": mine}))
        present = link.read_head()
        found = None if present is None else present.holder
        if present is not None and found is not None and found.token == mine.token:
            return present
    holder = present.holder if present is not None and present.holder else "another process"
    raise ConfigError(
        f"index: {holder} is changing {show(address)}; try again when it is done, or in ten "
        "minutes if it was ended on another machine"
    )


@contextlib.contextmanager
def _marked(link: Link, old: Head, head: Head) -> Iterator[MilvusWriter]:
    """A writer of an index that has our mark; ``old`` is the head before."""
    assert head.holder is not None
    with head.holder.living():
        writer = MilvusWriter(link, head)
        try:
            if old.holder is not None:
                writer.recover()
            yield writer
            writer.finish(state="whole")
        except BaseException:
            with contextlib.suppress(DataError):  # where the server is gone, the mark is old soon
                writer.give_up()
            raise


@contextlib.contextmanager
def _writing(link: Link) -> Iterator[MilvusWriter]:
    old = _whole_head(link)
    with _marked(link, old, _taken(link, old)) as writer:
        yield writer


@contextlib.contextmanager
def creating(address: str, about: About) -> Iterator[MilvusWriter]:
    """A new index on a server; one that was interrupted is gone on with, if it was to be the same.

    Raises:
        ConfigError: there is one already, or a collection of something else; another process is
            making it.
    """
    link = Link(parse_address(address))
    name = link.place.name
    old, there = link.read_head(), link.has(name)
    if old is None and there:
        raise ConfigError(f"out: {show(address)} is a collection of something else")
    if old is not None and old.state == "whole":
        raise ConfigError(
            f"out: {show(address)} is an index already; --add, --sync and --remove change it"
        )
    head = _taken(link, old or Head.of(about))
    if old is None or not there or _but_places(old.about) != _but_places(about):
        for each in (name, f"{name}_lists"):
            link.drop(each)
        link.create(name, _fields(about.width))
        old = Head.of(about)
        head = old.model_copy(update={"version": head.version, "holder": head.holder})
        link.write_head(head)
    with _marked(link, old, head) as writer:
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(DataError):
                if not link.count(name):
                    link.drop(name)
                    link.drop_head()
            raise


def _but_places(about: About) -> About:
    """What features and rows depend on."""
    return dataclasses.replace(about, roots=(), run="")


def _fields(width: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Of the collection of rows; texts are as long as Milvus allows."""
    text = {"max_length": 65535}
    return [
        ("row", "INT64", {}),
        ("feature", "FLOAT_VECTOR", {"dim": width}),
        ("root", "INT64", {}),
        *((name, "VARCHAR", text) for name in _TEXTS),
        ("time", "DOUBLE", {"nullable": True}),
        ("size", "INT64", {}),
        ("mtime_ns", "INT64", {}),
        ("model", "VARCHAR", text),
        ("sum", "INT64", {}),
        ("about_sum", "INT64", {}),
    ]
