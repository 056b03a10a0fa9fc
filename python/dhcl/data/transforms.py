"""Decoded images to tensors for a network: resizing, augmentation, normalisation.

Everything up to normalisation is uint8, which is where most of the time is saved.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.transforms import v2  # type: ignore[import-untyped]

__all__ = ["eval_transform", "train_transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Planar(nn.Module):
    """Channel after channel: decoders mix them, and all that follows the resize is faster so."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.contiguous()


class _Normalize(nn.Module):
    """uint8 (3, H, W) to float32, ``(x / 255 - mean) / std``, in two passes over the pixels."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"normalisation: mean and std must be three numbers, std positive "
                f"(got {mean}, {std})"
            )
        self.mean = (torch.tensor(mean, dtype=torch.float64) * 255).float().view(3, 1, 1)
        self.std = (torch.tensor(std, dtype=torch.float64) * 255).float().view(3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.sub(image, self.mean).div_(self.std)


def train_transform(
    size: tuple[int, int],
    *,
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    color_jitter: float = 0.0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> v2.Compose:
    """Augmentation of the field: resize, flip, pad and crop, normalise, erase.

    Takes uint8 (3, h, w), gives float32 (3, H, W). Defaults are SpCL's (Ge et al. 2020).

    Args:
        size: (H, W) in pixels.
        flip: probability of mirroring left and right.
        pad: black pixels added on each side before a random crop to ``size``.
        erase: probability of erasing a rectangle of 2 to 40 % of the area, aspect 0.3 to 3.3
            (Zhong et al. 2020), to the mean colour.
        color_jitter: s; brightness, contrast and saturation change by up to ±s, hue by ±s/4.
            Hue is slow (milliseconds an image).
        mean, std: of normalised channels, in units of 1.
    """
    _check_size(size)
    for name, value in (("flip", flip), ("erase", erase), ("color_jitter", color_jitter)):
        if not 0 <= value <= 1:
            raise ValueError(f"train_transform: {name} must be in [0, 1] (got {value})")
    if pad < 0:
        raise ValueError(f"train_transform: pad must be at least 0 (got {pad})")
    s = color_jitter
    steps = [
        _resize(size),
        _Planar(),
        v2.RandomHorizontalFlip(flip) if flip else None,
        v2.RandomCrop(size, padding=pad) if pad else None,
        v2.ColorJitter(s, s, s, s / 4) if s else None,
        _Normalize(mean, std),
        v2.RandomErasing(erase, scale=(0.02, 0.4), ratio=(0.3, 3.3)) if erase else None,
    ]
    return v2.Compose([step for step in steps if step is not None])


def eval_transform(
    size: tuple[int, int],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> v2.Compose:
    """Resize to (H, W) and normalise: uint8 (3, h, w) to float32 (3, H, W)."""
    _check_size(size)
    return v2.Compose([_resize(size), _Planar(), _Normalize(mean, std)])


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: must be height and width in pixels (got {size})")


def _resize(size: tuple[int, int]) -> v2.Resize:
    return v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
