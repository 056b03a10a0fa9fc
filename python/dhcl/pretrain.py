"""``dhcl pretrain``: weights to start from where no ImageNet weights are at hand.

Pedestrians are drawn in cameras that differ much, and a network learns their identities, which are
known as they were drawn. No picture of a real person and no annotation is involved.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from dhcl.config import TrainConfig, preset, with_changes
from dhcl.synth.progress import draw_once
from dhcl.words import show

__all__ = ["Pretrain", "pretrain"]


@dataclass(frozen=True)
class Pretrain:
    """Draw pedestrians and train a network on their identities: weights to start from."""

    out: tyro.conf.Positional[Path]
    """Folder for the drawn images and the run; one that was stopped goes on there."""
    backbone: str = "small"
    """Network to train from random weights, named as for dhcl train."""
    image_size: tuple[int, int] = (96, 48)
    """Height and width in pixels; take those of the training that is to follow."""
    ids: int = 600
    """Number of pedestrians that are drawn; half of them are for testing."""
    cameras: int = 6
    """Number of cameras, which differ as much as drawn cameras can."""
    images_per_camera: int = 2
    """Mean number of images of a pedestrian in a camera."""
    epochs: int = 10
    """Number of rounds, the last fifth of them at a tenth of the learning rate."""
    iterations: int = 60
    """Number of batches of 64 images in an epoch."""
    color_jitter: float = 0.5
    """Strength of random brightness, contrast, saturation and hue."""
    seed: int = 0
    """Seed of the pedestrians and of the training."""
    device: Literal["auto", "cpu"] = "auto"
    """Processor that the network runs on: auto takes a GPU where there is one."""
    workers: int = os.cpu_count() or 1
    """Number of processes that draw and load images; 0 is the main one."""

    def options(self) -> TrainConfig:
        """Of the training: batch norm per camera, and the loss over prototypes alone."""
        return with_changes(
            preset("dhcl"),
            {
                "data": "market1501",
                "root": self.out / "data",
                "out": self.out,
                "backbone": self.backbone,
                "pretrained": False,
                "image_size": self.image_size,
                "camera_bn": True,
                "calibrate": "epoch",
                "cluster_on": "extracted",
                "instance_weight": 0.0,
                "kappa": 0.0,
                "beta": 0.0,
                "warmup_epochs": 0,
                "epochs": self.epochs,
                "iterations": self.iterations,
                "lr_step": max(self.epochs * 4 // 5, 1),
                "pad": max(self.image_size[1] // 10, 1),
                "color_jitter": self.color_jitter,
                "cache_gb": 1.0,
                "workers": self.workers,
                "device": self.device,
                "seed": self.seed,
                "eval_every": 0,
                "rerank": False,
                "report": False,
            },
        ).resolved()


def pretrain(options: Pretrain) -> dict[str, Any]:
    """Draw, train and evaluate on the drawn people for testing; the metrics of the last epoch."""
    from dhcl.training.runs import train  # not needed for the help

    config = options.options()
    draw_once(
        options.out / "data",
        sheet=options.out / "people.png",
        workers=max(options.workers, 1),
        ids=options.ids,
        cameras=options.cameras,
        images_per_camera=options.images_per_camera,
        image_size=list(options.image_size),
        junk=0,
        distractors=0,
        seed=options.seed,
    )
    resume = (config.run / "config.yaml").exists()
    metrics = train(config, resume=resume, drawn=True).metrics
    last = options.out / "checkpoints" / "last.pt"
    tqdm.write(f"start from it: dhcl train --weights {show(last)} ...")
    return metrics
