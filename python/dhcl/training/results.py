"""What a run leaves to look at: its record, its images, and features that its model gives them.

Whoever reports on runs takes these as they are and needs neither a model nor a device. Every part
that can't be had leaves its reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dhcl.config import ConfigError, TrainConfig
from dhcl.data import DataError, ImageList, ReIDData, check_images
from dhcl.models import ReIDModel
from dhcl.training.checkpoint import CheckpointError
from dhcl.training.engine import Engine
from dhcl.training.evaluation import Evaluator
from dhcl.training.network import read_model
from dhcl.training.record import Record, read_record
from dhcl.training.runs import Trained, find_data
from dhcl.training.trainer import fingerprint
from dhcl.words import show

__all__ = ["Points", "Results", "collect", "members", "results_of", "sample_clusters"]

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Points:
    """Features of some training images, to be laid out as a map.

    Attributes:
        images: (n,) their numbers.
        features: (n, d) float32.
        extracted: by the model; else they are rows of the memory bank.
    """

    images: Integers
    features: NDArray[np.float32]
    extracted: bool


@dataclass
class Results:
    """A run's record with its images and features.

    Attributes:
        record: its files.
        data: its data set, without test images that can't be read; None if it can't be opened.
        trained_on: the training images that the pseudo-labels are of, None if they are not there.
        features: of query (Q, d) and gallery (G, d), float32 of unit length.
        points: of the map.
        missing: what is not there, with the reason.
    """

    record: Record
    data: ReIDData | None = None
    trained_on: ImageList | None = None
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    points: Points | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missing = {**self.record.missing, **self.missing}


def results_of(trained: Trained) -> Results:
    """The results of a training that has just ended; what it has in memory is not made again."""
    return collect(
        read_record(trained.config.run),
        data=trained.data,
        engine=trained.engine,
        features=trained.features,
    )


def collect(
    record: Record,
    *,
    data: ReIDData | None = None,
    engine: Engine | None = None,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
    points: int = 1500,
) -> Results:
    """Open the data set of a run, and extract the features that are to be looked at.

    Args:
        record: the run's files; ``record.config.data.root`` says where the images lie.
        data: its data set, if it is open already.
        engine: of the training, if that has just ended.
        features: of query and gallery (Q, d) and (G, d), if they are there already.
        points: training images of the map, at most; 0 if there is to be none.
    """
    found = Results(record, data, features=features)
    if record.labels is None:
        found.missing["clusters"] = found.missing["map"] = record.missing["checkpoint"]
    if record.config is None:
        why = record.missing["configuration"]
        found.missing.update(dict.fromkeys(("images", "clusters", "retrieval", "map"), why))
        return found
    if data is None:
        found.data = _open(record.config, found.missing)
    if found.data is not None:
        found.trained_on = _training_images(found, found.data, record.config)
    model = _Model(record, record.config, engine, found.missing)
    if points and found.trained_on is not None and record.labels is not None:
        found.points = _points(found, found.trained_on, record.labels, model, points)
    if found.data is not None and features is None:
        found.features = _test_features(found, found.data, model)
    return found


# ---- images -------------------------------------------------------------------------------------


def _open(config: TrainConfig, missing: dict[str, str]) -> ReIDData | None:
    """The data set, without test images that can't be read."""
    why = "the images are needed, and "
    try:
        data = find_data(config.data)
    except (ConfigError, DataError, OSError, ValueError) as error:
        why += f"they can't be opened: {error}"
        missing.update(dict.fromkeys(("images", "clusters", "retrieval", "map"), why))
        return None
    splits = {k: v for k, v in (("query", data.query), ("gallery", data.gallery)) if len(v)}
    if not splits:
        return data
    try:
        lists, report = check_images(splits, on_bad="skip", workers=max(config.data.workers, 2))
    except DataError as error:
        missing["retrieval"] = str(error)
        return data
    if report.bad:
        missing["test images"] = str(report)
    return dataclasses.replace(
        data, query=lists.get("query", data.query), gallery=lists.get("gallery", data.gallery)
    )


def _training_images(found: Results, data: ReIDData, config: TrainConfig) -> ImageList | None:
    """The images that the pseudo-labels are of, or None if these are not there any more."""
    record = found.record
    if record.images is None:
        return None
    images = data.train
    if fingerprint(images) != record.images and config.data.on_bad == "skip" and len(images):
        try:
            lists, _ = check_images({"train": images}, on_bad="skip", workers=2)
        except DataError:
            lists = {}
        images = lists.get("train", images)
    if fingerprint(images) == record.images:
        found.data = dataclasses.replace(data, train=images)
        return images
    labels = 0 if record.labels is None else len(record.labels)
    why = (
        f"the training images at {show(data.root)} are not those of the run, which had {labels:,} "
        f"(got {len(images):,}); names, cameras or number differ"
    )
    found.missing["clusters"] = found.missing["map"] = why
    return None


# ---- features -----------------------------------------------------------------------------------


class _Model:
    """The run's model, loaded when first needed."""

    def __init__(
        self,
        record: Record,
        config: TrainConfig,
        engine: Engine | None,
        missing: dict[str, str],
    ) -> None:
        self._record, self._config = record, config
        self._engine, self._missing = engine, missing
        self._model: ReIDModel | None = None

    def get(self, part: str) -> tuple[Engine, ReIDModel] | None:
        """Engine and model; without them, None and the reason under this name."""
        if "checkpoint" in self._record.missing:
            self._missing[part] = self._record.missing["checkpoint"]
            return None
        try:
            self._engine = self._engine or Engine(self._config)
            if self._engine.world_size > 1:
                self._missing[part] = (
                    "of several processes one alone can't extract features; `dhcl report` can"
                )
                return None
            if self._model is None:
                model = read_model(self._config.model, self._record.run)
                self._model = model.to(self._engine.device)
        except (ConfigError, CheckpointError, RuntimeError) as error:
            self._missing[part] = f"the model can't be loaded: {error}"
            return None
        return self._engine, self._model


def _test_features(
    found: Results, data: ReIDData, loaded: _Model
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Features of query and gallery as evaluation has them."""
    if not data.can_evaluate:
        none = not len(data.query) or not len(data.gallery)
        why = "no queries or no gallery" if none else "no identity of a query in the gallery"
        found.missing.setdefault("retrieval", f"the data set has {why}, so nothing to look up")
        return None
    parts = loaded.get("retrieval")
    if parts is None:
        return None
    engine, model = parts
    try:
        return Evaluator(engine, data, model).features(model)
    except (DataError, RuntimeError) as error:
        found.missing["retrieval"] = f"no features of the test images: {error}"
        return None


def _points(
    found: Results, images: ImageList, labels: Integers, loaded: _Model, count: int
) -> Points | None:
    """Rows of the bank, or features where it has a row per cluster: those would show no image."""
    chosen = sample_clusters(labels, count)
    if found.record.bank is not None:
        return Points(chosen, found.record.bank[chosen], extracted=False)
    parts = loaded.get("map")
    if parts is None:
        return None
    engine, model = parts
    try:
        shown = engine.images(images.select(chosen), model)
        features = engine.extract(model, shown, "features for the map").cpu().numpy()
    except (DataError, RuntimeError) as error:
        found.missing["map"] = f"no features of the training images: {error}"
        return None
    return Points(chosen, features, extracted=True)


def sample_clusters(labels: Integers, count: int) -> Integers:
    """Numbers of about ``count`` images of pseudo-labels (N,), -1 for outliers, in rising order.

    Whole clusters are drawn at random, and outliers in their share; the same ones every time.
    """
    if len(labels) <= count:
        return np.arange(len(labels))
    draw = np.random.default_rng(0)
    clusters = members(labels)
    alone = np.flatnonzero(labels < 0)
    outliers = round(count * len(alone) / len(labels))
    if outliers < len(alone):
        alone = np.sort(draw.choice(alone, outliers, replace=False))
    chosen: list[Integers] = []
    room = count - len(alone)
    for label in draw.permutation(len(clusters)):
        chosen.append(clusters[label][:room])
        room -= len(chosen[-1])
        if room <= 0:
            break
    return np.sort(np.concatenate([alone, *chosen]))


def members(labels: Integers) -> list[Integers]:
    """Numbers of the images of each cluster, rising, from pseudo-labels (N,), -1 for outliers."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    counts = np.bincount(labels[order])
    return [np.sort(part) for part in np.split(order, np.cumsum(counts)[:-1])] if len(order) else []
