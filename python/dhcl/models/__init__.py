"""Re-ID models: backbones by name, pooling, BNNeck, batch norm over chunks or per camera."""

from dhcl.errors import UnavailableWeights
from dhcl.models.backbones import backbone_names
from dhcl.models.conversion import calibrate
from dhcl.models.model import ReIDModel, build_model
from dhcl.models.neck import POOLINGS
from dhcl.models.norms import (
    MIN_IMAGES,
    CameraBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    using_cameras,
)
from dhcl.models.weights import LoadReport

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
