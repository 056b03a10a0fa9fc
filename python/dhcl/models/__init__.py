"""Re-ID models: backbones by name, pooling, BNNeck, batch norm over chunks or per camera."""

from dhcl.models.backbones import backbone_names
from dhcl.models.model import POOLINGS, ReIDModel, build_model
from dhcl.models.norm import (
    MIN_IMAGES,
    CameraBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    calibrate,
    using_cameras,
)
from dhcl.models.weights import LoadReport, UnavailableWeights

__all__ = [
    "MIN_IMAGES",
    "POOLINGS",
    "CameraBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "LoadReport",
    "ReIDModel",
    "UnavailableWeights",
    "backbone_names",
    "build_model",
    "calibrate",
    "using_cameras",
]
