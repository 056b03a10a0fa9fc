"""Batch norm over groups of images: consecutive chunks (ghost batch norm), or one per camera.

Both normalise image ``i`` of group ``g`` as ``(x - mean_g) / sqrt(var_g + eps) * weight + bias``.
Mean and variance of a group come from the mean and the variance of each of its images, by the law
of total variance, which is exact, cheap, and needs one pass over the maps whatever the groups are:

    mean_g = average of mean_i,    var_g = average of var_i + (mean_i - mean_g)^2

These few numbers are in float64: neither autocast nor TF32 then touches a statistic, and their
order of summation does not depend on atomics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "MIN_IMAGES",
    "CameraBatchNorm",
    "FollowedBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "using_cameras",
]

MIN_IMAGES = 8
"""Images that statistics of a camera need to rest on, in a batch or in the running ones."""


@dataclass(frozen=True)
class _Groups:
    """Which image belongs to which of G groups."""

    index: torch.Tensor  # (B,) int64, group of each image
    average: torch.Tensor  # (G, B) float64, its product with a value per image averages by group
    count: torch.Tensor  # (G,) float64, images per group

    @classmethod
    def of(cls, index: torch.Tensor, groups: int) -> _Groups:
        # Every group has a row, present or not: no size depends on data, so nothing waits for CUDA.
        member = (torch.arange(groups, device=index.device)[:, None] == index).double()
        count = member.sum(1)
        return cls(index, member / count.clamp(min=1)[:, None], count)


class _MapMoments(torch.autograd.Function):
    """Mean and variance (B, F) over the positions of maps (B, F, H, W).

    :func:`torch.var_mean` does it in one call, and two to three times slower on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean((2, 3), keepdim=True)
        var = torch.linalg.vector_norm(wide - mean, dim=(2, 3)).square() / x[0, 0].numel()
        ctx.save_for_backward(x, mean)
        return mean[:, :, 0, 0], var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: torch.Tensor, grad_var: torch.Tensor) -> torch.Tensor:
        x, mean = ctx.saved_tensors
        grad_mean, grad_var = (g[:, :, None, None] / x[0, 0].numel() for g in (grad_mean, grad_var))
        constant = grad_mean - 2 * grad_var * mean
        return cast(torch.Tensor, (x * (2 * grad_var)).add_(constant).to(x.dtype))


class _ScaleShift(torch.autograd.Function):
    """``x * scale + shift`` of maps (B, F, H, W) with a number (B, F) per map."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return (x * scale[:, :, None, None]).add_(shift[:, :, None, None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, scale = ctx.saved_tensors
        grad = grad.to(scale.dtype)  # a product of two fp16 numbers overflows
        return (
            (grad * scale[:, :, None, None]).to(x.dtype),
            (grad * x).sum((2, 3)),
            grad.sum((2, 3)),
        )


def _image_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over positions of (B, F) or (B, F, H, W), each (B, F) float64."""
    if x.dim() == 2:
        return x.double(), torch.zeros_like(x, dtype=torch.float64)
    mean, var = _MapMoments.apply(x)
    return mean.double(), var.double()


def _group_moments(
    mean: torch.Tensor, var: torch.Tensor, groups: _Groups
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (G, F) of groups from those (B, F) of their images; 0 where empty."""
    center = groups.average @ mean
    return center, groups.average @ (var + (mean - center[groups.index]).square())


def _normalise(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, index: torch.Tensor, norm: _BatchNorm
) -> torch.Tensor:
    """Apply the statistics (G, F) of each image's group and the affine parameters of ``norm``."""
    scale = norm.weight.double() * (var + norm.eps).rsqrt()
    shift = norm.bias.double() - mean * scale
    kind = torch.promote_types(x.dtype, torch.float32)
    scale, shift = scale.to(kind)[index], shift.to(kind)[index]
    if x.dim() == 2:
        return (x * scale + shift).to(x.dtype)
    return cast(torch.Tensor, _ScaleShift.apply(x, scale, shift))


def _check_input(norm: _BatchNorm, x: torch.Tensor) -> None:
    name = type(norm).__name__
    if x.dim() not in (2, 4) or x.shape[1] != norm.num_features:
        raise ValueError(
            f"{name}: input must be (B, {norm.num_features}) or (B, {norm.num_features}, H, W) "
            f"(got {tuple(x.shape)})"
        )
    if norm.training and x.numel() <= norm.num_features:
        raise ValueError(
            f"{name}: training needs more than one value per channel (got {tuple(x.shape)})"
        )


class FollowedBatchNorm(_BatchNorm):
    """A batch norm that may stand in for one of timm with dropout and an activation in it."""

    def follow_as(self, norm: nn.Module) -> None:
        """Do after the norm what this layer does after it, under the same names."""
        for name in ("drop", "act"):
            if isinstance(part := getattr(norm, name, None), nn.Module):
                setattr(self, name, part)

    def followed(self, x: torch.Tensor) -> torch.Tensor:
        """What comes after the norm."""
        for name in ("drop", "act"):
            if (part := self._modules.get(name)) is not None:
                x = part(x)
        return x


# ---- chunks -------------------------------------------------------------------------------------


class _GhostBatchNorm(FollowedBatchNorm):
    def __init__(
        self, num_features: int, samples_per_bn: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        if samples_per_bn < 2:
            raise ValueError(f"samples_per_bn: must be at least 2 (got {samples_per_bn})")
        super().__init__(num_features, eps, momentum)
        self.samples_per_bn = samples_per_bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        _check_input(self, x)
        if not self.training or len(x) <= self.samples_per_bn + 1:
            return self.followed(super().forward(x))
        chunks, rest = divmod(len(x), self.samples_per_bn)
        chunks += rest > 1
        index = torch.arange(len(x), device=x.device) // self.samples_per_bn
        groups = _Groups.of(index.clamp(max=chunks - 1), chunks)
        mean, var = _group_moments(*_image_moments(x), groups)
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            values = groups.count[:, None] * (x.numel() / x.shape[0] / x.shape[1])
            unbiased = var * (values / (values - 1))
            # momentum None is a cumulative average, as in torch.
            step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                assert running is not None
                running += step * (new.mean(0) - running)
        return self.followed(_normalise(x, mean, var, groups.index, self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, samples_per_bn={self.samples_per_bn}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """:class:`GhostBatchNorm2d` of features (B, F)."""


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Batch norm of maps (B, F, H, W) with statistics over ``samples_per_bn`` consecutive images.

    In training, a batch of 64 with ``samples_per_bn=16`` is normalised as on four GPUs with 16
    images each. A remainder is a chunk of its own, or joins the last chunk where it is a single
    image. The running statistics move by ``momentum`` towards the mean over chunks of the chunks'
    statistics, the variance unbiased as in :class:`torch.nn.BatchNorm2d`. Evaluation is that of
    ordinary batch norm.
    """


# ---- cameras ------------------------------------------------------------------------------------

_CAMERAS: ContextVar[_Groups | None] = ContextVar("dhcl_cameras", default=None)


@contextlib.contextmanager
def using_cameras(cameras: torch.Tensor, num_cameras: int) -> Iterator[None]:
    """Tell every :class:`CameraBatchNorm` called in this context which camera took which image.

    Holds for the calling thread, and ends with the context also when something in it raises.

    Args:
        cameras: (B,) int64; what is outside [0, num_cameras), such as -1, is an unseen camera.
        num_cameras: C, as in the layers.
    """
    known = (cameras >= 0) & (cameras < num_cameras)
    index = torch.where(known, cameras, num_cameras)
    token = _CAMERAS.set(_Groups.of(index, num_cameras + 1))
    try:
        yield
    finally:
        _CAMERAS.reset(token)


class CameraBatchNorm(FollowedBatchNorm):
    """Batch norm with statistics per camera and shared affine parameters.

    Takes (B, F) or (B, F, H, W). The camera of each image comes from :func:`using_cameras`; outside
    of it, every image is of an unseen camera. All unseen cameras together count as one.

    **Training.** A camera with at least :data:`MIN_IMAGES` images in the batch is normalised with
    their statistics. One with fewer is normalised with its running statistics, through which no
    gradient flows, and before it has any (or if it is unseen) with those of the whole batch.

    **Evaluation.** Images of a camera whose running statistics rest on at least
    :data:`MIN_IMAGES` images are normalised with these, all others with the global ones.

    **Running statistics.** ``running_mean`` and ``running_var`` are those of all images,
    ``camera_mean`` and ``camera_var`` (C, F) those of each camera, ``camera_images`` (C,) says how
    many images they rest on. A step of size m mixes old and new as two parts of one set of values:
    ``mean += m d`` and ``var = (1 - m) (var + m d^2) + m new_var`` with ``d = new_mean - mean``, so
    that few images at a time give the right variance too. Variances are not Bessel-corrected. m is
    ``momentum``, for a camera with few images so far the share of the new ones if that is larger;
    with ``momentum=None`` it always is that share, which gives the exact mean and variance of all
    values seen.

    In distributed training each process uses the statistics of its own images.

    Idea: camera-based batch normalisation (Zhuang et al., ECCV 2020). Rules for few images, for
    unseen cameras and for the running statistics: ours.
    """

    camera_mean: torch.Tensor
    camera_var: torch.Tensor
    camera_images: torch.Tensor
    _images: torch.Tensor

    def __init__(
        self, num_features: int, num_cameras: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        if num_cameras < 1:
            raise ValueError(f"num_cameras: must be at least 1 (got {num_cameras})")
        super().__init__(num_features, eps, momentum)
        self.num_cameras = num_cameras
        self.register_buffer("camera_mean", torch.zeros(num_cameras, num_features))
        self.register_buffer("camera_var", torch.ones(num_cameras, num_features))
        self.register_buffer("camera_images", torch.zeros(num_cameras, dtype=torch.int64))
        # Images behind the global statistics since their reset; a pretrained file has none to tell.
        self.register_buffer("_images", torch.zeros((), dtype=torch.int64), persistent=False)

    def reset_running_stats(self) -> None:
        """Forget all statistics; every camera becomes unseen."""
        super().reset_running_stats()
        if hasattr(self, "camera_mean"):  # torch resets once before they exist
            self.camera_mean.zero_()
            self.camera_var.fill_(1)
            self.camera_images.zero_()
            self._images.zero_()

    def _groups(self, x: torch.Tensor) -> _Groups:
        groups = _CAMERAS.get()
        if groups is None:
            unseen = torch.full((len(x),), self.num_cameras, device=x.device)
            return _Groups.of(unseen, self.num_cameras + 1)
        if len(groups.index) != len(x) or len(groups.count) != self.num_cameras + 1:
            raise ValueError(
                f"CameraBatchNorm: {len(x)} images and {self.num_cameras} cameras must match "
                f"using_cameras (got {len(groups.index)} and {len(groups.count) - 1})"
            )
        return groups

    def _running(
        self, fallback: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Running mean and variance (C + 1, F) float64, the fallback (F,) for unseen cameras."""
        known = (self.camera_images >= MIN_IMAGES)[:, None]
        mean, var = (
            torch.cat([torch.where(known, own.double(), other), other[None]])
            for own, other in zip((self.camera_mean, self.camera_var), fallback, strict=True)
        )
        return mean, var

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each image with the statistics of its camera.

        Args:
            x: (B, F) or (B, F, H, W), floating.

        Returns:
            The same shape and dtype.
        """
        _check_input(self, x)
        groups = self._groups(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            general = (self.running_mean.double(), self.running_var.double())
            return self.followed(_normalise(x, *self._running(general), groups.index, self))
        image_mean, image_var = _image_moments(x)
        mean, var = _group_moments(image_mean, image_var, groups)
        all_mean = image_mean.mean(0)
        all_var = (image_var + (image_mean - all_mean).square()).mean(0)
        old_mean, old_var = self._running((all_mean, all_var))
        enough = (groups.count >= MIN_IMAGES)[:, None]
        use_mean, use_var = torch.where(enough, mean, old_mean), torch.where(enough, var, old_var)
        with torch.no_grad():
            self._update(groups, mean, var, all_mean, all_var)
        return self.followed(_normalise(x, use_mean, use_var, groups.index, self))

    def _update(
        self,
        groups: _Groups,
        mean: torch.Tensor,
        var: torch.Tensor,
        all_mean: torch.Tensor,
        all_var: torch.Tensor,
    ) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self._images += len(groups.index)
        count = groups.count[:-1]
        self.camera_images += count.long()
        share = count / self.camera_images.clamp(min=1)
        step = (
            share
            if self.momentum is None
            else torch.where(count > 0, share.clamp(min=self.momentum), 0.0)
        )
        all_step = (
            len(groups.index) / self._images.double()
            if self.momentum is None
            else torch.full_like(all_mean[0], self.momentum)
        )
        _mix_(self.camera_mean, self.camera_var, mean[:-1], var[:-1], step[:, None])
        assert self.running_mean is not None
        assert self.running_var is not None
        _mix_(self.running_mean, self.running_var, all_mean, all_var, all_step)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, num_cameras={self.num_cameras}"


def _mix_(
    mean: torch.Tensor,
    var: torch.Tensor,
    new_mean: torch.Tensor,
    new_var: torch.Tensor,
    step: torch.Tensor,
) -> None:
    """Replace the share ``step`` of a set of values, known by mean and variance, by a new set."""
    change = new_mean - mean
    var.copy_((1 - step) * (var + step * change.square()) + step * new_var)
    mean.copy_(mean + step * change)
