"""Data sets on disk, images as tensors, and the sampler of training batches."""

from dhcl.data.datasets import (
    DATASETS,
    ImageList,
    ReIDData,
    image_files,
    load_data,
    path_reader,
    training_cameras,
)
from dhcl.data.images import (
    BadImage,
    EvalImages,
    ImageReport,
    TrainImages,
    check_images,
    eval_loader,
    eval_transform,
    read_image,
    train_loader,
    train_transform,
)
from dhcl.data.sampler import PKSampler
from dhcl.errors import DataError

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
    "train_loader",
    "train_transform",
    "training_cameras",
]
