"""How good a model is, with and without re-ranking, and how good its pseudo-labels are.

The only module of training that looks at identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dhcl.data import EvalImages, ReIDData
from dhcl.data.tracks import Tracklets
from dhcl.metrics import RANKS, agreement, by_name, cameras_apart
from dhcl.models import ReIDModel
from dhcl.training.engine import Engine
from dhcl.training.memory import is_sharded
from dhcl_ops import RankingMetrics, evaluate_ranking, rerank, sharded

if TYPE_CHECKING:
    from dhcl.training.trainer import Trainer

__all__ = ["WITHIN_CAMERA", "Evaluator", "IdentityObserver"]

WITHIN_CAMERA = (
    "no query has a right match in another camera, so those in its own camera count; such figures "
    "are higher than those across cameras and can't be compared with published ones"
)
"""What is said of an evaluation where :attr:`dhcl.data.ReIDData.across_cameras` is false."""


class Evaluator:
    """Evaluates models on the query and gallery of a data set.

    Args:
        engine: processes and device.
        data: with identities in query and gallery; how they are compared, its ``compared`` says.
            Where both have tracklets, each counts as one, as in MARS (Zheng et al., ECCV 2016).
        model: tells how images are normalised.
        same_cameras: the cameras are those the model was trained on. Otherwise statistics per
            camera, where the model has them, are not used; ranking always goes by the cameras.
        ranks: the k of which CMC(k) is given.
        ap: as of :func:`dhcl_ops.evaluate_ranking`.

    Attributes:
        sharded: whether each process has features of its own share of the gallery only, as
            ``memory_layout`` says for its number of images.
    """

    def __init__(
        self,
        engine: Engine,
        data: ReIDData,
        model: ReIDModel,
        *,
        same_cameras: bool = True,
        ranks: Sequence[int] = RANKS,
        ap: Literal["hits", "trapezoid"] = "hits",
    ) -> None:
        self._ranks, self._ap = ranks, ap
        self._engine, self._compared = engine, data.compared()
        self._tracklets = [Tracklets.of_list(images) for images in self._compared]
        pooled = all(self._tracklets)
        self.sharded = not pooled and is_sharded(engine, len(data.gallery))
        self._sets: list[EvalImages] = []
        for images in (data.query, data.gallery):
            shown = images
            if not same_cameras:
                shown = type(images)(images.paths, images.ids, np.full(len(images), -1))
            self._sets.append(engine.images(shown, model))

    def __call__(self, model: ReIDModel, *, reranked: bool = False) -> dict[str, Any]:
        """``mAP``, ``mINP``, ``rank1``, ``rank5``, ``rank10`` in [0, 1] and ``queries``.

        With ``reranked`` there is a dictionary of the same under ``"reranked"``. To be called on
        every process; the first one alone gets metrics.
        """
        return self.metrics(*self.features(model), reranked=reranked)

    def features(self, model: ReIDModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Of query (Q, d) and gallery (G, d), float32 of unit length, on every process.

        Where the gallery is :attr:`sharded`, of its rows those of this process alone.
        """
        query = self._engine.extract(model, self._sets[0], "query")
        extract = self._engine.extract_own if self.sharded else self._engine.extract
        return query, extract(model, self._sets[1], "gallery")

    def metrics(
        self, query: torch.Tensor, gallery: torch.Tensor, *, reranked: bool = False
    ) -> dict[str, Any]:
        """Those of :meth:`__call__`, from features."""
        if self.sharded:
            return self._over_processes(query, gallery, reranked)
        if not self._engine.is_main:
            return {}
        query, gallery = self._pooled(query, gallery)
        metrics: dict[str, Any] = by_name(self._rank((query, gallery)), self._ranks)
        if reranked:
            try:
                ranking = self._rank(rerank(query, gallery))
                metrics["reranked"] = by_name(ranking, self._ranks)
            except MemoryError as error:
                self._engine.say(f"warning: no re-ranking, {error}")
        return metrics

    def _over_processes(
        self, query: torch.Tensor, gallery: torch.Tensor, reranked: bool
    ) -> dict[str, Any]:
        queries, images = self._compared
        part = self._engine.share(len(images))
        own = slice(part.start, part.stop)
        ids = torch.from_numpy(queries.ids), torch.from_numpy(images.ids[own])
        cameras = cameras_apart(queries.cameras, images.cameras[own])

        def rank(what: Any) -> dict[str, Any]:
            options: dict[str, Any] = {"ap": self._ap, "max_rank": max(self._ranks)}
            ranking = sharded.evaluate_ranking(what, *ids, *cameras, **options)
            return by_name(ranking, self._ranks)

        metrics = rank((query, gallery))
        if reranked:
            try:
                metrics["reranked"] = rank(sharded.rerank(query, gallery))
            except MemoryError as error:
                self._engine.say(f"warning: no re-ranking, {error}")
        return metrics if self._engine.is_main else {}

    def _pooled(
        self, query: torch.Tensor, gallery: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A row per tracklet where both sides have them, else those given, a row per image."""
        one, other = self._tracklets
        return (one.pool(query), other.pool(gallery)) if one and other else (query, gallery)

    def _rank(self, what: Any) -> RankingMetrics:
        query, gallery = self._tracklets if all(self._tracklets) else self._compared
        assert query is not None
        assert gallery is not None
        cameras = cameras_apart(query.cameras, gallery.cameras)
        ids = torch.from_numpy(query.ids), torch.from_numpy(gallery.ids)
        return evaluate_ranking(what, *ids, *cameras, ap=self._ap, max_rank=max(self._ranks))


class IdentityObserver:
    """Looks at a training for the log. What it sees goes nowhere else."""

    def __init__(self, data: ReIDData, evaluator: Evaluator | None) -> None:
        self._ids = data.train.ids
        self._evaluator = evaluator

    def clustering(self, labels: torch.Tensor) -> dict[str, float]:
        """Adjusted Rand index and normalised mutual information of pseudo-labels (N,).

        Un-clustered images count as clusters of one; images without a known identity do not count.
        """
        scores = agreement(self._ids, labels)
        return {name: scores[name] for name in ("ari", "nmi") if name in scores}

    def ranking(self, trainer: Trainer) -> dict[str, float]:
        """Metrics of the model as it is; empty without identities to test on."""
        return self._evaluator(trainer.model) if self._evaluator else {}
