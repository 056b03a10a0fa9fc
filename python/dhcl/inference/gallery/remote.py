"""A Milvus server: its address, calls that end, and what it keeps of an index beside the rows.

Of an index ``NAME`` there are the collections ``NAME`` (rows), ``NAME_head`` (what the index says
of itself, in parts of a JSON text) and, once they were made, ``NAME_lists`` (neighbours).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, StrictBool, ValidationError

from dhcl.errors import ConfigError, DataError
from dhcl.inference.gallery.places import show_address
from dhcl.inference.gallery.schema import About
from dhcl.stored import checksum
from dhcl.words import first_line, show

__all__ = ["TOKEN", "Head", "Holder", "Link", "Place", "damaged", "parse_address"]

TOKEN = "MILVUS_TOKEN"
"""Variable of the environment with a key, or ``user:password``."""

# Of Milvus's errors.
_NOT_LOADED = "101"

# Seconds for which a call is tried again where a server does not answer, as while it is started
# anew; for opening, where the address may be wrong, fewer.
_PATIENCE = 30.0
_OPENING = 10.0
_PAUSE = 0.5

# Seconds for which a writer that says nothing is believed to be there: it does with each batch.
_LEASE = 600.0

# Letters of a part of the head's text; Milvus takes 65,535 bytes.
_PART = 60_000

# Tokens of writers of this process.
_living: set[str] = set()

_KNOWN = ConfigDict(extra="forbid")
# Not `str`, of which pydantic takes no names of files that are not UTF-8.
_Text = InstanceOf[str]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


@dataclass(frozen=True)
class Place:
    """Where an index is: a server, its database, and the name of a collection.

    Attributes:
        address: as people give it.
        uri: for pymilvus.
        database: empty for the default one.
        name: of the collection.
    """

    address: str
    uri: str
    database: str
    name: str


def parse_address(address: str) -> Place:
    """The parts of ``milvus://host:port/collection`` or ``milvus://host:port/database/collection``.

    With ``milvus+tls://`` the connection is encrypted.

    Raises:
        ConfigError: something else, or an address with a password, which is not repeated.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or 19530
    except ValueError:
        host, port = None, 0
    if host is not None and "@" in parts.netloc:
        raise ConfigError(
            f"index: credentials belong into the variable {TOKEN} of the environment, not into the "
            f"address of {show(host)}"
        )
    names = parts.path.strip("/").split("/") if host else []
    plain = all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name) for name in names)
    if not 1 <= len(names) <= 2 or not plain or parts.query or parts.fragment:
        raise ConfigError(
            "index: must be milvus://host:port/collection, or with a database before the "
            f"collection, of letters, digits and _ (got {show_address(address)})"
        )
    scheme = "https" if parts.scheme.lower() == "milvus+tls" else "http"
    shown = f"[{host}]" if ":" in str(host) else host
    database = names[0] if len(names) == 2 else ""
    return Place(address, f"{scheme}://{shown}:{port}", database, names[-1])


class Holder(BaseModel):
    """Who is changing an index, since other machines can't be asked for a lock."""

    model_config = _KNOWN

    token: _Text
    pid: _Count
    host: _Text
    at: float

    @classmethod
    def me(cls) -> Holder:
        """This process, now."""
        return cls(
            token=secrets.token_hex(8), pid=os.getpid(), host=socket.gethostname(), at=time.time()
        )

    def again(self) -> Holder:
        """The same, now."""
        return self.model_copy(update={"at": time.time()})

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """While it goes on, in this process."""
        _living.add(self.token)
        try:
            yield
        finally:
            _living.discard(self.token)

    def is_there(self) -> bool:
        """Whether it may still be at work: of a process of this machine that is known."""
        if abs(time.time() - self.at) >= _LEASE:
            return False
        if self.host != socket.gethostname():
            return True
        if self.pid == os.getpid():
            return self.token in _living
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"another process ({self.pid} on {show(self.host)})"


class Head(BaseModel):
    """What an index says of itself.

    ``version`` counts changes; ``next_row`` is above all numbers that ever were given; ``cameras``
    has all that occur and maybe some that did, or None where they are too many to list;
    ``holder`` is who changes it, or who did when it was interrupted.
    """

    model_config = _KNOWN

    format: Literal[1] = 1
    state: Literal["making", "whole"]
    version: _Count
    next_row: _Count
    model: _Text
    run: _Text
    which: Literal["last", "best"]
    pattern: _Text | None
    trained_cameras: StrictBool
    roots: list[_Text]
    width: Annotated[int, Field(strict=True, ge=1, lt=2**31)]
    cameras: list[_Text] | None = []
    holder: Holder | None = None

    @classmethod
    def of(cls, about: About) -> Head:
        """Of an index that is being made."""
        return cls(state="making", version=0, next_row=0, **cls.fields_of(about))

    @property
    def about(self) -> About:
        """The part that every kind of store has."""
        return About(
            model=self.model,
            run=self.run,
            which=self.which,
            pattern=self.pattern,
            trained_cameras=self.trained_cameras,
            roots=tuple(self.roots),
            width=self.width,
        )

    @staticmethod
    def fields_of(about: About) -> dict[str, Any]:
        """What another head has to change in it to say this of itself."""
        return {**vars(about), "roots": list(about.roots)}


class _NoAnswer(DataError):
    """There is no server, or it takes too long."""


class _NotLoaded(DataError):
    """A collection is there, but not in the server's memory."""


class Link:
    """A connection to a server, for one index.

    Raises:
        ConfigError: pymilvus is not installed. DataError: there is no answer, or a refusal.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process = os.getpid()
        self._token = os.environ.get(TOKEN, "")
        self._client: Any = None
        try:
            import pymilvus
        except ModuleNotFoundError as error:
            raise ConfigError(f"index: needs {error.name}: pip install 'dhcl[milvus]'") from error
        # What it logs of an error is in the error, but for a traceback. Importing it sets a level.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)
        self._client = self._patient(
            min(_OPENING, _PATIENCE),
            pymilvus.MilvusClient,
            place.uri,
            token=self._token,
            db_name=place.database,
        )

    def call(self, what: str, *arguments: Any, **options: Any) -> Any:
        """A call of :class:`pymilvus.MilvusClient`, which ends in time.

        Raises:
            DataError: no answer, or an error of the server. ConfigError: after a fork or closing.
        """
        if self._client is None or os.getpid() != self._process:
            raise ConfigError(
                f"index: {show(self.place.address)} must be opened anew in another process, and "
                "after it was closed"
            )
        function = getattr(self._client, what)
        try:
            return self._patient(_PATIENCE, function, *arguments, **options)
        except _NotLoaded:  # a server that was started anew, or an operator, has let go of it
            self._patient(_PATIENCE, self._client.load_collection, arguments[0])
            return self._patient(_PATIENCE, function, *arguments, **options)

    def _patient(
        self, seconds: float, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        """A call, again and again for so long as there is no answer.

        pymilvus itself gives up at once where a connection is refused. Whatever is called may be
        called twice.
        """
        end = time.monotonic() + seconds
        while True:
            left = max(0.1, end - time.monotonic())
            try:
                with self._told():
                    return function(*arguments, timeout=left, **options)
            except _NoAnswer:
                if time.monotonic() + _PAUSE >= end:
                    raise
                time.sleep(_PAUSE)

    def query(
        self, name: str, condition: str, columns: Sequence[str], limit: int
    ) -> list[dict[str, Any]]:
        """Rows that fulfil a condition, in any order; what was written before is seen."""
        found = self.call(
            "query",
            name,
            filter=condition,
            output_fields=list(columns),
            limit=limit,
            consistency_level="Strong",
        )
        return [dict(row) for row in found]

    def count(self, name: str) -> int:
        """Number of rows of a collection."""
        # Without a limit, as it counts.
        found = self.call(
            "query", name, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(found[0]["count(*)"])

    def has(self, name: str) -> bool:
        """Whether there is a collection of this name."""
        return bool(self.call("has_collection", name))

    def drop(self, name: str) -> None:
        """Remove a collection, if it is there."""
        if self.has(name):
            self.call("drop_collection", name)

    def create(self, name: str, fields: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Make a collection, whose first field is its key.

        Args:
            name: of the collection.
            fields: name, type as pymilvus calls it, and options of each; the vector is searched by
                its inner products with all others.
        """
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        [vector] = [field for field, kind, _ in fields if kind == "FLOAT_VECTOR"]
        for number, (field, kind, options) in enumerate(fields):
            schema.add_field(field, DataType[kind], is_primary=not number, **options)
        index = MilvusClient.prepare_index_params()
        index.add_index(vector, index_type="FLAT", metric_type="IP")
        self.call(
            "create_collection",
            name,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
        )

    def close(self) -> None:
        """Let go of the connection."""
        client, self._client = self._client, None
        if client is not None and os.getpid() == self._process:
            client.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What pymilvus raises, as errors for people, without the token."""
        import grpc
        from pymilvus import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError, OSError) as error:
            said = str(getattr(error, "message", None) or first_line(error)).splitlines()[0][:300]
            for secret in filter(None, (self._token, *self._token.split(":", 1)[1:])):
                said = said.replace(secret, "***")
            raise self._error(str(getattr(error, "code", "")), show(said)) from error

    def _error(self, code: str, said: str) -> DataError:
        where = f"index: {show(self.place.address)}"
        text = f"{code} {said}".lower()
        if any(word in text for word in ("unauthenticated", "auth check", "permission")):
            return DataError(f"{where} refuses; {TOKEN} says who one is ({said})")
        if any(word in text for word in ("unavailable", "timeout", "deadline", "fail connecting")):
            return _NoAnswer(f"{where} does not answer; is the server running? ({said})")
        kind = _NotLoaded if code == _NOT_LOADED else DataError
        return kind(f"{where}: the server can't do that ({said})")

    # ---- the head ----

    @property
    def _head_name(self) -> str:
        return f"{self.place.name}_head"

    def read_head(self) -> Head | None:
        """What the index says of itself; None where there is none.

        Raises:
            DataError: it is damaged.
        """
        if not self.has(self._head_name):
            return None
        for last_try in (False, True):
            rows = self.query(self._head_name, "part >= 0", ["part", "parts", "text", "sum"], 16384)
            rows.sort(key=lambda row: int(row["part"]))
            if not rows:
                return None
            rows = rows[: rows[0]["parts"]]
            text = "".join(row["text"] for row in rows)
            # Parts are written together but may be read as they come.
            if checksum(text.encode()) == rows[0]["sum"]:
                break
            if last_try:
                raise damaged(self.place.address, "its head is not as it was written")
        try:
            return Head.model_validate(json.loads(text))
        except (ValidationError, ValueError, RecursionError) as error:
            why = "its head is not one of this version"
            raise damaged(self.place.address, why) from error

    def write_head(self, head: Head) -> None:
        """Make it the index's."""
        if not self.has(self._head_name):
            fields: list[tuple[str, str, dict[str, Any]]] = [
                ("part", "INT64", {}),
                ("parts", "INT64", {}),
                ("text", "VARCHAR", {"max_length": 65535}),
                ("sum", "INT64", {}),
                ("unused", "FLOAT_VECTOR", {"dim": 2}),  # which every collection must have
            ]
            self.create(self._head_name, fields)
        text = json.dumps(head.model_dump())
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        common = {"parts": len(parts), "sum": checksum(text.encode()), "unused": [1.0, 0.0]}
        rows = [{"part": number, "text": part, **common} for number, part in enumerate(parts)]
        self.call("upsert", self._head_name, rows)

    def drop_head(self) -> None:
        """Remove it."""
        self.drop(self._head_name)


def damaged(address: str, why: str) -> DataError:
    """The error of an index that is not as it was written."""
    return DataError(
        f"index: {show(address)} is damaged ({why}); make it anew: drop its collections, then "
        "`dhcl index`"
    )
