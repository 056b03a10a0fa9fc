"""A trained model as a folder that can be sent: ``model.safetensors``, ``config.json``, a card.

The folder is laid out as a repository of the Hugging Face hub, and read from there too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dhcl.config import ConfigError, TrainConfig, with_changes
from dhcl.errors import CheckpointError, UnavailableWeights
from dhcl.files import write_together
from dhcl.models.tensors import INDEX_FILE, WEIGHTS_FILE, read_safetensors, safetensors_bytes
from dhcl.stored import read_json, read_text
from dhcl.words import first_line, first_ones, show

__all__ = [
    "CARD_FILE",
    "CARD_MARK",
    "CONFIG_FILE",
    "Description",
    "find_folder",
    "is_model_folder",
    "public_options",
    "read_folder",
    "write_folder",
]

CONFIG_FILE = "config.json"
"""Name of the file that says what the weights are of."""
CARD_FILE = "README.md"
"""Name of the model card."""
CARD_MARK = "<!-- Written by dhcl; without this line it is kept as it is. -->"
"""A line of the cards that are written; one without it is somebody's own."""

FORMAT = 1
"""Of the ``config.json`` that is written."""
_LIBRARY = "dhcl"
# Names of folders and files of the machine that trained have no place in what is sent.
_PLACES = ("out", "root", "weights")


@dataclass(frozen=True)
class Description:
    """What ``config.json`` says of the weights beside it.

    Attributes:
        config: the run's options, without its folders and files.
        which: ``last`` or ``best``, the run's checkpoint.
        fingerprint: of weights and preprocessing, :attr:`dhcl.ReID.id`.
        num_cameras: cameras with statistics of their own.
        cameras: their names in the training's paths, in the order of their indices; None where
            they are not known.
        metrics: what was measured of this model, as in a run's ``metrics.json``; may be empty.
        version: of dhcl.
        about: further values for other programs: width, image size, mean and deviation.
    """

    config: TrainConfig
    which: str
    fingerprint: str
    num_cameras: int = 0
    cameras: tuple[int | str, ...] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


# ---- writing ------------------------------------------------------------------------------------


def write_folder(
    folder: Path, state: Mapping[str, torch.Tensor], description: Description, card: str
) -> None:
    """Write a model's folder; a new one is whole or not there.

    In a folder that is there, other files stay, and so does a card that is not one of ours.

    Raises:
        ConfigError: a file of that name, or a folder with a model of another library.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"folder: must be a folder (got the file {show(folder)})")
    if (folder / CONFIG_FILE).exists() and not is_model_folder(folder):
        raise ConfigError(
            f"folder: {show(folder)} holds a {CONFIG_FILE} that is not of a dhcl model; choose "
            "another folder"
        )
    files = {WEIGHTS_FILE: safetensors_bytes(state), CONFIG_FILE: _json(description)}
    own = folder / CARD_FILE
    if not own.exists() or CARD_MARK in read_text(own, errors="replace"):
        files[CARD_FILE] = card.encode()
    write_together(folder, files)


def _json(description: Description) -> bytes:
    config = description.config
    content = {
        "library_name": _LIBRARY,
        "format": FORMAT,
        "dhcl_version": description.version,
        "fingerprint": description.fingerprint,
        "which": description.which,
        **description.about,
        "num_cameras": description.num_cameras,
        "cameras": None if description.cameras is None else list(description.cameras),
        "metrics": description.metrics,
        "options": public_options(config),
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def public_options(config: TrainConfig) -> dict[str, Any]:
    """The options by section as JSON has them, without places of the machine that trained."""
    import yaml

    nowhere = with_changes(config, dict.fromkeys(_PLACES))
    options: dict[str, Any] = yaml.safe_load(nowhere.to_yaml())
    return options


# ---- reading ------------------------------------------------------------------------------------


def is_model_folder(folder: Path) -> bool:
    """Whether the folder's ``config.json`` is that of a dhcl model."""
    try:
        content = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("library_name") == _LIBRARY


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], Description]:
    """The weights in a model's folder, and what they are of.

    Raises:
        ConfigError: no ``config.json``, or one of something else or of a later version; no weights.
        CheckpointError: weights that can't be read.
    """
    description = _read_description(folder)
    weights = (WEIGHTS_FILE, INDEX_FILE)
    if not any((folder / name).exists() for name in weights):
        raise ConfigError(f"model: {show(folder)} has no {WEIGHTS_FILE} ({_listing(folder)})")
    try:
        return read_safetensors(folder), description
    except (ValueError, OSError) as error:
        raise CheckpointError(f"model: {error}") from error


def _read_description(folder: Path) -> Description:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"model: {show(folder)} is not the folder of a model, it has no {CONFIG_FILE} "
            f"({_listing(folder)})"
        )
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {show(file)} can't be read ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("library_name") != _LIBRARY:
        raise ConfigError(f"model: {show(file)} is not of a dhcl model (no library_name: dhcl)")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"model: {show(file)} is in format {content.get('format')}, of another version of dhcl "
            f"(known: {FORMAT})"
        )
    try:
        names = content["cameras"]
        return Description(
            config=with_changes(TrainConfig(), content["options"]),
            which=str(content["which"]),
            fingerprint=str(content["fingerprint"]),
            num_cameras=int(content["num_cameras"]),
            cameras=None if names is None else tuple(names),
            metrics=dict(content["metrics"]),
            version=str(content["dhcl_version"]),
        )
    except ConfigError as error:
        raise ConfigError(f"model: {show(file)}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"model: {show(file)} must hold options, which, fingerprint, num_cameras, cameras, "
            f"metrics and dhcl_version ({type(error).__name__}: {first_line(error)})"
        ) from error


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"it holds {', '.join(map(show, first_ones(names, 5))) or 'nothing'}"


# ---- the hub ------------------------------------------------------------------------------------


def find_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder of a model: as it is named, or of a repository of the hub.

    Args:
        name: a folder; else the name of a repository, ``owner/name``.
        revision, cache_dir, local_files_only, token: as of ``huggingface_hub.snapshot_download``.

    Raises:
        ConfigError: no such folder, and no name of a repository; huggingface_hub is not installed.
        UnavailableWeights: the repository is neither in the cache nor to be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    what = "a file" if folder.exists() else "nothing"
    repository = str(name)
    if what == "a file" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ConfigError(
            "model: must be a folder, or a repository of the hub as owner/name "
            f"(got {what} at {show(folder)})"
        )
    try:
        from huggingface_hub import constants, snapshot_download
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model: there is no folder {show(folder)}, and reading from the hub needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
            library_name=_LIBRARY,
            allow_patterns=[CONFIG_FILE, CARD_FILE, "model*.safetensors", INDEX_FILE],
        )
    except Exception as error:  # connections, permissions, names: each has its own
        where = cache_dir or constants.HF_HUB_CACHE
        raise UnavailableWeights(
            f"model: there is no folder {show(folder)}, and the repository {repository} "
            f"{'at ' + revision + ' ' if revision else ''}is neither in {where} nor to be "
            f"downloaded ({type(error).__name__}: {first_line(error)})"
        ) from error
    return Path(str(found))
