"""The network of a run: new from its options, or as a checkpoint has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from dhcl.config import ModelOptions
from dhcl.errors import ConfigError, UnavailableWeights
from dhcl.models import ReIDModel, build_model
from dhcl.training.checkpoint import load_checkpoint
from dhcl.words import show

__all__ = ["make_model", "read_model", "restored", "without_weights"]


def make_model(options: ModelOptions, cameras: int, seed: int) -> ReIDModel:
    """The model of these options, the same on every process.

    Args:
        options: of the model.
        cameras: how many there are in training; 0 if they are not known.
        seed: of weights that start at random.
    """
    if options.camera_bn and cameras < 1:
        raise ConfigError("camera_bn: the cameras of the training images must be known")
    try:
        return build_model(
            options.backbone,
            pretrained=options.pretrained,
            weights=options.weights,
            image_size=options.image_size,
            samples_per_bn=options.samples_per_bn,
            num_cameras=cameras if options.camera_bn else 0,
            seed=seed,
        )
    except (ValueError, FileNotFoundError, UnavailableWeights) as error:
        raise ConfigError(str(error)) from error


def read_model(options: ModelOptions, run: Path, which: str = "last") -> ReIDModel:
    """The model of a run, in training mode, on the CPU.

    Args:
        options: those of the run's model.
        run: its folder.
        which: ``last`` or ``best`` (by test mAP along the way).

    Raises:
        ConfigError: no such checkpoint. CheckpointError: it can't be read.
    """
    file = run / "checkpoints" / f"{which}.pt"
    if not file.exists():
        raise ConfigError(f"run: there is no checkpoint {show(file)}")
    return restored(options, load_checkpoint(file)["model"])


def restored(options: ModelOptions, state: Mapping[str, torch.Tensor]) -> ReIDModel:
    """The model of these options with these tensors, in training mode, on the CPU.

    Args:
        options: those of the model that the tensors are of.
        state: all its tensors, by name.

    Raises:
        RuntimeError: tensors are missing, too many or of another shape.
    """
    cameras = next((v for k, v in state.items() if k.endswith("camera_images")), ())
    model = make_model(without_weights(options), len(cameras), seed=0)
    model.load_state_dict(state)
    return model


def without_weights(options: ModelOptions) -> ModelOptions:
    """The options of a model whose weights come from a checkpoint."""
    return dataclasses.replace(options, pretrained=False, weights=None)
