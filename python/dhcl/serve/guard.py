"""Who is answered, and what browsers are told of every answer.

A server on one's own machine is within reach of every page that one's browser opens. A page of
another site may send requests here, and by giving its own name our address (DNS rebinding) read the
answers too. So a request has to name us as we are called, and must not come from another site.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard"]

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}

_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Pictures of people are not left behind on disk; rows are others once the index is changed.
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application before another one.

    Args:
        app: what answers a request that is let through.
        hosts: names that we may be called by, beside ``localhost`` and addresses in numbers: by
            such a one no foreign name can have come here.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(name.lower().rstrip(".") for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse to."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] != "http":
            raise ValueError(f"guard: must be a request of http (got {scope['type']})")
        reason = self._against(Headers(scope=scope))
        if reason:
            await JSONResponse({"error": reason}, 403)(scope, receive, told)
        else:
            await self._app(scope, receive, told)

    def _against(self, headers: Mapping[str, str]) -> str:
        """Why a request is refused, or nothing."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return (
                "host: this server is not known by the name in the address; open it by its number, "
                "or start it with --name NAME"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "origin: requests of other sites are not answered"
        # Of browsers that say it, also for requests that have no origin, such as a picture's.
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "origin: requests of other sites are not answered; open the address by itself"
        return ""

    def _is_ours(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        else:
            name = name.partition(":")[0].rstrip(".")
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
