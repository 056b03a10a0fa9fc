"""The re-ID model: backbone, pooling, BNNeck, unit length."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from dhcl.models.backbones import Backbone, make_backbone
from dhcl.models.conversion import camera_batch_norm, ghost_batch_norm
from dhcl.models.neck import Pool, checked_pooling
from dhcl.models.norms import FollowedBatchNorm, using_cameras
from dhcl.models.weights import LoadReport, chosen_state, load_into, read_states, strip_prefixes
from dhcl.words import show

__all__ = ["ReIDModel", "build_model"]

_LOG = logging.getLogger(__name__)


class ReIDModel(nn.Module):
    """Images to features of unit length: backbone, pooling, batch norm without bias, L2 norm.

    The neck is that of Luo et al. (CVPR workshops 2019), as SpCL uses it: a BatchNorm1d whose bias
    stays 0, its output normalised. Pooling and neck compute in float32 under autocast too.

    Attributes:
        dim: features per image.
        mean, std: (3,) of the images in [0, 1]; inputs must be ``(image - mean) / std``.
        description: one line about the model and its weights.
        num_cameras: cameras with statistics of their own, 0 for ordinary batch norm.
        weights: what loading a file or pretrained weights did, or None.
    """

    def __init__(self, backbone: Backbone, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone.module
        self.pool = Pool(pooling) if pooling != "token" else None
        self.dim = backbone.channels * (2 if pooling.endswith("-halves") else 1)
        self.neck = nn.BatchNorm1d(self.dim)
        self.neck.bias.requires_grad_(False)
        self.mean = backbone.mean
        self.std = backbone.std
        self.description = backbone.name
        self.num_cameras = 0
        self.weights: LoadReport | None = None
        self._channels_last = backbone.channels_last
        self._prefix_tokens = backbone.prefix_tokens
        self._grid: tuple[int, int] = (0, 0)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Output of the backbone: (B, C, h, w) maps, or (B, N, C) tokens."""
        out: torch.Tensor = self.backbone(images)
        return out.permute(0, 3, 1, 2) if self._channels_last else out

    def forward(self, images: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        """Features of images.

        Args:
            images: (B, 3, H, W) floating, normalised by ``mean`` and ``std``.
            cameras: (B,) int64; -1 or any other index outside [0, num_cameras) is an unseen camera,
                None makes all of them unseen. Without statistics per camera it has no effect.

        Returns:
            (B, dim) float32, rows of length 1.

        Raises:
            ValueError: images or cameras of another shape or dtype.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: must be (B, 3, H, W) floating (got {tuple(images.shape)} {images.dtype})"
            )
        with self._cameras(images, cameras):
            out = self.maps(images)
            with torch.autocast(images.device.type, enabled=False):
                out = out if out.dtype == torch.float64 else out.float()
                return nn.functional.normalize(self.neck(self._pooled(out)))

    def _pooled(self, out: torch.Tensor) -> torch.Tensor:
        if out.dim() == 4:
            return cast(nn.Module, self.pool)(out)  # type: ignore[no-any-return]
        if self.pool is None:
            return out[:, 0]
        patches = out[:, self._prefix_tokens or 0 :].transpose(1, 2)
        return self.pool(patches.unflatten(2, self._grid))  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _cameras(self, images: torch.Tensor, cameras: torch.Tensor | None) -> Iterator[None]:
        if cameras is not None and (
            cameras.shape != images.shape[:1] or cameras.is_floating_point()
        ):
            raise ValueError(
                f"cameras: must be ({len(images)},) int64, one per image "
                f"(got {tuple(cameras.shape)} {cameras.dtype})"
            )
        if not self.num_cameras:
            yield
            return
        if cameras is None:
            cameras = torch.full((len(images),), -1)
        with using_cameras(cameras.to(images.device), self.num_cameras):
            yield


def build_model(
    backbone: str = "resnet50",
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    pooling: str | None = None,
    image_size: tuple[int, int] = (256, 128),
    samples_per_bn: int = 0,
    num_cameras: int = 0,
    seed: int | None = None,
) -> ReIDModel:
    """A re-ID model by name.

    Args:
        backbone: ``small`` (8 convolutions, for CPUs and small images), a residual network of
            torchvision (last stride 1), ``resnet50_ibn_a`` or ``resnet101_ibn_a``, ``vit_small``,
            ``vit_base`` (16 x 16 patches), or ``timm:<name>`` (last stride 1 where convolutions or
            poolings halve the maps last; the description says so).
        pretrained: load the ImageNet weights of the library; ``small`` has none and starts from
            random numbers all the same.
        weights: a file to load instead (.pth, .pt, .safetensors), of the backbone, of a whole
            model, or a checkpoint of another project: SpCL, Cluster Contrast, torchreid, fast-reid,
            MoCo, DINO, Lightning and their like. What matched is logged, and kept in
            ``ReIDModel.weights``.
        pooling: one of :data:`dhcl.models.POOLINGS`. By default ``gem``, for ``small``
            ``gem-halves``, for transformers with a class token ``token``, for others of timm
            ``avg``.
        image_size: (height, width) of the images.
        samples_per_bn: training statistics of batch norm over this many consecutive images
            (:class:`GhostBatchNorm2d`); 0 for the whole batch.
        num_cameras: statistics per camera for so many cameras (:class:`CameraBatchNorm`); 0 for
            ordinary batch norm.
        seed: of the initial weights, with torch's random state left as it was; None draws from it.

    Returns:
        The model in training mode, on the CPU.

    Raises:
        ValueError: an unknown name, a pooling or image size the backbone can't have, both
            ``samples_per_bn`` and ``num_cameras``, or a file of weights that does not fit.
        FileNotFoundError: no such file of weights.
        UnavailableWeights: pretrained weights can't be had; says which file to put where.
    """
    _check_arguments(image_size, samples_per_bn, num_cameras)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        parts = make_backbone(backbone, image_size)
        pooling = checked_pooling(pooling or parts.pooling, parts)
        model = ReIDModel(parts, pooling)
    _check_size(model, parts, image_size)
    source = "from scratch"
    if pretrained and weights is None and backbone != "small":
        source = _load_pretrained(model, parts)
    if num_cameras:
        camera_batch_norm(model, num_cameras)
        model.num_cameras = num_cameras
    elif samples_per_bn:
        ghost_batch_norm(model, samples_per_bn)
    if num_cameras or samples_per_bn:
        _check_norms(model, backbone, image_size)
    if weights is not None:
        # After the norms are replaced: a file of a whole model has statistics per camera too.
        part, state = chosen_state(read_states(weights), model.backbone)
        model.weights = load_into(model, parts.adapt(state), os.fspath(weights), part)
        source = f"weights {show(os.fspath(weights))}"
    if model.weights is not None:
        level = logging.WARNING if model.weights.missing else logging.INFO
        _LOG.log(level, "%s", model.weights)
    known = [
        backbone,
        parts.note,
        source,
        f"{image_size[0]} x {image_size[1]} to {model._grid[0]} x {model._grid[1]}",
        f"{pooling} pooling",
        f"{model.dim} features",
        f"batch norm per camera ({num_cameras})" if num_cameras else "",
        f"batch norm over {samples_per_bn} images" if samples_per_bn else "",
    ]
    model.description = ", ".join(part for part in known if part)
    return model


def _check_arguments(image_size: tuple[int, int], samples_per_bn: int, num_cameras: int) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size: must be (height, width) in pixels (got {image_size})")
    if samples_per_bn < 0 or samples_per_bn == 1:
        raise ValueError(f"samples_per_bn: must be 0 (off) or at least 2 (got {samples_per_bn})")
    if num_cameras < 0:
        raise ValueError(f"num_cameras: must be 0 (off) or more (got {num_cameras})")
    if samples_per_bn and num_cameras:
        raise ValueError(
            "samples_per_bn and num_cameras: statistics are per chunk or per camera, choose one "
            f"(got {samples_per_bn} and {num_cameras})"
        )


def _load_pretrained(model: ReIDModel, parts: Backbone) -> str:
    """Load the weights published with the backbone; where they come from."""
    if parts.fetch is None:
        raise ValueError(
            f"pretrained: {parts.name} has no published weights; give a file with --weights FILE, "
            "or train from scratch with --no-pretrained"
        )
    state = parts.adapt(strip_prefixes(parts.fetch()))
    model.weights = load_into(model, state, parts.source)
    return parts.source


@torch.no_grad()
def _check_norms(model: ReIDModel, name: str, image_size: tuple[int, int]) -> None:
    """Refuse norms over something else than images, whose groups would be others than theirs."""
    images = 3
    wrong: list[str] = []

    def look(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].dim() not in (2, 4) or len(inputs[0]) != images:
            wrong.append(f"{type(norm).__name__} of {tuple(inputs[0].shape)}")

    norms = [m for m in model.backbone.modules() if isinstance(m, FollowedBatchNorm)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    model.eval()
    try:
        model.maps(torch.zeros(images, 3, *image_size))
    except ValueError as error:
        wrong.append(str(error))
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    if wrong:
        raise ValueError(
            f"batch norm over groups: {name} has batch norms over other rows than images, which "
            f"can't be grouped by camera or by chunk (got {wrong[0]} for {images} images)"
        )


@torch.no_grad()
def _check_size(model: ReIDModel, parts: Backbone, image_size: tuple[int, int]) -> None:
    """Pass one image through, to know the size of the maps and that there is one."""
    model.eval()
    try:
        out = model.maps(torch.zeros(1, 3, *image_size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"image_size: {parts.name} can't take {image_size[0]} x {image_size[1]} ({error})"
        ) from error
    if out.dim() == 4:
        model._grid = (out.shape[2], out.shape[3])
    else:
        patches = out.shape[1] - (parts.prefix_tokens or 0)
        grid = getattr(getattr(parts.module, "patch_embed", None), "grid_size", None)
        # Networks that merge patches have fewer in the end.
        model._grid = (1, patches)
        if isinstance(grid, tuple) and math.prod(grid) == patches:
            model._grid = (int(grid[0]), int(grid[1]))
    if model.pool is not None and model.pool.halves and model._grid[0] < 2:
        raise ValueError(
            f"pooling: halves need maps of 2 rows, {parts.name} has {model._grid[0]} at "
            f"{image_size[0]} x {image_size[1]}"
        )
    model.train()
