"""Tensors in safetensors files: one file, several with an index, or the folder of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dhcl.stored import open_stored, read_json
from dhcl.words import first_line, show

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "is_safetensors", "read_safetensors", "safetensors_bytes"]

WEIGHTS_FILE = "model.safetensors"
"""Name of the weights in the folder of a model, as on the Hugging Face hub."""
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
"""Name of the file that says which of several files each tensor is in."""

# The first words of what git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs"


def is_safetensors(path: Path) -> bool:
    """Whether :func:`read_safetensors` is for this path, going by its name, or a folder's files."""
    if path.is_dir():
        return (path / WEIGHTS_FILE).exists() or (path / INDEX_FILE).exists()
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU.

    Args:
        path: a ``.safetensors`` file; the index of several, a ``.safetensors.index.json`` file,
            which lie beside it; or a folder with ``model.safetensors`` or its index.

    Raises:
        FileNotFoundError: no such file, or one that an index names is missing.
        ValueError: a damaged file, one that was not fetched, or an index of another form.
    """
    path = Path(path)
    if path.is_dir():
        file = path / WEIGHTS_FILE
        path = file if file.exists() or not (path / INDEX_FILE).exists() else path / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {show(path)}")
    return _read_parts(path) if path.suffix == ".json" else _read_file(path)


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    data = b""
    try:
        # Read, not mapped into memory: a file that is cut short later would end the process.
        with open_stored(path) as file:
            data = file.read()
        tensors: dict[str, torch.Tensor] = load(data)
    except Exception as error:  # the library has several for damaged files
        pointer = data.startswith(_POINTER)
        why = (
            "it is a Git LFS pointer in place of the file; `git lfs pull` fetches that"
            if pointer
            else f"expected a whole .safetensors file ({type(error).__name__}: {first_line(error)})"
        )
        raise ValueError(f"weights: {show(path)} can't be read; {why}") from error
    return tensors


def _read_parts(index: Path) -> dict[str, torch.Tensor]:
    try:
        places = read_json(index)["weight_map"]
        names = sorted(set(places.values()))
        # Files beside the index alone: it may come from anywhere.
        beside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights: {show(index)} must be JSON with a weight_map of tensor names to files "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not names or not beside:
        raise ValueError(
            f"weights: the weight_map of {show(index)} must name files beside it (got {names[:3]})"
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"weights: {len(missing)} of the {len(names)} files that {show(index)} names are not "
            f"there, {missing[0]} for one"
        )
    tensors = {}
    for name in names:
        tensors.update(_read_file(index.parent / name))
    if absent := sorted(set(places) - set(tensors)):
        raise ValueError(
            f"weights: {len(absent)} tensors that {show(index)} names are in none of its files, "
            f"{absent[0]} for one"
        )
    return tensors


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A ``.safetensors`` file of tensors, any device and strides."""
    from safetensors.torch import save

    # A tensor that shares its memory with another one is refused by the library.
    own = {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}
    content: bytes = save(own, {"format": "pt"})
    return content
