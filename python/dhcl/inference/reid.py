"""A trained model to use: features of any images, search and clustering with them."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from dhcl.config import RUN_FILE, TrainConfig, read_run
from dhcl.data import eval_loader, eval_transform, training_cameras
from dhcl.data.datasets import camera_reader
from dhcl.data.lists import identifier
from dhcl.errors import CheckpointError, ConfigError, DataError, as_path
from dhcl.inference.card import model_card
from dhcl.inference.features import common_numbers, unit_rows
from dhcl.inference.hub import (
    CONFIG_FILE,
    Description,
    find_folder,
    is_model_folder,
    read_folder,
    write_folder,
)
from dhcl.inference.images import (
    Images,
    Source,
    as_images,
    bad_images,
    has_no_pixels,
    list_of_bad,
    missing_files,
)
from dhcl.inference.search import Found, search
from dhcl.models import ReIDModel
from dhcl.training.network import read_model, restored
from dhcl.training.record import measured
from dhcl.words import show
from dhcl_ops import Clustering, __version__, cluster
from dhcl_ops.defaults import ZHONG

__all__ = ["Batch", "OnBad", "ReID", "clustering_options"]

OnBad: TypeAlias = Literal["refuse", "skip"]

# Part of the fingerprint: to be changed with what eval_transform does to pixels.
_PREPROCESSING = "decoded RGB, EXIF upright, bicubic antialiased resize of uint8, 1"


@dataclass(frozen=True)
class Batch:
    """Features (n, d) float32 on the CPU, and which n of the images they are of, ascending."""

    indices: list[int]
    features: torch.Tensor


class ReID:
    """A trained model: images to features of unit length, by which equal people are near.

    Example::

        model = ReID.load("runs/market1501-dhcl-seed0")
        found = model.search("query.jpg", "gallery/", topk=5)

    Attributes:
        dim: d, features per image.
        image_size: (height, width) in pixels to which images are resized.
        num_cameras: cameras with statistics of their own (``camera_bn``), 0 for none.
        device: where the model computes.
        run: folder it was loaded from.
        which: ``last`` or ``best``.
        config: the run's options.
        model: the network, in evaluation mode.
    """

    def __init__(
        self,
        model: ReIDModel,
        config: TrainConfig,
        run: Path,
        which: str = "last",
        device: str | torch.device = "cpu",
        *,
        told: Description | None = None,
    ) -> None:
        self.config, self.run, self.which, self._told = config, run, which, told
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.dim, self.num_cameras = model.dim, model.num_cameras
        self.image_size = config.model.image_size
        self._transform = eval_transform(self.image_size, model.mean, model.std)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls,
        run: str | os.PathLike[str],
        which: Literal["last", "best"] = "last",
        device: str | torch.device = "auto",
    ) -> ReID:
        """Load the model of a run.

        Args:
            run: its folder, or one that :meth:`save_pretrained` wrote.
            which: the last epoch's model, or the one that looked best by test mAP; a folder of
                :meth:`save_pretrained` holds one model alone.
            device: ``auto`` takes a GPU where there is one; else any device of torch.

        Raises:
            ConfigError: no such folder, not a run, or no checkpoint in it yet.
            CheckpointError: the checkpoint can't be read.
        """
        folder = as_path("run", run)
        if not (folder / RUN_FILE).exists() and is_model_folder(folder):
            return cls.from_pretrained(folder, device=device)
        config = read_run(folder)
        if which not in ("last", "best"):
            raise ConfigError(f"which: must be 'last' or 'best' (got {which!r})")
        checkpoints = folder / "checkpoints"
        if not (checkpoints / f"{which}.pt").is_file():
            others = sorted(file.stem for file in checkpoints.glob("*.pt") if file.is_file())
            advice = (
                f"it has {' and '.join(others)}"
                if others
                else f"it stopped before its first one; dhcl train --resume {show(folder)} goes on"
            )
            raise ConfigError(f"run: {show(folder)} has no checkpoint '{which}'; {advice}")
        place = _usable(device)
        return cls(read_model(config.model, folder, which), config, folder, which, place)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> ReID:
        """Load a model that :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        A folder is read without a network, wherever it lies now; so is a repository that is in the
        cache of huggingface_hub. The weights are safetensors: no code in them is run.

        Args:
            name: a folder; else the name of a repository, ``owner/name``.
            device: as of :meth:`load`.
            revision, cache_dir, local_files_only, token: as of
                ``huggingface_hub.snapshot_download``.

        Raises:
            ConfigError: no such folder, or not one of a dhcl model.
            CheckpointError: weights that can't be read, or are of another model than
                ``config.json``.
            UnavailableWeights: the repository is neither in the cache nor to be downloaded.
        """
        place = _usable(device)
        folder = find_folder(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        state, told = read_folder(folder)
        try:
            model = restored(told.config.model, state)
        except RuntimeError as error:
            raise CheckpointError(
                f"model: the weights in {show(folder)} are not those that {CONFIG_FILE} describes "
                f"({error})"
            ) from error
        reid = cls(model, told.config, folder, told.which, place, told=told)
        if reid.id != told.fingerprint:
            raise CheckpointError(
                f"model: the weights in {show(folder)} are not those that {CONFIG_FILE} describes "
                f"(fingerprint {reid.id[:12]}, expected {told.fingerprint[:12]}); save the model "
                "anew"
            )
        return reid

    def save_pretrained(self, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
        """Write the model to a folder that can be moved, sent, or uploaded to the Hugging Face hub.

        It holds ``model.safetensors``, ``config.json``, and a card ``README.md`` with what was
        measured of the model. Nothing in them names a place on this machine. A new folder is whole
        or not there; in one that is there, other files and a card of your own stay.

        Args:
            folder: where to.
            name: of the model, in the card; by default the folder's.

        Returns:
            The folder.

        Raises:
            ConfigError: a file in place of the folder, or a model of another library in it.
        """
        out = Path(folder).expanduser()
        model = self.model
        about = {
            "backbone": self.config.model.backbone,
            "dim": self.dim,
            "image_size": list(self.image_size),
            "mean": list(model.mean),
            "std": list(model.std),
        }
        told = Description(
            config=self.config,
            which=self.which,
            fingerprint=self.id,
            num_cameras=self.num_cameras,
            cameras=self._camera_names(),
            metrics=self.metrics,
            version=__version__,
            about=about,
        )
        write_folder(out, model.state_dict(), told, model_card(name or out.resolve().name, told))
        return out

    def _camera_table(self) -> dict[int | str, int]:
        """Index of each of the training's cameras, as its paths name it."""
        if self._told is None:
            data = self.config.data
            return training_cameras(data.data, data.root or Path(), data.pattern)
        names = self._told.cameras
        if names is None:
            file = self.run / CONFIG_FILE
            raise DataError(f"cameras: {show(file)} does not say those of the training")
        return {name: index for index, name in enumerate(names) if name != -1}

    def _camera_names(self) -> tuple[int | str, ...] | None:
        """Names of the cameras with statistics of their own, by index; None if not known."""
        try:
            table = self._camera_table()
        except DataError:
            return None
        names = {index: name for name, index in table.items() if index < self.num_cameras}
        return tuple(names.get(index, -1) for index in range(self.num_cameras))

    def __repr__(self) -> str:
        return f"ReID({self.model.description}; {show(self.run)}, {self.which}, {self.id[:12]})"

    @functools.cached_property
    def id(self) -> str:
        """Fingerprint of everything features depend on: SHA-256 of weights and preprocessing."""
        digest = hashlib.sha256()
        model = self.model
        # The None was an option once; without it, indexes would not know their model any more.
        about = (_PREPROCESSING, self.config.model.backbone, None, self.image_size)
        digest.update(repr((*about, tuple(model.mean), tuple(model.std))).encode())
        if self.config.model.backbone.startswith("timm:"):
            # timm's networks are made finer after they are built, which no tensor shows.
            steps = [getattr(module, "stride", None) for module in model.backbone.modules()]
            digest.update(repr(steps).encode())
        for name, tensor in sorted(model.state_dict().items()):
            if name.endswith("num_batches_tracked"):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """What the training measured of this very model, as in ``metrics.json``; may be empty."""
        return measured(self.run, self.which) if self._told is None else dict(self._told.metrics)

    def camera_indices(self, names: Sequence[int | str]) -> list[int]:
        """Indices, as :meth:`features` takes them, of cameras as training paths name them.

        -1 for a camera that training did not see. For a run on a folder, that folder must still be
        there.

        Raises:
            DataError: the cameras of the training are unknown.
        """
        try:
            table = self._camera_table()
        except DataError as error:
            file = self.run / RUN_FILE
            hint = f"; root in {show(file)} says where the training's images are"
            raise DataError(f"{error}{hint if file.exists() else ''}") from error
        return [table.get(identifier(str(name)), -1) for name in names]

    # ---- features ----

    def features(
        self,
        images: Images,
        cameras: Sequence[int] | torch.Tensor | None = None,
        *,
        batch_size: int = 128,
        workers: int = 0,
        on_bad: OnBad = "refuse",
        progress: bool = False,
    ) -> Any:
        """Features of images.

        Args:
            images: a folder (all images on all levels, in sorted order), a file, a sequence or
                generator of files, PIL images or uint8 (H, W, 3) RGB arrays or tensors, or one
                (N, H, W, 3) array or tensor; of any strides, and also none at all.
            cameras: (N,) indices from 0 of the training's cameras, for models with statistics per
                camera; -1 is an unknown one. By default all are unknown. Other models do not look.
            batch_size: images at a time.
            workers: processes that load images; 0 loads in this one.
            on_bad: ``refuse`` raises if an image is missing, damaged or a crop without pixels, as
                a detector's box outside of its frame makes one; ``skip`` leaves it out.
            progress: show a progress line, where someone looks at it.

        Returns:
            (N, d) float32 on the CPU, rows of length 1. With ``on_bad="skip"`` a pair: features
            (n, d), and (n,) int64, which of the images they are of.

        Raises:
            DataError: a folder without images, or bad ones, and with ``skip`` nothing but files
                that can't be read; files that are not there are all found before the first one is
                opened.
            TypeError, ValueError: something else than images.
        """
        listed = as_images(images)
        out = torch.empty(len(listed), self.dim)
        kept: list[int] = []
        batches = self.batches(
            listed,
            cameras,
            batch_size=batch_size,
            workers=workers,
            on_bad=on_bad,
            progress=progress,
        )
        for batch in batches:
            out[len(kept) : len(kept) + len(batch.indices)] = batch.features
            kept += batch.indices
        if on_bad == "refuse":
            return out
        return out[: len(kept)], torch.tensor(kept, dtype=torch.int64)

    def batches(
        self,
        images: Sequence[Any],
        cameras: Sequence[int] | torch.Tensor | None = None,
        *,
        batch_size: int = 128,
        workers: int = 0,
        on_bad: OnBad = "refuse",
        bad: list[tuple[int, str]] | None = None,
        progress: bool = False,
    ) -> Iterator[Batch]:
        """Features batch by batch, so that memory does not grow with the number of images.

        Args:
            images: as :func:`as_images` gives them.
            cameras, batch_size, workers, on_bad, progress: as in :meth:`features`.
            bad: gets (index, reason) of each image that is left out.

        Raises:
            DataError: as :meth:`features`. ValueError: an argument out of range.
        """
        if on_bad not in ("refuse", "skip"):
            raise ValueError(f"on_bad: must be 'refuse' or 'skip' (got {on_bad!r})")
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1 (got {batch_size})")
        if workers < 0:
            raise ValueError(f"workers: must be at least 0 (got {workers})")
        numbers = self._cameras(cameras, len(images))
        left_out = [] if bad is None else bad
        left_out += missing_files(images)
        if left_out and on_bad == "refuse":
            raise bad_images(images, left_out)
        return self._batches(
            images, numbers, batch_size, workers, on_bad == "refuse", left_out, progress
        )

    @torch.no_grad()
    def _batches(
        self,
        images: Sequence[Any],
        cameras: torch.Tensor | None,
        batch_size: int,
        workers: int,
        refuse: bool,
        bad: list[tuple[int, str]],
        progress: bool,
    ) -> Iterator[Batch]:
        known_bad = {index for index, _ in bad}
        source = Source(images, self._transform, self.image_size, known_bad)
        count = math.ceil(len(images) / batch_size)
        loader = eval_loader(
            source,
            batch_size=batch_size,
            workers=min(workers, count) if count > 1 else 0,
            pin_memory=self.device.type == "cuda",
        )
        bar = tqdm(
            desc="features", total=len(images), unit="image", leave=False,
            disable=None if progress else True,
        )  # fmt: skip
        seen = 0
        with bar:
            for pixels, indices, reasons in loader:
                new = [
                    (index, reason)
                    for index, reason in zip(indices.tolist(), reasons, strict=True)
                    if reason and index not in known_bad
                ]
                if new and refuse:
                    raise bad_images(images, new)
                bad += new
                good = torch.tensor([not reason for reason in reasons])
                if good.any():
                    kept = indices[good]
                    these = None if cameras is None else cameras[kept].to(self.device)
                    inputs = (pixels if good.all() else pixels[good]).to(self.device)
                    yield Batch(kept.tolist(), self.model(inputs, these).cpu())
                seen += len(reasons)
                bar.update(len(reasons))
        # Of a frame all crops may lie outside; of a folder something can be read, or it is wrong.
        if seen and len(bad) == seen and not all(has_no_pixels(images[index]) for index, _ in bad):
            raise DataError(f"images: none of {seen:,} can be read\n{list_of_bad(images, bad)}")

    def _cameras(
        self, cameras: Sequence[int] | torch.Tensor | None, images: int
    ) -> torch.Tensor | None:
        if cameras is None:
            return None
        if not images and not len(cameras):  # an empty list makes no whole numbers
            return None
        numbers = torch.as_tensor(_plain(cameras))
        if numbers.shape != (images,) or numbers.is_floating_point():
            raise ValueError(
                f"cameras: must be {images} whole numbers, one per image (got shape "
                f"{tuple(numbers.shape)}, {numbers.dtype})"
            )
        return numbers.long()

    # ---- what to do with them ----

    def search(
        self,
        query: Images | torch.Tensor,
        gallery: Images | torch.Tensor,
        topk: int = 20,
        rerank: bool = False,
        *,
        k1: int = ZHONG.k1,
        k2: int = ZHONG.k2,
        lambda_value: float = ZHONG.lambda_value,
    ) -> Found:
        """Rank a gallery for each query.

        Args:
            query, gallery: images as :meth:`features` takes them, or features (N, d).
            topk: how many of the gallery for each query; of a smaller gallery all.
            rerank: order by k-reciprocal re-ranking (:func:`dhcl_ops.rerank`), which compares
                queries and gallery with each other; it takes the queries together, as evaluation
                does.
            k1, k2, lambda_value: of the re-ranking.

        Returns:
            :class:`Found`.

        Raises:
            DataError: images, as :meth:`features`.
            ValueError: features of another width or not finite; a number out of range.
        """
        if topk < 1:
            raise ValueError(f"topk: must be at least 1 (got {topk})")
        rows, columns = self._rows("query", query), self._rows("gallery", gallery)
        return search(rows, columns, topk, rerank, k1=k1, k2=k2, lambda_value=lambda_value)

    def cluster(
        self,
        images_or_features: Images | torch.Tensor,
        *,
        k1: int | None = None,
        k2: int | None = None,
        eps: float | None = None,
        min_samples: int | None = None,
        k1_own: int | None = None,
        self_paced: bool | None = None,
        cameras: Sequence[int | str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Clustering:
        """Pseudo-labels of images, as in training: Jaccard distance and DBSCAN.

        Args:
            images_or_features: images as :meth:`features` takes them, or features (N, d).
            k1, k2, eps, min_samples: of :func:`dhcl_ops.cluster`; by default the run's own.
            k1_own: how many of the k1 neighbours are of the image's own camera, 0 for any; by
                default the run's own.
            self_paced: keep independent and compact clusters only; by default as the run did. The
                limit of independence is that of these images.
            cameras: (N,) whose image each is, whole numbers or texts, -1 unknown. By default they
                are read off the paths of files as the run's training read them.
            progress: as of :func:`dhcl_ops.cluster`.

        Returns:
            :class:`dhcl_ops.Clustering`; ``labels`` (N,) int64, -1 for images in no cluster. Where
            identities are known, :func:`dhcl.metrics.agreement` says how well they agree.

        Raises:
            DataError: images, as :meth:`features`. ValueError: a number out of range, cameras of
                another length, or no two known ones for a ``k1_own`` that was given.

        Warns:
            UserWarning: no two cameras are known for the ``k1_own`` of the run; it is left out.
        """
        given = {
            "k1": k1, "k2": k2, "eps": eps, "min_samples": min_samples,
            "k1_own": k1_own, "self_paced": self_paced,
        }  # fmt: skip
        numbers = clustering_options(self.config)
        numbers |= {name: value for name, value in given.items() if value is not None}
        listed = images_or_features
        if not isinstance(listed, (torch.Tensor, np.ndarray)):
            listed = as_images(listed)
        features = self._rows("images_or_features", listed)
        if not numbers["k1_own"]:
            return cluster(features, **numbers, progress=progress)
        if cameras is None:
            cameras = self._cameras_of(images_or_features, listed)
        [whose] = common_numbers(np.array(list(cameras), dtype=object))
        if len(whose) != len(features):
            raise ValueError(f"cameras: must be {len(features)}, one per image (got {len(whose)})")
        if len(whose[whose >= 0].unique()) < 2:
            text = f"k1_own: two cameras at least must be known (got k1_own {numbers['k1_own']})"
            if k1_own is not None:
                raise ValueError(text)
            numbers["k1_own"] = 0
            warnings.warn(f"{text}; neighbours are taken from all images alike", stacklevel=2)
        return cluster(features, **numbers, cameras=whose, progress=progress)

    def _cameras_of(self, given: Images, images: Any) -> list[int | str]:
        """The camera of each image by its path, below the folder where one was given."""
        data = self.config.data
        read = camera_reader(data.data, data.pattern)
        root = Path(given).expanduser() if isinstance(given, (str, os.PathLike)) else Path()
        return [
            read(Path(os.path.relpath(image, root) if root.is_dir() else image).as_posix())
            if isinstance(image, (str, os.PathLike))
            else -1
            for image in images
        ]

    def _rows(self, name: str, given: Any) -> torch.Tensor:
        """Features of images, or the features given, checked and of length 1."""
        if not isinstance(given, (torch.Tensor, np.ndarray)):
            features: torch.Tensor = self.features(given)
            return features
        values = torch.as_tensor(_plain(given))
        if values.dtype == torch.uint8:
            features = self.features(values)
            return features
        if values.dim() != 2 or values.shape[1] != self.dim or not values.is_floating_point():
            raise ValueError(
                f"{name}: must be images, or features (N, {self.dim}) floating "
                f"(got {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')})"
            )
        unit, wrong = unit_rows(values.detach().float().cpu())
        if len(wrong):
            raise ValueError(f"{name}: rows must be finite and not 0 (got row {int(wrong[0])})")
        return unit


def clustering_options(config: TrainConfig) -> dict[str, Any]:
    """Of :func:`dhcl_ops.cluster`, as a run's training clusters."""
    names = ("k1", "k2", "eps", "min_samples", "k1_own", "self_paced")
    return {name: getattr(config.labels, name) for name in names}


def _usable(device: str | torch.device) -> torch.device:
    """The device, where ``auto`` is a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: torch sees no GPU (got {device})")
    return torch.device(device)


def _plain(values: Any) -> Any:
    """A copy of an array as torch takes it: no negative steps, this machine's order of bytes."""
    if not isinstance(values, np.ndarray):
        return values
    return np.array(values, values.dtype.newbyteorder("="), order="C")
