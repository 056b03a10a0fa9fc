"""Networks from images to maps or tokens, by name, and where their pretrained weights come from."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from dhcl.words import did_you_mean, first_line

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
    net, unpooled = _made_by_timm(name, model, config, image_size)
    _check_patches(name, net, image_size)
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    out = _features_of(name, net, image_size, unpooled)
    finer = out.dim() == 4 and not channels_last and _last_stride_one(net, image_size, out)
    tokens = getattr(net, "num_prefix_tokens", None if out.dim() == 4 else 0)
    alone = out.dim() == 3 and out.shape[1] == (tokens or 0)  # class tokens and no patches
    has_weights = bool(config.hf_hub_id or config.url)
    return Backbone(
        name,
        net,
        out.shape[-1] if channels_last or out.dim() == 3 else out.shape[1],
        "token" if tokens or alone else "avg",
        config.mean,
        config.std,
        channels_last=channels_last and out.dim() == 4,
        prefix_tokens=tokens,
        note=f"timm {model}, last stride 1" if finer else f"timm {model}",
        fetch=(lambda: fetch_timm(model, config)) if has_weights else None,
        source=f"timm {config.hf_hub_id or config.url}",
        adapt=lambda state: resize_tokens(state, net),
    )


def _made_by_timm(
    name: str, model: str, config: Any, image_size: tuple[int, int]
) -> tuple[nn.Module, bool]:
    """The network without a classifier, and whether it could be had without its pooling."""
    # Networks with position embeddings or windows are made for one size.
    sized: dict[str, Any] = {"img_size": image_size} if config.fixed_input_size else {}
    plain: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    errors = []
    for options in ({"global_pool": "", **sized}, sized, {"global_pool": ""}):
        try:
            return timm.create_model(model, **plain, **options), "global_pool" in options
        except Exception as error:  # not all take all options, and say so in many ways
            errors.append(error)
    if isinstance(errors[0], RuntimeError):  # from inside, when a window would have no pixels
        raise ValueError(
            f"image_size: {name} can't be built for {image_size[0]} x {image_size[1]} ({errors[0]})"
        ) from errors[0]
    raise ValueError(
        f"backbone: {name} can't be built ({type(errors[0]).__name__}: {first_line(errors[0])})"
    ) from errors[0]


def _check_patches(name: str, net: nn.Module, image_size: tuple[int, int]) -> None:
    embed = getattr(net, "patch_embed", None)
    patch = getattr(embed, "patch_size", (1, 1))
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    step = getattr(getattr(embed, "proj", None), "stride", patch)
    # Patches that overlap are padded to any size.
    if step == patch and any(size % side for size, side in zip(image_size, patch, strict=True)):
        raise ValueError(
            f"image_size: {name} needs multiples of its patches of {patch[0]} x {patch[1]} "
            f"(got {image_size[0]} x {image_size[1]})"
        )


def _features_of(name: str, net: nn.Module, image_size: tuple[int, int], unpooled: bool) -> Any:
    """What the network makes of an image: maps (1, ...) or tokens (1, N, C).

    The output without pooling and classifier is that of the head in some families (MobileNetV3 and
    its kin, VGG), which is made for what is pooled, or none at all. There the network is changed
    to end before its head.
    """
    images = torch.zeros(2, 3, *image_size)
    if unpooled:
        try:
            out = _run(net, images)
            if _is_features(net, out):
                return out
        except Exception:  # networks raise nearly anything; the other way says what
            pass
    net.forward = net.forward_features  # type: ignore[assignment]
    try:
        out = _run(net, images)
    except Exception as error:  # the same
        raise ValueError(
            f"image_size: {name} can't take {image_size[0]} x {image_size[1]} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(out, torch.Tensor) or out.dim() not in (3, 4) or len(out) != 2:
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"backbone: {name} can't be trained here; its features must be maps (B, C, h, w) or "
            f"tokens (B, N, C) (got {shape})"
        )
    _without_unused(net, images, out)
    return out


@torch.no_grad()
def _run(net: nn.Module, images: torch.Tensor) -> Any:
    training = net.training
    try:
        return net.eval()(images)
    finally:
        net.train(training)


def _is_features(net: nn.Module, out: Any) -> bool:
    if not isinstance(out, torch.Tensor) or out.dim() not in (3, 4):
        return False
    last = out.dim() == 3 or getattr(net, "output_fmt", "NCHW") == "NHWC"
    return bool(out.shape[-1 if last else 1] == net.num_features)


def _without_unused(net: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> None:
    """Leave out parts that the features do not pass, whose parameters would never learn."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in net.modules()]
    try:
        _run(net, images)
    finally:
        for hook in hooks:
            hook.remove()
    for name, part in list(net.named_children()):
        if called.isdisjoint(part.modules()) and any(True for _ in part.parameters()):
            setattr(net, name, nn.Identity())
            try:
                same = torch.equal(_run(net, images), expected)
            except Exception:  # it is used in another way than by calling it
                same = False
            if not same:
                setattr(net, name, part)


_Strided = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


def _last_stride_one(net: nn.Module, image_size: tuple[int, int], before: torch.Tensor) -> bool:
    """Keep the size of the maps in the last stage (Sun et al., ECCV 2018), if it can be kept so.

    What halves the maps last are convolutions and poolings with a stride, of odd kernels or, for
    poolings, of the stride's size. The network is left alone where there is something else.

    Returns:
        Whether the maps are those of the stage before in size now.
    """
    images = torch.zeros(2, 3, *image_size)
    last = _halving_last(net, images, before.shape[2:])
    if not last or len({size for _, size in last}) > 1:
        return False
    old = [(module, {k: getattr(module, k) for k in _SHAPE}) for module, _ in last]
    try:
        if all(_keep_size(module) for module, _ in last):
            after = _run(net, images)
            if after.shape == (*before.shape[:2], *last[0][1]):
                return True
    except Exception:  # networks made for one size of maps raise nearly anything
        pass
    for module, shape in old:
        for name, value in shape.items():
            setattr(module, name, value)
    return False


_SHAPE = ("stride", "kernel_size", "padding")


def _halving_last(
    net: nn.Module, images: torch.Tensor, size: torch.Size
) -> list[tuple[_Strided, tuple[int, ...]]]:
    """What makes maps of the last size from larger ones, with the size of these."""
    found: list[tuple[_Strided, tuple[int, ...]]] = []

    def look(module: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        from_size = tuple(inputs[0].shape[2:])
        if tuple(out.shape[2:]) == tuple(size) != from_size:
            found.append((module, from_size))

    parts = [m for m in net.modules() if isinstance(m, _Strided)]
    hooks = [part.register_forward_hook(look) for part in parts]
    try:
        _run(net, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _keep_size(module: _Strided) -> bool:
    """Set the stride to 1, where the maps then keep their size."""
    kernel, stride = (
        value if isinstance(value, tuple) else (value, value)
        for value in (module.kernel_size, module.stride)
    )
    if all(side % 2 for side in kernel):
        module.stride = (1, 1)
        return True
    if isinstance(module, nn.Conv2d) or kernel != stride:
        return False
    # A pooling of what the stride passes over is none, where it passes over nothing.
    module.kernel_size = module.stride = 1
    return True
