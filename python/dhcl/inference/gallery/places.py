"""From the address of an index to the module of its store."""

from __future__ import annotations

import importlib
import os
import re
from contextlib import AbstractContextManager
from typing import Any, cast

from dhcl.errors import ConfigError
from dhcl.inference.gallery.schema import About
from dhcl.inference.gallery.store import Store, Writer
from dhcl.words import did_you_mean, show

__all__ = ["Address", "creating", "is_folder", "open_store", "show_address"]

Address = str | os.PathLike[str]
"""A folder, or a URL."""

# Modules of stores by the scheme of their URLs; an address without one is a folder.
_STORES = {
    "": "dhcl.inference.gallery.lance",
    "milvus": "dhcl.inference.gallery.milvus",
    "milvus+tls": "dhcl.inference.gallery.milvus",
}


def _scheme(address: Address) -> str:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", os.fspath(address))
    return found[1].lower() if found else ""


def _module(address: Address) -> Any:
    scheme = _scheme(address)
    if scheme not in _STORES:
        known = ["a folder", *(f"{name}://" for name in _STORES if name)]
        hint = did_you_mean(scheme, filter(None, _STORES))
        raise ConfigError(f"index: must be {' or '.join(known)} (got {show(scheme)}://...){hint}")
    return importlib.import_module(_STORES[scheme])


def is_folder(address: Address) -> bool:
    """Whether an index of this address lies in a folder of this machine."""
    return not _scheme(address)


def show_address(address: Address) -> str:
    """An address for a message, without a name and password that someone put into it."""
    return show(re.sub("//.*@", "//", os.fspath(address)))


def open_store(address: Address) -> Store:
    """Open the store of an index.

    Raises:
        ConfigError: an unknown scheme, a library that is missing. DataError: no index there, one of
            another version, damaged, or out of reach.
    """
    return cast(Store, _module(address).open_store(address))


def creating(address: Address, about: About) -> AbstractContextManager[Writer]:
    """A new, empty index to write to, as the module of its store says.

    Raises:
        ConfigError: as :func:`open_store`; there is one already, or something else.
    """
    return cast("AbstractContextManager[Writer]", _module(address).creating(address, about))
