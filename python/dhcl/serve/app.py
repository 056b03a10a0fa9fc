"""The page as an application of FastAPI: what it answers, in JSON, pictures and one page.

FastAPI looks the parameters' types up in this module, so they are imported when it is.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

import anyio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from dhcl.errors import DHCLError
from dhcl.serve.gallery import Choice, Gallery, Place, as_upload
from dhcl.serve.guard import Guard
from dhcl.words import csv_cell, first_line, show
from dhcl_ops import __version__

__all__ = ["MAX_UPLOAD", "make_app"]

MAX_UPLOAD = 1 << 24
"""Bytes of an image that is sent to search with, at most: 16 MiB."""

_MAX_MARKS = 10_000

# Of a mark in JSON, more than the longest name takes with each letter escaped.
_MARK_BYTES = 1 << 12

# Seconds that a client may take to send what it promised.
_PATIENCE = 60

_KNOWN = ConfigDict(extra="forbid")
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Row = Annotated[int, Field(ge=0, lt=2**63)]
_Name = Annotated[str, Field(max_length=1000)]
_T = TypeVar("_T")

# The page's files: where they lie, and what they are.
_FILES = {
    "/": ("dhcl.serve", "page/page.html", "text/html; charset=utf-8"),
    "/serve.js": ("dhcl.serve", "page/serve.js", "text/javascript; charset=utf-8"),
    "/serve.css": ("dhcl.serve", "page/serve.css", "text/css; charset=utf-8"),
    "/report.css": ("dhcl.report", "templates/page.css", "text/css; charset=utf-8"),
}


class _Filter(BaseModel):
    """Which images are meant; see :class:`dhcl.serve.gallery.Choice`."""

    model_config = _KNOWN

    camera: Annotated[list[_Row], Field(max_length=10_000)] = []
    id: _Name | None = None
    since: _Finite | None = None
    until: _Finite | None = None

    def choice(self) -> Choice:
        """The same, for the gallery."""
        return Choice(tuple(self.camera), self.id, self.since, self.until)


class _Listing(_Filter):
    """A page of the gallery."""

    offset: _Row = 0
    limit: Annotated[int, Field(ge=1, le=200)] = 24


class _Search(_Filter):
    """What to search with, where, and for how many; without a row, with the image that is sent."""

    row: _Row | None = None
    name: _Name = ""
    topk: Annotated[int, Field(ge=1, le=500)] = 20
    rerank: bool = False
    other_cameras: bool = False


class _Mark(BaseModel):
    """An image that someone called right or wrong for a query: a row, or a file by its name."""

    model_config = _KNOWN

    query: _Row | None
    name: _Name
    row: _Row
    rank: Annotated[int, Field(ge=1)]
    similarity: _Finite
    distance: _Finite | None
    mark: Literal["right", "wrong"]


class _Marks(BaseModel):
    """All that was marked."""

    model_config = _KNOWN

    marks: Annotated[list[_Mark], Field(max_length=_MAX_MARKS)]


def make_app(
    gallery: Gallery, *, hosts: frozenset[str] = frozenset(), max_bytes: int = MAX_UPLOAD
) -> Guard:
    """The page of a gallery.

    Args:
        gallery: to search in.
        hosts: names that the page may be opened under, beside ``localhost`` and numbers.
        max_bytes: of an image that is sent, at most.
    """
    answers = _Answers(gallery, max_bytes)
    # Without FastAPI's own pages, which load their scripts from elsewhere.
    app = FastAPI(title="dhcl serve", docs_url=None, redoc_url=None, openapi_url=None)
    for path, (package, name, kind) in _FILES.items():
        app.add_api_route(path, functools.partial(_file, package, name, kind))
    app.add_api_route("/about", answers.about)
    app.add_api_route("/rows", answers.rows)
    app.add_api_route("/pictures/{row}", answers.picture)
    app.add_api_route("/search", answers.search, methods=["POST"])
    app.add_api_route("/marks", answers.marks, methods=["POST"])
    app.add_exception_handler(DHCLError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    return Guard(app, hosts)


def _refused(_: Request, error: Exception) -> Response:
    """What was wrong with a request, in a line."""
    status, said = 400, str(error)
    if isinstance(error, HTTPException):
        status, said = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        said = _first_wrong(error.errors())
    return JSONResponse({"error": said}, status)


def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"{type(error).__name__}: {show(first_line(error))}"}, 500)


def _first_wrong(errors: Any) -> str:
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("query", "path"))
    return show(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}")


def _file(package: str, name: str, kind: str) -> Response:
    return Response((resources.files(package) / name).read_bytes(), media_type=kind)


class _Answers:
    """What is answered under each path."""

    def __init__(self, gallery: Gallery, max_bytes: int) -> None:
        self._gallery, self._max_bytes = gallery, max_bytes
        # A search has all threads of the machine to itself, and one picture at a time is decoded
        # for it; those of the page are small, or of the gallery's owner.
        self._searching = anyio.CapacityLimiter(1)
        self._looking = anyio.CapacityLimiter(4)

    def about(self) -> dict[str, Any]:
        """What the page shows at its head, and its choices."""
        gallery = self._gallery
        return {
            "name": show(gallery.name),
            "images": len(gallery.index),
            "model": gallery.index.model,
            "version": __version__,
            "cameras": [show(str(name)) for name in gallery.cameras],
            "identities": gallery.identities,
            "times": gallery.times,
            "max_bytes": self._max_bytes,
        }

    async def rows(self, given: Annotated[_Listing, Query()]) -> dict[str, Any]:
        """A page of the gallery."""
        return await _threaded(self._looking, self._listed, given)

    def _listed(self, given: _Listing) -> dict[str, Any]:
        rows = self._gallery.rows(given.choice())
        part = rows[given.offset : given.offset + given.limit].tolist()
        return {"total": len(rows), "rows": self._shown(part)}

    def _shown(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of images, with text for numbers that JavaScript would round."""
        return [
            {n: str(v) if n in ("id", "camera") and v is not None else v for n, v in each.items()}
            for each in self._gallery.about(rows)
        ]

    async def picture(self, row: _Row) -> Response:
        """A small picture of an image."""
        try:
            data = await _threaded(self._looking, self._gallery.picture, row)
        except DHCLError as error:
            raise HTTPException(404, str(error)) from error
        return Response(data, media_type="image/jpeg")

    async def search(self, request: Request, given: Annotated[_Search, Query()]) -> dict[str, Any]:
        """A ranked list."""
        data = await _body(request, self._max_bytes)
        return await _threaded(self._searching, self._found, data, given)

    def _found(self, data: bytes, given: _Search) -> dict[str, Any]:
        places = self._near(data, given)
        results = [
            {
                "rank": rank,
                "similarity": round(place.similarity, 6),
                "distance": None if place.distance is None else round(place.distance, 6),
                **about,
            }
            for rank, (place, about) in enumerate(
                zip(places, self._shown([place.row for place in places]), strict=True), 1
            )
        ]
        images = len(self._gallery.index)
        return {"images": images, "reranked": given.rerank, "results": results}

    def _near(self, data: bytes, given: _Search) -> list[Place]:
        how = {"rerank": given.rerank, "other_cameras": given.other_cameras}
        if given.row is not None:
            return self._gallery.near_row(given.row, given.topk, given.choice(), **how)
        pixels = as_upload(data)
        return self._gallery.near_image(pixels, given.name, given.topk, given.choice(), **how)

    async def marks(self, request: Request, format: Literal["csv", "json"]) -> Response:
        """What was marked, as a file; what is said of an image is the index's."""
        data = await _body(request, _MAX_MARKS * _MARK_BYTES)
        try:
            given = _Marks.model_validate_json(data)
        except ValidationError as error:
            raise HTTPException(400, _first_wrong(error.errors())) from error
        rows = await _threaded(self._looking, self._marked, given.marks)
        if format == "csv":
            text = _as_csv(rows)
        else:
            about = {"index": show(self._gallery.index.address), "model": self._gallery.index.model}
            text = json.dumps({**about, "marks": rows}, indent=1) + "\n"
        kind = {"csv": "text/csv", "json": "application/json"}[format]
        return Response(
            text.encode(),
            media_type=f"{kind}; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="marks.{format}"'},
        )

    def _marked(self, marks: Sequence[_Mark]) -> list[dict[str, Any]]:
        abouts = self._gallery.about([mark.row for mark in marks])
        queries = sorted({mark.query for mark in marks if mark.query is not None})
        paths = {each["row"]: each["path"] for each in self._gallery.about(queries)}
        return [
            {
                "query": show(mark.name) if mark.query is None else paths[mark.query],
                "path": about["path"],
                "mark": mark.mark,
                "rank": mark.rank,
                "similarity": mark.similarity,
                "distance": mark.distance,
                **{name: about[name] for name in ("id", "camera", "time")},
            }
            for mark, about in zip(marks, abouts, strict=True)
        ]


def _as_csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    names = ("query", "path", "mark", "rank", "similarity", "distance", "id", "camera", "time")
    writer.writerow(names)
    for row in rows:
        writer.writerow("" if row[name] is None else csv_cell(row[name]) for name in names)
    return buffer.getvalue()


async def _threaded(
    limiter: anyio.CapacityLimiter, function: Callable[..., _T], *arguments: Any
) -> _T:
    return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)


async def _body(request: Request, limit: int) -> bytes:
    """What a request sends; no more than is allowed is ever kept.

    Raises:
        HTTPException: it is longer, or does not come in time.
    """
    too_long = HTTPException(413, f"image: must have at most {limit:,} bytes")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_long
    data = bytearray()
    try:
        with anyio.fail_after(_PATIENCE):
            async for part in request.stream():
                if len(data) + len(part) > limit:
                    raise too_long
                data += part
    except TimeoutError as error:
        raise HTTPException(408, f"the request took longer than {_PATIENCE} s to come") from error
    return bytes(data)
