"""Weights from libraries and files, with nothing loaded in part unnoticed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from dhcl.errors import UnavailableWeights, as_path
from dhcl.models.tensors import is_safetensors, read_safetensors
from dhcl.torch_files import ForeignCode, load_tensors
from dhcl.words import first_line, show

__all__ = [
    "LoadReport",
    "StateDict",
    "UnavailableWeights",
    "chosen_state",
    "fetch_timm",
    "fetch_torch_hub",
    "load_into",
    "read_states",
    "resize_tokens",
    "strip_prefixes",
]

StateDict = dict[str, torch.Tensor]

_PREFIXES = ("module.", "_orig_mod.", "backbone.", "base.", "model.")
# Heads of classifiers, which a re-ID model has no place for.
_HEADS = ("fc.", "head.", "classifier.", "head_dist.")
# Of two networks of one shape in a file: the average over the training is the one to use.
_PREFERRED = {"ema", "teacher"}
_SECOND = {"student", "encoder_k", "momentum_encoder", "target", "target_encoder"}


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
    part: str = ""
    """Where in the file the tensors are, if it holds more than them."""

    def __str__(self) -> str:
        place = f" ({self.part}*)" if self.part else ""
        text = f"{show(self.file)}{place}: {len(self.matched)} of {self.total} tensors loaded"
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


def read_states(path: str | os.PathLike[str]) -> dict[str, StateDict]:
    """All state dicts in a .safetensors file, a folder that holds one, or a file of ``torch.save``.

    They may lie in others, under any names, as in checkpoints of trainers. Code in files is not
    run; what scripts put beside tensors and what can do nothing is passed over.

    Returns:
        Tensors by name, by the names under which they lie, joined by dots: ``""`` for those of the
        file itself, ``teacher`` for those under that.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, damaged, without tensors, or one that names code, with
            what to do.
    """
    path = as_path("weights", path)
    if is_safetensors(path):
        return {"": read_safetensors(path)}
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {show(path)}")
    content: Any
    try:
        content = load_tensors(path)
    except ForeignCode as error:
        raise ValueError(f"weights: {show(path)} {error}") from error
    except Exception as error:  # each of the formats has its own for a damaged file
        raise ValueError(
            f"weights: {show(path)} can't be read; it is damaged, or neither a .safetensors file "
            f"nor a state dict saved by torch.save ({_kind(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"weights: {show(path)} must hold a state dict (got {type(content).__name__})"
        )
    states = dict(_states(content))
    if not states:
        raise ValueError(f"weights: {show(path)} holds no tensors; keys: {list(content)[:5]}")
    return states


def _states(content: Mapping[Any, Any], place: str = "", depth: int = 4) -> Iterator[Any]:
    own = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if own:
        yield place, own
    for name, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from _states(value, f"{place}.{name}" if place else str(name), depth - 1)


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> StateDict:
    """``state`` without the prefixes that wrappers leave on names."""
    return {_stripped(name): tensor for name, tensor in state.items()}


def _stripped(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name[len(prefix) :]
    return name


# ---- which tensors of a file are the network's --------------------------------------------------


def chosen_state(states: Mapping[str, StateDict], backbone: nn.Module) -> tuple[str, StateDict]:
    """The tensors of a file that most of a network's are among, under the network's names.

    Names may begin with anything (``module.encoder_q.``), and the stages of a network may be
    numbered, as in an ``nn.Sequential`` of a ResNet's parts (``base.0.weight`` is ``conv1.weight``
    in SpCL and Cluster Contrast). Of equals an average over the training is taken (``teacher``,
    ``model_ema``), else the first.

    Args:
        states: as of :func:`read_states`.
        backbone: the network.

    Returns:
        Where the tensors are in the file, and all tensors from there, without prefixes.
    """
    targets = {n: t.shape for n, t in backbone.state_dict().items()}
    best: tuple[tuple[int, int], str, StateDict] | None = None
    for place, state in states.items():
        for prefix, renamed in _renamings(state, targets):
            fits = sum(name in targets and t.shape == targets[name] for name, t in renamed.items())
            part = f"{place}.{prefix}" if place else prefix
            key = (fits, _preference(part))
            if best is None or key > best[0]:
                best = (key, part, renamed)
    assert best is not None
    return best[1:]


def _preference(part: str) -> int:
    words = set(part.split(".")) | set(part.replace(".", "_").split("_"))
    return 1 if words & _PREFERRED else -1 if words & _SECOND else 0


def _renamings(
    state: StateDict, targets: Mapping[str, torch.Size]
) -> Iterator[tuple[str, StateDict]]:
    """Ways to read a file's names, with the prefix that each takes as the network's."""
    yield "", strip_prefixes(state)
    yield "", dict(state)
    inside = {name.partition(".")[2] for name in targets}
    ends: Counter[str] = Counter()
    numbered: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:i])
            if ".".join(parts[i:]) in targets:
                ends[prefix] += 1
            if parts[i].isdecimal() and ".".join(parts[i + 1 :]) in inside:
                numbered[prefix] += 1
    for prefix, _ in ends.most_common(4):
        yield prefix, _without(prefix, state)
    for prefix, _ in numbered.most_common(4):
        yield prefix, _named_stages(_without(prefix, state), targets)


def _without(prefix: str, state: StateDict) -> StateDict:
    """Names without this prefix; neck and pool may lie beside what it is of."""
    outer = prefix
    while shorter := next((p for p in _PREFIXES if outer.endswith(p)), ""):
        outer = outer[: -len(shorter)]
    others = {n: t for n, t in state.items() if not n.startswith(prefix)}
    renamed = {_stripped(name.removeprefix(outer)): tensor for name, tensor in others.items()}
    return renamed | {n.removeprefix(prefix): t for n, t in state.items() if n not in others}


def _named_stages(state: StateDict, targets: Mapping[str, torch.Size]) -> StateDict:
    """Numbers at the beginning of names as the network's own stages, in their order."""
    stages = list(dict.fromkeys(name.partition(".")[0] for name in targets))
    first = (name.partition(".")[0] for name in state)
    numbers = sorted({part for part in first if part.isdecimal()}, key=int)
    table = dict(zip(numbers, stages, strict=False))
    renamed = {}
    for name, tensor in state.items():
        part, dot, rest = name.partition(".")
        renamed[f"{table.get(part, part)}{dot}{rest}"] = tensor
    return renamed


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


def load_into(model: nn.Module, state: StateDict, file: str, part: str = "") -> LoadReport:
    """Copy what fits of a backbone's tensors into ``model.backbone``, in place.

    A file that holds a whole model, with ``neck.`` and ``pool.`` tensors, fills these as well.

    Args:
        model: has a ``backbone``.
        state: tensors, their names without prefixes.
        file: named in messages.
        part: where in the file they are, named in messages.

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
        part,
    )
    if 2 * len(wanted & set(fits)) < len(wanted):
        raise ValueError(
            f"weights: too little of {show(file)} fits the backbone; expected names such as "
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
            f"pretrained weights: {show(folder / name)} {what} ({_kind(error)}).\n"
            f"  Put {url}\n  at  {show(folder / name)}\n"
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
