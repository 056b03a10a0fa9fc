"""Weights from libraries and files, with nothing loaded in part unnoticed."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from dhcl.errors import UnavailableWeights
from dhcl.models.tensors import is_safetensors, read_safetensors
from dhcl.words import first_line

__all__ = [
    "LoadReport",
    "StateDict",
    "UnavailableWeights",
    "fetch_timm",
    "fetch_torch_hub",
    "load_into",
    "read_state_dict",
    "resize_tokens",
]

StateDict = dict[str, torch.Tensor]

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "base.", "model.")
# Heads of classifiers, which a re-ID model has no place for.
_HEADS = ("fc.", "head.", "classifier.", "head_dist.")


@dataclass(frozen=True)
class LoadReport:
    """What loading a file did, by tensor name."""

    file: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model that kept their initial values."""
    unused: tuple[str, ...]
    """Tensors of the file that have no place in the model."""
    reshaped: tuple[str, ...]
    """Tensors left out because their shape differs; in ``missing`` too."""

    def __str__(self) -> str:
        text = f"{self.file}: {len(self.matched)} of {self.total} tensors loaded"
        for what, names in (
            ("other shape", self.reshaped),
            ("not in the file", tuple(n for n in self.missing if n not in self.reshaped)),
            ("not in the model", self.unused),
        ):
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                text += f"; {what}: {len(names)} ({shown})"
        return text

    @property
    def total(self) -> int:
        """Tensors of the model."""
        return len(self.matched) + len(self.missing)


# ---- files --------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """The tensors in a .safetensors file, a folder that holds one, or a file of :func:`torch.save`.

    Tensors may lie under ``state_dict`` or ``model``, as in checkpoints of trainers. Files are read
    with ``weights_only=True``: code in them is not run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, damaged, or without tensors.
    """
    path = Path(path)
    if is_safetensors(path):
        return read_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    content: Any
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} is damaged, not a PyTorch file, or holds more than tensors; "
            f"expected a state dict saved by torch.save ({_kind(error)})"
        ) from error
    except Exception as error:  # each of the formats has its own for a damaged file
        raise ValueError(
            f"weights: {path} can't be read; expected a .safetensors file or a state dict saved "
            f"by torch.save ({_kind(error)})"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {path} must hold a state dict (got {type(content).__name__})")
    state = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise ValueError(f"weights: {path} holds no tensors; keys: {list(content)[:5]}")
    return state


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> StateDict:
    """``state`` without the prefixes that wrappers leave on names."""
    stripped = {}
    for name, tensor in state.items():
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
            name = name[len(prefix) :]
        stripped[name] = tensor
    return stripped


def resize_tokens(state: StateDict, net: nn.Module) -> StateDict:
    """Weights of a ViT for the image size of ``net``, whose position embeddings depend on it.

    timm's own conversion; it takes the old grid for square, which that of person crops is not.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not isinstance(net, VisionTransformer):
        return state
    old = state.get("pos_embed")
    if old is not None and net.pos_embed is not None and old.shape != net.pos_embed.shape:
        prefix = net.num_prefix_tokens if not net.no_embed_class else 0
        for ratio in (2, 3):  # of height to width; never a square number too
            width = math.isqrt((old.shape[1] - prefix) // ratio)
            if ratio * width * width == old.shape[1] - prefix:
                size = net.patch_embed.grid_size
                new = resample_abs_pos_embed(old, size, (ratio * width, width), prefix)
                state = state | {"pos_embed": new}
    converted: StateDict = checkpoint_filter_fn(state, net)
    return converted


def load_into(model: nn.Module, state: StateDict, file: str) -> LoadReport:
    """Copy what fits of a backbone's tensors into ``model.backbone``, in place.

    A file that holds a whole model, with ``neck.`` and ``pool.`` tensors, fills these as well.

    Args:
        model: has a ``backbone``.
        state: tensors, their names without prefixes.
        file: named in messages.

    Raises:
        ValueError: less than half of the backbone's tensors are in the file with the right shape;
            the model is unchanged.
    """
    targets = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    parts = ("neck.", "pool.")
    # A plain file has no statistics per camera, which is no fault of it.
    wanted = {
        n
        for n in targets
        if n.startswith("backbone.") and not n.rpartition(".")[2].startswith("camera_")
    }
    renamed = {n if n.startswith(parts) else f"backbone.{n}": t for n, t in state.items()}
    fits = {n: t for n, t in renamed.items() if n in targets and t.shape == targets[n].shape}
    whole = any(n.startswith(parts) for n in fits)
    expected = set(targets) if whole else wanted
    reshaped = sorted(n for n in renamed if n in targets and n not in fits)
    plain = [n for n in renamed if not n.endswith("num_batches_tracked")]
    report = LoadReport(
        file,
        tuple(sorted(fits)),
        tuple(sorted((expected | set(reshaped)) - set(fits))),
        tuple(
            sorted(
                n.removeprefix("backbone.")
                for n in plain
                if n not in targets and not n.removeprefix("backbone.").startswith(_HEADS)
            )
        ),
        tuple(reshaped),
    )
    if 2 * len(wanted & set(fits)) < len(wanted):
        raise ValueError(
            f"weights: too little of {file} fits the backbone; expected names such as "
            f"{_some(wanted)} (got {_some(plain)}). {report}"
        )
    model.load_state_dict(fits, strict=False)
    return report


def _some(names: Any) -> str:
    return ", ".join(sorted(n.removeprefix("backbone.") for n in names)[:3]) or "none"


# ---- libraries ----------------------------------------------------------------------------------


def fetch_torch_hub(url: str) -> StateDict:
    """The state dict at ``url``, from torch's cache or downloaded into it.

    Raises:
        UnavailableWeights: not in the cache and not downloaded.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urlparse(url).path).name
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:
        there = (folder / name).exists()
        what = "is damaged" if there else "is not there and could not be downloaded"
        raise UnavailableWeights(
            f"pretrained weights: {folder / name} {what} ({_kind(error)}).\n"
            f"  Put {url}\n  at  {folder / name}\n"
            "  or give the file with --weights FILE; --no-pretrained trains from scratch."
        ) from error
    return state


def fetch_timm(model: str, config: Any) -> StateDict:
    """The state dict of a timm model, from the Hugging Face cache or downloaded into it.

    Raises:
        UnavailableWeights: not in the cache and not downloaded.
    """
    if not config.hf_hub_id:
        return fetch_torch_hub(config.url)
    from huggingface_hub import constants
    from timm.models import load_state_dict_from_hf

    try:
        state: StateDict = load_state_dict_from_hf(config.hf_hub_id, weights_only=True)
    except Exception as error:
        url = f"{constants.ENDPOINT}/{config.hf_hub_id}/resolve/main/model.safetensors"
        raise UnavailableWeights(
            f"pretrained weights: {model} is not in {constants.HF_HUB_CACHE} and could not be "
            f"downloaded ({_kind(error)}).\n"
            f"  Download {url}\n  and give it with --weights FILE, or run, with a connection, "
            f"hf download {config.hf_hub_id}\n"
            f"  and copy its folder models--{config.hf_hub_id.replace('/', '--')} into "
            f"{constants.HF_HUB_CACHE}; --no-pretrained trains from scratch."
        ) from error
    return state
