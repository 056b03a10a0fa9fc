"""From a folder of images to batches: data sets on disk, decoding, transforms, sampling.

Names are imported when they are asked for: a list of images needs no torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dhcl.errors import DataError

if TYPE_CHECKING:
    from dhcl.data.datasets import load_data, training_cameras
    from dhcl.data.folders import image_files, path_reader, time_reader
    from dhcl.data.images import BadImage, ImageReport, check_images, read_image
    from dhcl.data.layouts import DATASETS
    from dhcl.data.lists import ImageList, ReIDData
    from dhcl.data.loading import EvalImages, TrainImages, eval_loader, train_loader
    from dhcl.data.sampler import PKSampler
    from dhcl.data.transforms import eval_transform, train_transform

__all__ = [
    "DATASETS",
    "BadImage",
    "DataError",
    "EvalImages",
    "ImageList",
    "ImageReport",
    "PKSampler",
    "ReIDData",
    "TrainImages",
    "check_images",
    "eval_loader",
    "eval_transform",
    "image_files",
    "load_data",
    "path_reader",
    "read_image",
    "time_reader",
    "train_loader",
    "train_transform",
    "training_cameras",
]

# From light to heavy, so that looking for a name imports nothing heavier than it needs.
_MODULES = ("lists", "layouts", "folders", "datasets", "sampler", "images", "transforms", "loading")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for each in _MODULES:
            module = importlib.import_module(f"{__name__}.{each}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
