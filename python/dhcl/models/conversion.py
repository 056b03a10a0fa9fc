"""Networks with other batch norms in them, and their statistics from images at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dhcl.models.norms import (
    CameraBatchNorm,
    FollowedBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
)

__all__ = ["calibrate", "camera_batch_norm", "ghost_batch_norm"]


def _replace(module: nn.Module, make: Callable[[_BatchNorm], FollowedBatchNorm]) -> nn.Module:
    """``module`` with every batch norm replaced; parameters and running statistics carry over."""
    if isinstance(module, _BatchNorm):
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d) or not (
            module.affine and module.track_running_stats
        ):
            raise ValueError(
                "batch norm over groups: only plain BatchNorm1d/2d layers, and timm's with an "
                "activation, with parameters and running statistics can be replaced "
                f"(got {module!r})"
            )
        new = make(module).to(module.weight.device)
        if isinstance(module, BatchNormAct2d):
            new.follow_as(module)
        new.weight, new.bias = module.weight, module.bias
        new.load_state_dict(module.state_dict(), strict=False)
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, make))
    return module


def ghost_batch_norm(module: nn.Module, samples_per_bn: int) -> nn.Module:
    """Replace every batch norm in ``module`` by a ghost batch norm with the same parameters."""

    def make(norm: _BatchNorm) -> FollowedBatchNorm:
        kind = GhostBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else GhostBatchNorm1d
        return kind(norm.num_features, samples_per_bn, norm.eps, norm.momentum or 0.1)

    return _replace(module, make)


def camera_batch_norm(module: nn.Module, num_cameras: int) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`CameraBatchNorm` with its parameters.

    Its running statistics become the global ones; every camera starts unseen.
    """
    return _replace(
        module,
        lambda norm: CameraBatchNorm(
            norm.num_features, num_cameras, norm.eps, norm.momentum or 0.1
        ),
    )


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> int:
    """Compute the running statistics of all batch norms anew, from the images at hand.

    Images pass with statistics of the batch, as in training; the running ones are then the
    cumulative average over the batches (of ordinary and ghost batch norms) or exactly those of all
    values seen, per camera and together (of :class:`CameraBatchNorm`). Batches should be as large
    as memory allows, with at least :data:`dhcl.models.MIN_IMAGES` images of each camera they hold;
    taking one camera at a time is fine where statistics are per camera, and wrong where they are
    not.
    Where sets of images differ in more than the camera (view, season), calibrating on each before
    extracting it removes that difference too; results then use each set as a whole, so say so.
    Parameters, the random state and the train/eval modes are left alone, dropout is off, and if
    anything raises, the old statistics are put back.

    Args:
        model: called as ``model(images, cameras)``, a :class:`dhcl.models.ReIDModel`.
        batches: (images (B, 3, H, W), cameras (B,) int64 or None), on the model's device.

    Returns:
        The number of images.

    Raises:
        ValueError: no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    old_modes = [(m, m.training) for m in model.modules()]
    old_momenta = [norm.momentum for norm in norms]
    old_buffers = [[b.clone() for b in norm.buffers()] for norm in norms]
    images_seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        for images, cameras in batches:
            model(images, cameras)
            images_seen += len(images)
        if not images_seen:
            raise ValueError("calibrate: needs at least one batch of images (got none)")
    except BaseException:
        for norm, buffers in zip(norms, old_buffers, strict=True):
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, old_momenta, strict=True):
            norm.momentum = momentum
        for module, training in old_modes:
            module.training = training
    return images_seen
