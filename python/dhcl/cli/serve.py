"""The command ``dhcl serve``: a page to search an index with."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dhcl.errors import ConfigError
from dhcl.words import say, show

__all__ = ["serve"]


@dataclass(frozen=True)
class ServeArguments:
    """Search an index in a browser: a page that this machine serves, by default to itself alone."""

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that the index lies in, or its address, such as milvus://host:port/collection."""
    run: Path | None = None
    """Folder that the run of the model lies in now, if it was moved."""
    host: str = "127.0.0.1"
    """Address of this machine that is listened at. At others than its own, such as 0.0.0.0, whoever
    reaches it sees the images: there is no password."""
    port: int = 8000
    """Port that is listened at; 0 takes any that is free."""
    name: tuple[str, ...] = ()
    """Names of this machine that the page may be opened under; numbers always may."""
    max_megabytes: int = 16
    """Size of an image file, in MiB, that may be sent to search with."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Processor that the network runs on: auto takes a GPU where there is one."""


def serve(given: ServeArguments) -> None:
    """Serve the page until Ctrl-C."""
    if not 0 <= given.port < 1 << 16:
        raise ConfigError(f"port: must be from 0 to 65535 (got {given.port})")
    if not 1 <= given.max_megabytes <= 256:
        raise ConfigError(f"max_megabytes: must be from 1 to 256 (got {given.max_megabytes})")
    for needed in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"`dhcl serve` needs {needed}: pip install 'dhcl[index,serve]'")
    from dhcl.inference.index import Index
    from dhcl.serve.app import make_app
    from dhcl.serve.gallery import Gallery
    from dhcl.serve.server import address, is_loopback, make_server, open_port

    index = Index.open(given.index)
    with open_port(given.host, given.port) as opened:
        gallery = Gallery(index, index.load_model(given.run, given.device))
        hosts = frozenset({given.host, *given.name})
        app = make_app(gallery, hosts=hosts, max_bytes=given.max_megabytes << 20)
        if not is_loopback(given.host):
            say(
                f"warning: whoever reaches {show(given.host)} over the network can see the images "
                "of this index and search in it; there is no password. Without --host, this "
                "machine alone can",
                sys.stderr,
            )
        say(f"{show(given.index)}: {len(index):,} images, at {address(opened)} (Ctrl-C ends it)")
        sys.stdout.flush()
        # It raises once more the signal that ended it, which a shell's background job ignores.
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[opened])
        say("ended")
