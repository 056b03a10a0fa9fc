"""Networks from images to maps or tokens, by name, and where their pretrained weights come from."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
import torchvision  # type: ignore[import-untyped]
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from dhcl.models.weights import (
    StateDict,
    fetch_timm,
    fetch_torch_hub,
    resize_tokens,
)
from dhcl.words import did_you_mean

__all__ = ["Backbone", "backbone_names", "make_backbone"]

_ALIASES = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}

# Weights published with IBN-Net (Pan et al., ECCV 2018).
_IBN_RELEASE = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/"
_IBN = {
    "resnet50_ibn_a": ("resnet50", _IBN_RELEASE + "resnet50_ibn_a-d9d0bb7b.pth"),
    "resnet101_ibn_a": ("resnet101", _IBN_RELEASE + "resnet101_ibn_a-59ea0ac6.pth"),
}


@dataclass
class Backbone:
    """A network and what is to be known about it.

    ``module`` maps (B, 3, H, W) to maps (B, C, h, w), or to (B, h, w, C) where ``channels_last``,
    or to tokens (B, N, C) of which the first ``prefix_tokens`` are not patches.
    """

    name: str
    module: nn.Module
    channels: int
    pooling: str
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    channels_last: bool = False
    prefix_tokens: int | None = None
    note: str = ""
    fetch: Callable[[], StateDict] | None = None
    source: str = ""
    adapt: Callable[[StateDict], StateDict] = field(default=lambda state: state)


@functools.cache
def _torchvision_names() -> tuple[str, ...]:
    families = ["resnet*", "resnext*", "wide_resnet*"]
    return tuple(torchvision.models.list_models(torchvision.models, include=families))


def backbone_names() -> list[str]:
    """Every name :func:`build_model` takes, but for ``timm:<name>``, of which there are ~1000."""
    return ["small", *_torchvision_names(), *_IBN, *_ALIASES]


def make_backbone(name: str, image_size: tuple[int, int]) -> Backbone:
    """The network called ``name`` with random weights, for images of (height, width).

    Raises:
        ValueError: an unknown name, or an image size the network can't take.
    """
    if name == "small":
        return Backbone(name, _small(), 256, "gem-halves")
    if name in _torchvision_names():
        return _resnet(name)
    if name in _IBN:
        return _resnet_ibn(name)
    if name in _ALIASES or name.startswith("timm:"):
        return _timm(name, _ALIASES.get(name, name.removeprefix("timm:")), image_size)
    names = backbone_names()
    raise _unknown(name, names, f"{', '.join(names)}, and timm:<name> for any model of timm")


def _unknown(name: str, names: Sequence[str], known: str) -> ValueError:
    hint = did_you_mean(name, names, before=", ") or "."
    return ValueError(f"backbone: unknown name {name!r}{hint} Known are {known}")


# ---- convolutional ------------------------------------------------------------------------------


def _small(width: int = 32) -> nn.Module:
    """Eight 3 x 3 convolutions, 1/8 of the size and 8 x width channels: fast on a CPU."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    return nn.Sequential(
        block(3, width, 2),
        block(width, 2 * width, 2),
        block(2 * width, 4 * width, 2),
        block(4 * width, 8 * width, 1),
    )


def _stride_one(net: nn.Module) -> None:
    """Keep the size of the maps in the last stage (Sun et al., ECCV 2018)."""
    for module in net.get_submodule("layer4.0").modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def _headless(net: nn.Module) -> nn.Module:
    children = [c for c in net.named_children() if c[0] not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(children))


def _resnet(name: str) -> Backbone:
    net = torchvision.models.get_model(name, weights=None)
    channels = net.fc.in_features
    _stride_one(net)
    # The first weights, with which published figures were made; the second train worse here.
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    return Backbone(
        name,
        _headless(net),
        channels,
        "gem",
        note="last stride 1",
        fetch=lambda: fetch_torch_hub(url),
        source="torchvision IMAGENET1K_V1",
    )


class _InstanceBatchNorm(nn.Module):
    """IBN-a: instance norm on the first half of the channels, batch norm on the others.

    Pan et al., ECCV 2018; the names ``IN`` and ``BN`` are those in the published weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.IN = nn.InstanceNorm2d(self.split, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.split)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.IN(x[:, : self.split]), self.BN(x[:, self.split :])], 1)


def _resnet_ibn(name: str) -> Backbone:
    plain, url = _IBN[name]
    backbone = _resnet(plain)
    for stage in ("layer1", "layer2", "layer3"):
        for block in backbone.module.get_submodule(stage).children():
            block.bn1 = _InstanceBatchNorm(block.bn1.num_features)  # type: ignore
    backbone.name = name
    backbone.fetch = lambda: fetch_torch_hub(url)
    backbone.source = "IBN-Net v1.0"
    return backbone


# ---- timm ---------------------------------------------------------------------------------------


def _timm(name: str, model: str, image_size: tuple[int, int]) -> Backbone:
    if not timm.is_model(model):
        raise _unknown(model, timm.list_models(), "those of timm.list_models()")
    config = timm.get_pretrained_cfg(model)
    assert config is not None
    # Networks with position embeddings or windows are made for one size.
    sized: dict[str, Any] = {"img_size": image_size} if config.fixed_input_size else {}
    try:
        net = timm.create_model(model, pretrained=False, num_classes=0, global_pool="", **sized)
    except RuntimeError as error:  # from inside, when a window would have no pixels
        raise ValueError(
            f"image_size: {name} can't be built for {image_size[0]} x {image_size[1]} ({error})"
        ) from error
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1, 1))
    if any(size % side for size, side in zip(image_size, patch, strict=True)):
        raise ValueError(
            f"image_size: {name} needs multiples of its patches of {patch[0]} x {patch[1]} "
            f"(got {image_size[0]} x {image_size[1]})"
        )
    tokens = getattr(net, "num_prefix_tokens", None)
    has_weights = bool(config.hf_hub_id or config.url)
    return Backbone(
        name,
        net,
        cast(int, net.num_features),
        "token" if tokens else "avg",
        config.mean,
        config.std,
        channels_last=getattr(net, "output_fmt", "NCHW") == "NHWC",
        prefix_tokens=tokens,
        note=f"timm {model}",
        fetch=(lambda: fetch_timm(model, config)) if has_weights else None,
        source=f"timm {config.hf_hub_id or config.url}",
        adapt=lambda state: resize_tokens(state, net),
    )
