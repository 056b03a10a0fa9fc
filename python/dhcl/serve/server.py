"""Opening a port and answering on it until someone ends it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any

from dhcl.errors import ConfigError
from dhcl.words import show

__all__ = ["address", "is_loopback", "make_server", "open_port"]


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any free one.

    Raises:
        ConfigError: an address that is none of this machine, or a port that is taken.
    """
    try:
        [family, kind, protocol, _, place] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as undo:
            opened = undo.enter_context(socket.socket(family, kind, protocol))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(place)
            opened.listen(128)
            undo.pop_all()
    except OSError as error:
        raise ConfigError(
            f"port: {port} of {show(host)} can't be opened ({error.strerror}); --port takes "
            "another one, 0 any that is free"
        ) from error
    return opened


def address(opened: socket.socket) -> str:
    """What to open in a browser on this machine."""
    host, port = opened.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "[::1]" if ":" in host else "127.0.0.1"
    elif ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}/"


def make_server(app: Any) -> Any:
    """A :class:`uvicorn.Server` of the application; ``run(sockets=[opened])`` answers until Ctrl-C.

    What is open at once and how long it may stay so is bounded.
    """
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=64,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=3,
        )
    )
