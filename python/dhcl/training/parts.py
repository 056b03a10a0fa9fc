"""Tensors that several processes have written, read without running code that the files name.

torch.distributed.checkpoint unpickles its metadata, and whatever the metadata calls no tensor, so
that a checkpoint of a stranger could run code. Here the metadata may name the classes that it
consists of and nothing else, every value must be a tensor, which torch reads with ``weights_only``,
and the files must lie beside it.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from dhcl.stored import MAX_TEXT, Damaged, open_stored
from dhcl.words import first_line

__all__ = ["load_parts", "shapes_of"]

_CLASSES = {
    (metadata.__name__, "Metadata"),
    (metadata.__name__, "MetadataIndex"),
    (metadata.__name__, "TensorStorageMetadata"),
    (metadata.__name__, "ChunkStorageMetadata"),
    (metadata.__name__, "TensorProperties"),
    (metadata.__name__, "StorageMeta"),
    (metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
}


class _Unpickler(pickle.Unpickler):
    """Makes what metadata consist of."""

    def find_class(self, module: str, name: str) -> Any:
        kind = isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _CLASSES or (module == "torch" and kind):
            return super().find_class(module, name)
        raise Damaged(f"it names {module}.{name}, and code that a file names is not run")


def _read_metadata(folder: Path) -> metadata.Metadata:
    with open_stored(folder / ".metadata", MAX_TEXT) as file:
        found = _Unpickler(file).load()
    if not isinstance(found, metadata.Metadata):
        raise Damaged("it must have torch's metadata of a checkpoint")
    for key, value in found.state_dict_metadata.items():
        if not isinstance(value, metadata.TensorStorageMetadata):
            raise Damaged(f"{key} must be a tensor")
    for part in found.storage_data.values():
        if not re.fullmatch(r"__\d+_\d+\.distcp", part.relative_path):
            raise Damaged(f"its parts must lie beside it (got {part.relative_path!r})")
    return found


class _Reader(filesystem.FileSystemReader):
    """A reader of torch's that is given the metadata."""

    def __init__(self, folder: Path, found: metadata.Metadata) -> None:
        super().__init__(folder)
        self._found = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        if self._found.storage_meta is None:
            self._found.storage_meta = metadata.StorageMeta()
        self._found.storage_meta.load_id = self.load_id
        return self._found


def shapes_of(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in a folder, by name.

    Raises:
        Damaged, Exception: as :func:`load_parts`.
    """
    stored = _read_metadata(folder).state_dict_metadata
    # Whatever is no tensor was refused.
    tensors = metadata.TensorStorageMetadata
    return {key: value.size for key, value in stored.items() if isinstance(value, tensors)}


def load_parts(state: Mapping[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fill tensors with what :func:`torch.distributed.checkpoint.save` has written to a folder.

    Args:
        state: tensors, and what has a state of tensors, by the names they were saved with.
        folder: where they are.
        alone: this process reads for itself, with no others.

    Raises:
        Damaged: the metadata would run code, or names what is no tensor or lies elsewhere; a part
            can't be read.
        Exception: whatever pickle and torch raise for what is damaged.
    """
    # Before torch looks at it, since torch would print its stack about an error in there.
    reader = _Reader(folder, _read_metadata(folder))
    with warnings.catch_warnings():
        if alone:
            # It says that there is one process, as we do.
            warnings.simplefilter("ignore", UserWarning)
        try:
            load(dict(state), storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            # It is no Exception, and says which ranks failed before it says why.
            causes = [cause for cause, _stack in error.failures.values()]
            raise Damaged(first_line(causes[0] if causes else error)) from error
