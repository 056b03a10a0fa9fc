"""What a finished model leaves for other programs: features, ONNX, plain weights."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dhcl.config import ConfigError
from dhcl.data import image_files, path_reader
from dhcl.data.folders import check_matched
from dhcl.files import write_atomic
from dhcl.inference.reid import OnBad, ReID
from dhcl.inference.writing import feature_writer
from dhcl.models import MIN_IMAGES, CameraBatchNorm, ReIDModel
from dhcl.models.norms import FollowedBatchNorm
from dhcl.models.tensors import safetensors_bytes
from dhcl.words import first_line

__all__ = ["export_features", "export_onnx", "export_weights", "plain_model"]

# Largest difference of a feature, of length 1, between torch and onnxruntime.
_TOLERANCE = 1e-4
_PROVIDERS = ["CPUExecutionProvider"]


def export_features(
    model: ReID,
    folder: Path,
    out: Path,
    *,
    pattern: str | None = None,
    trained_cameras: bool = False,
    batch_size: int = 128,
    workers: int = 0,
    on_bad: OnBad = "refuse",
    progress: bool = False,
) -> tuple[int, list[str]]:
    """Write the features of all images below a folder to ``.npz`` or ``.parquet``.

    Paths are relative to the folder. With a pattern there are identities and cameras too, under
    the numbers or names that the paths have; -1, or no text, is unknown. Memory does not grow with
    the features; ``on_bad`` and the like are as of :meth:`dhcl.ReID.features`.

    Args:
        model: extracts the features.
        folder: searched on all levels.
        out: file, see :func:`dhcl.inference.writing.feature_writer`; whole, or not written at all.
        pattern: as of :func:`dhcl.data.load_data`.
        trained_cameras: the cameras are those of the training; their statistics are used.
        batch_size, workers, on_bad, progress: as of :meth:`dhcl.ReID.features`.

    Returns:
        The number of rows, and a line for each image that was left out.

    Raises:
        DataError: no images, or bad ones. FeatureError: another kind of file.
    """
    paths = image_files(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    known = [path_reader(pattern)(name) for name in names]
    check_matched(pattern, names, known)
    cameras = model.camera_indices([camera for _, camera in known]) if trained_cameras else None
    bad: list[tuple[int, str]] = []
    rows = 0
    with feature_writer(out, model.dim, model.id) as writer:
        batches = model.batches(
            paths,
            cameras,
            batch_size=batch_size,
            workers=workers,
            on_bad=on_bad,
            bad=bad,
            progress=progress,
        )
        for batch in batches:
            rows += len(batch.indices)
            ids = [known[i][0] for i in batch.indices] if pattern else None
            seen = [known[i][1] for i in batch.indices] if pattern else None
            writer.append(batch.features, [names[i] for i in batch.indices], ids, seen)
    return rows, [f"{names[index]}: {reason}" for index, reason in sorted(bad)]


# ---- plain networks -----------------------------------------------------------------------------


def plain_model(model: ReIDModel, camera: int | None = None) -> ReIDModel:
    """A copy in evaluation mode, on the CPU, with ordinary batch norms alone.

    Args:
        model: is left as it is.
        camera: whose statistics it gets, an index from 0; by default those of all cameras, as for
            images of an unseen one.

    Raises:
        ConfigError: the model has no statistics of that camera.
    """
    if camera is not None and not 0 <= camera < model.num_cameras:
        there = f"0 to {model.num_cameras - 1}" if model.num_cameras else "none, without camera_bn"
        raise ConfigError(f"camera: the model has statistics of cameras {there} (got {camera})")
    plain: ReIDModel = copy.deepcopy(model).cpu().eval()
    _make_plain(plain, camera)
    plain.num_cameras = 0
    return plain


class _PlainBatchNorm(FollowedBatchNorm):
    """Batch norm of (B, F) and of (B, F, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.followed(super().forward(input))

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def _make_plain(module: nn.Module, camera: int | None) -> None:
    for name, child in module.named_children():
        if isinstance(child, CameraBatchNorm):
            setattr(module, name, _plain_norm(child, camera))
        else:
            _make_plain(child, camera)


def _plain_norm(norm: CameraBatchNorm, camera: int | None) -> _BatchNorm:
    plain = _PlainBatchNorm(norm.num_features, norm.eps)
    plain.weight, plain.bias = norm.weight, norm.bias
    plain.follow_as(norm)
    mean, var = norm.running_mean, norm.running_var
    if camera is not None:
        images = int(norm.camera_images[camera])
        if images < MIN_IMAGES:
            raise ConfigError(
                f"camera: statistics must rest on at least {MIN_IMAGES} images (those of camera "
                f"{camera} rest on {images})"
            )
        mean, var = norm.camera_mean[camera], norm.camera_var[camera]
    plain.running_mean, plain.running_var = mean, var
    return plain.eval()


def export_weights(model: ReID, out: Path, *, camera: int | None = None) -> dict[str, torch.Size]:
    """Write a plain state dict of floating tensors, as safetensors or by ``torch.save``.

    Names begin with ``backbone.``, ``neck.`` or ``pool.``. What follows ``backbone.`` is what
    torchvision or timm call it, so that it loads into their network; that of torchvision's residual
    networks has no ``fc``, and the model uses it with stride 1 in ``layer4.0``. Then come pooling
    (``pool.power``, the exponent of GeM, where there is one), batch norm (``neck.``) and division
    by the length.

    Args:
        model: whose weights.
        out: file, of safetensors if its name ends so; whole, or not written at all.
        camera: as of :func:`plain_model`.

    Returns:
        The shapes, by name.
    """
    state = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in plain_model(model.model, camera).state_dict().items()
        if tensor.is_floating_point()
    }
    if out.suffix.lower() == ".safetensors":
        write_atomic(out, safetensors_bytes(state))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(out, buffer.getbuffer())
    return {name: tensor.shape for name, tensor in state.items()}


# ---- ONNX ---------------------------------------------------------------------------------------


class _FromUnitImages(nn.Module):
    """The model with its normalisation: images in [0, 1] to features."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: ReIDModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model((images - self.mean) / self.std)
        return features


def export_onnx(model: ReID, out: Path, *, camera: int | None = None) -> float:
    """Write the model as ONNX, one file, and check it with onnxruntime before it gets its name.

    Input ``images`` (batch, 3, H, W) float32: RGB in [0, 1], resized to the model's size. The
    graph normalises them. Output ``features`` (batch, d) float32, rows of length 1. The batch may
    have any size. The file's metadata has the model's fingerprint (``dhcl.model``).

    Args:
        model: the model.
        out: file; whole and checked, or not written at all.
        camera: as of :func:`plain_model`.

    Returns:
        The largest difference to torch's features, of batches of 1 and 3.

    Raises:
        ConfigError: the extra ``export`` is not installed; the network can't be exported, or the
            result differs by more than 1e-4.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"onnx: needs {error.name}: pip install 'dhcl[export]'") from error
    network = _FromUnitImages(plain_model(model.model, camera)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *model.image_size, generator=generator)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                input_names=["images"],
                output_names=["features"],
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props["dhcl.model"] = model.id
        data = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter has many of its own
        raise ConfigError(
            f"onnx: {model.config.model.backbone} can't be exported "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    worst = _difference(onnxruntime.InferenceSession(data, providers=_PROVIDERS), network, images)
    if not worst <= _TOLERANCE:
        raise ConfigError(
            f"onnx: onnxruntime's features must equal torch's to {_TOLERANCE:g} (got a difference "
            f"of {worst:g}); nothing is written"
        )
    write_atomic(out, data)
    return worst


def _difference(session: Any, network: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of features between onnxruntime and torch, of one image and of all."""
    worst = 0.0
    for batch in (images[:1], images):
        with torch.no_grad():
            expected = network(batch).numpy()
        [got] = session.run(None, {"images": batch.numpy()})
        difference = np.abs(got - expected).max() if got.shape == expected.shape else np.inf
        worst = max(worst, float(difference))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about itself."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
