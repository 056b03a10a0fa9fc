"""The training loop: extract, remember, cluster, learn; and its state, so that it can go on.

Mathematics: method.md in docs. An epoch clusters the memory bank into pseudo-labels, then takes
steps with the hybrid loss over the bank, which each batch updates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from torch.utils.data import Subset

from dhcl.config import ConfigError, OptimiserOptions, TrainConfig, has_no_instance_loss
from dhcl.data import (
    ImageList,
    PKSampler,
    TrainImages,
    eval_loader,
    train_loader,
    train_transform,
)
from dhcl.data.tracks import Tracklets
from dhcl.errors import Diverged, Interrupted, NoClusters
from dhcl.models import ReIDModel, calibrate
from dhcl.training.checkpoint import (
    FORMAT,
    Progress,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from dhcl.training.engine import Engine
from dhcl.training.labels import PseudoLabels
from dhcl.training.logs import RunLog
from dhcl.training.memory import layout_of, remove_memories
from dhcl.training.steps import StepValues
from dhcl.training.trackers import Trackers
from dhcl.words import duration, first_line, show
from dhcl_ops import DHCLLoss, FalseNegatives, GraphedStep, HybridStats, prototypes

__all__ = ["Diverged", "NoClusters", "Observer", "Trainer", "fingerprint", "learning_rate"]

# Averages over an epoch's steps, in the order of the list in Trainer.step.
_AVERAGES = ("loss", "prototype_loss", "instance_loss", "clamped", "instance_clamped")
# Images that batch-norm statistics are computed from.
_CALIBRATION = 8192
# Steps between looks at their values. A look waits for the device, which then waits for the host.
_STEPS_UNSEEN = 32

WEIGHT_DECAY = 5e-4
"""Of Adam; it is added to the gradient."""
LR_FALL = 0.1
"""Factor by which the learning rate falls."""
PATIENCE = 5
"""Epochs on end without a cluster after which a run that drops outliers ends."""


class Observer(Protocol):
    """Someone who knows identities and looks at the training, without telling it anything."""

    def clustering(self, labels: torch.Tensor) -> dict[str, float]:
        """Compare pseudo-labels (N,) with identities."""

    def ranking(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate the model; called on every process."""


def learning_rate(options: OptimiserOptions, epoch: int) -> float:
    """The learning rate of an epoch, which falls to a tenth every ``lr_step`` epochs."""
    rate: float = options.lr * LR_FALL ** (epoch // options.lr_step)
    return rate


def fingerprint(images: ImageList) -> str:
    """A hash of the images' names and cameras in their order, by which a checkpoint knows them."""
    found, before = hashlib.sha256(), ""
    # Piece by piece: the text of all lines together is as large as the list itself.
    for name, camera in zip(images.paths.names(), images.cameras, strict=True):
        found.update(f"{before}{name} {camera}".encode("utf-8", "surrogateescape"))
        before = "\n"
    return found.hexdigest()


def _adam(config: TrainConfig, model: ReIDModel) -> torch.optim.Adam:
    learned = [p for p in model.parameters() if p.requires_grad]
    # Of the forms that torch's Adam has, the fused one alone lets the scaler of fp16 gradients
    # skip a step without reading from the device whether it has to.
    fused = True if config.precision == "fp16" else None
    return torch.optim.Adam(learned, config.optimiser.lr, weight_decay=WEIGHT_DECAY, fused=fused)


class Trainer:
    """Trains a model on images without labels.

    Args:
        config: checked options.
        engine: processes and device.
        model: on the CPU; the same on every process.
        images: what to train on; their identities are not looked at.
        observer: told the pseudo-labels and shown the model, for the log.
        resume: go on from the checkpoint in the run's folder.
        log: write to the run's folder.
        known: classes (N,) int64 to learn in place of pseudo-labels, for images that were drawn.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        model: ReIDModel,
        images: ImageList,
        observer: Observer | None = None,
        *,
        resume: bool = False,
        log: bool = True,
        known: torch.Tensor | None = None,
    ) -> None:
        self.config, self.engine, self.observer = config, engine, observer
        self._known = known
        self.at = Progress()
        self._images, self._tracklets = images, Tracklets.of_list(images)
        self._plain_images = engine.images(images, model)
        transform = train_transform(
            config.model.image_size,
            pad=config.batches.pad,
            erase=config.batches.erase,
            color_jitter=config.batches.color_jitter,
            mean=model.mean,  # type: ignore[arg-type]
            std=model.std,  # type: ignore[arg-type]
        )
        cache = int(config.data.cache_gb * 2**30)
        self._train_images = TrainImages(images, transform, config.seed, cache_bytes=cache)
        adam = _adam(config, model)
        set_seed(config.seed + engine.rank)  # dropout differs between processes
        self._parallel, self.optimizer = engine.accelerator.prepare(model, adam)
        self.model: ReIDModel = engine.accelerator.unwrap_model(self._parallel)
        self.layout = layout_of(config, engine, images, model.dim)
        self.bank = self.layout.new_bank(len(images))
        self.rows = torch.arange(len(images), device=engine.device)  # bank row of each image, or -1
        # Of the images, for a loss that looks at them; where a row of the memory is an image.
        self._cameras: torch.Tensor | None = None
        self._of_instances = bool(config.loss.instance_weight) and not has_no_instance_loss(
            config.loss, images.num_cameras
        )
        if config.loss.instance_positives == "cross-camera" and self._of_instances:
            self._cameras = torch.from_numpy(images.cameras).to(engine.device)
        self.labels = torch.full((len(images),), -1)  # cluster of each image, -1 for outliers
        self.loose: torch.Tensor | None = None  # clusters at the larger eps, for suspects
        self.false_negatives: FalseNegatives | None = None  # by the graph, for debias: graph
        self.loss: DHCLLoss  # of the epoch, from when its memory is filled
        self._graphed: GraphedStep | None = None  # of the loss as it is
        self._replays = engine.replays
        self._values = StepValues(engine.device)
        self._looked_at_features = False
        self._requests = [False, False]  # to stop, and to write a checkpoint
        self._saved_at = time.monotonic()
        self._mark = time.perf_counter()
        state = load_checkpoint(self.checkpoint) if resume else None
        if state is not None:
            self._restore(state)
        size = 0 if state is None else state["log_size"]
        self._logs = log
        self.log: RunLog | None = None
        if log and engine.is_main:
            self.log = RunLog(config.run, size, Trackers(config, engine.say))
        engine.meet()

    # ---- the algorithm --------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: by Ctrl-C or SIGTERM, with a checkpoint written.
            Diverged: a loss that is not finite; the last checkpoint is from before.
            NoClusters: none for :data:`PATIENCE` epochs on end, with outliers dropped.
            CheckpointError: one could not be written; the last one is whole.
        """
        with self.engine.stop:
            while self.at.epoch < self.config.epochs:
                self._mark = time.perf_counter()
                if not self.at.clustered:
                    features = self.recall()
                    self.remember(features, self.cluster(features))
                for images, indices, cameras in self.batches():
                    self.step(images, indices, cameras)
                    self.at.iteration += 1
                    self._save_if_due()
                self.finish_epoch()

    def recall(self) -> torch.Tensor:
        """The features to cluster: the bank's, or extracted anew."""
        config, at = self.config, self.at
        at.entry = {"epoch": at.epoch, "seconds": {}}
        at.totals = [0.0] * len(_AVERAGES)
        if config.model.calibrate != "never" and at.epoch == 0:
            self._enter("calibration")
            self.calibrate()
        if self._clusters_bank:
            features: torch.Tensor = self.bank.features
            return features
        self._enter("extraction")
        features = self.extract()
        self._lap("extract")
        return features

    def cluster(self, features: torch.Tensor) -> PseudoLabels:
        """The pseudo-labels of these features (N, d), the same on every process."""
        if self._known is not None:
            return PseudoLabels(self._known, None, None, {})
        self._enter("clustering")
        labels = self.layout.cluster(
            features,
            self._tracklets,
            loose=self.config.loss.suspects != "off",
            threshold=self.at.threshold,
            progress=self._check_stop,
            graph_eps=self._graph_eps,
        )
        self._mark = time.perf_counter()  # the stages have their own times
        return labels

    def remember(self, features: torch.Tensor, found: PseudoLabels) -> None:
        """Fill the memory and give each image its row: of its own, or of its cluster."""
        at, device = self.at, self.engine.device
        self._graphed = None  # it is of the labels before
        self.labels, self.loose, at.threshold = found.labels, found.loose, found.threshold
        self.false_negatives = found.false_negatives
        labels = found.labels.to(device)
        clusters, outliers = int(labels.max()) + 1, int((labels < 0).sum())
        at.barren = 0 if clusters else at.barren + 1
        if not clusters:
            self._without_clusters()
        at.dropped = self.config.labels.outliers == "drop" and clusters > 0
        if self.config.memory.memory == "instances":
            if not self._clusters_bank:
                self.bank.init(features)
            self.bank.set_labels(self.layout.own(labels))
        else:
            alone = labels.new_full(labels.shape, -1)
            if not at.dropped:
                alone = clusters - 1 + (labels < 0).cumsum(0)
            self.rows = torch.where(labels < 0, alone, labels)
            count = int(self.rows.max()) + 1
            self.bank = self.layout.new_bank(count)
            self.bank.init(prototypes(features, self.rows, count))
            self.bank.set_labels(torch.arange(count, device=device))
        self.loss = self._new_loss()
        at.clustered = True
        at.entry["seconds"].update(found.seconds)
        at.entry.update(clusters=clusters, outliers=outliers, dropped=at.dropped, lr=self.lr)
        at.entry.update({name: self.loss.settings[name] for name in ("kappa", "beta")})
        if self.observer:
            seen = self.observer.clustering(self.labels)
            at.entry["observed"] = {"observed_only": True, **seen}

    def step(self, images: torch.Tensor, indices: torch.Tensor, cameras: torch.Tensor) -> None:
        """One batch: loss, gradient, optimiser, memory."""
        accelerator = self.engine.accelerator
        with accelerator.accumulate(self._parallel):
            features = self._parallel(images, cameras)
            rows = self.rows[indices]
            self._look_at_features(features)
            loss, stats = self._loss_of(features, rows)
            self._note(loss, stats)
            accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self._graphed is not None:
            self._graphed.update_()
            return
        self.layout.update(self.bank, features.detach(), rows)

    def finish_epoch(self) -> None:
        """Write the epoch's entry in the log and its checkpoint."""
        at, entry = self.at, self.at.entry
        self._lap("train")
        try:
            self._look_back()
        except Interrupted:
            # Of several processes the others may be elsewhere, and a checkpoint needs them all.
            if self.engine.world_size == 1:
                self.save()
            raise
        entry.update(
            zip(_AVERAGES, (t / self.config.batches.iterations for t in at.totals), strict=True)
        )
        entry["skipped_updates"] = self.layout.skipped(self.bank)
        at.seconds += sum(entry["seconds"].values())
        self.engine.say(self._line(entry))
        if self.log:
            self.log.add(entry)
        at.next_epoch()
        self.save()

    # ---- its parts ------------------------------------------------------------------------------

    def _enter(self, stage: str) -> None:
        """Name what is done now, for whoever reads that a process was lost."""
        self.engine.peers.stage = f"{stage} of epoch {self.at.epoch + 1}"

    def _check_stop(self, *progress: object) -> None:
        self.engine.stop.check()

    def _look_back(self) -> None:
        """After the epoch's steps: statistics from clean images, and the observer's look."""
        config, at = self.config, self.at
        if config.model.calibrate == "epoch":
            self.calibrate()
            self._lap("extract")
        done = at.epoch + 1
        due = (
            config.evaluation.eval_every
            and done % config.evaluation.eval_every == 0
            and done < config.epochs
        )
        if self.observer and due:
            self._enter("evaluation")
            metrics = self.observer.ranking(self)
            at.entry.setdefault("observed", {"observed_only": True}).update(metrics)
            self.offer_best(metrics)
            self.engine.meet()
            self._lap("evaluate")

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What is left of this epoch's batches, this process's share of each."""
        config, device = self.config, self.engine.device
        sampler = PKSampler(
            self.labels,
            self._images.cameras,
            classes_per_batch=config.batches.classes_per_batch,
            images_per_class=config.batches.images_per_class,
            iterations=config.batches.iterations,
            seed=config.seed,
            outliers=not self.at.dropped,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
        )
        sampler.set_epoch(self.at.epoch)
        sampler.start(self.at.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loader = train_loader(
            self._train_images,
            sampler,
            workers=config.data.workers,
            pin_memory=device.type == "cuda",
            persistent=False,
            seconds=60 * config.timeout_minutes,
        )
        self._parallel.train()
        self._enter("training")
        name = f"epoch {self.at.epoch + 1}/{config.epochs}"
        bar = self.engine.bar(loader, name, config.batches.iterations, self.at.iteration)
        for batch in bar:
            yield tuple(t.to(device, non_blocking=True) for t in batch)  # type: ignore[misc]

    def extract(self) -> torch.Tensor:
        """Features of the training images, as far as this process clusters them."""
        return self.layout.extract(self.model, self._plain_images)

    def calibrate(self) -> None:
        """Compute batch-norm statistics from training images, the same on every process."""
        config = self.config
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(0))
        # No small rest: its statistics would count as much as a whole batch's.
        whole = len(order) - len(order) % config.evaluation.eval_batch or len(order)
        part = Subset(self._plain_images, order[: min(whole, _CALIBRATION)].tolist())
        loader = eval_loader(
            part,
            batch_size=config.evaluation.eval_batch,
            workers=config.data.workers,
            seconds=60 * config.timeout_minutes,
        )

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for pixels, _, cameras in self.engine.bar(loader, "calibrate", len(loader)):
                self.engine.stop.check()
                yield pixels.to(self.engine.device), cameras.to(self.engine.device)

        calibrate(self.model, batches())

    @property
    def _clusters_bank(self) -> bool:
        """Whether this epoch's features to cluster are the memory's own."""
        return self.config.labels.cluster_on == "bank" and self.at.epoch > 0

    def _new_loss(self) -> DHCLLoss:
        """The loss of this epoch, which follows from the memory, the labels and the warm-up."""
        options = self.config.loss
        others = max(self.layout.classes(self.bank) - 1, 1)
        warm = self.at.epoch >= options.warmup_epochs
        loss = self.layout.loss_class(
            prototype_weight=options.prototype_weight,
            instance_weight=options.instance_weight if self._of_instances else 0.0,
            instance_positives=options.instance_positives if self._of_instances else "self",
            temperature=options.temperature,
            # With very few classes no more than half of the negatives can be false.
            kappa=min(options.kappa, others / 2) if warm else 0.0,
            beta=options.beta if warm else 0.0,
            suspects_as="kappa" if options.suspects == "kappa" else "exclude",
        )
        if warm and options.suspects != "off" and self.loose is not None:
            loss.set_suspects(self.bank, self.layout.own(self.loose).to(self.engine.device))
        if warm and self.false_negatives is not None:
            there = (part.to(self.engine.device) for part in self.false_negatives)
            loss.set_false_negatives(FalseNegatives(*there))
        return loss

    @property
    def _graph_eps(self) -> float | None:
        """The eps of the graph that false negatives are told from, in the epochs that do."""
        loss = self.config.loss
        if loss.debias != "graph" or self.at.epoch < loss.warmup_epochs:
            return None
        return loss.debias_eps

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return learning_rate(self.config.optimiser, self.at.epoch)

    def _line(self, entry: dict[str, Any]) -> str:
        """The epoch in a line."""
        done, config = self.at.epoch + 1, self.config
        left = self.at.seconds / done * (config.epochs - done)
        parts = [
            f"epoch {done}/{config.epochs}:",
            f"{entry['clusters']} clusters, {entry['outliers']} outliers,",
            f"loss {entry['loss']:.3f}, clamped {entry['clamped']:.0%}, lr {entry['lr']:.2g},",
            f"{duration(sum(entry['seconds'].values()))}, {duration(left)} left",
        ]
        seen = {k: v for k, v in entry.get("observed", {}).items() if k in ("mAP", "rank1", "ari")}
        if seen:
            shown = ", ".join(f"{name} {value:.1%}" for name, value in seen.items())
            parts.append(f"(looked at, not used: {shown})")
        return " ".join(parts)

    def _without_clusters(self) -> None:
        at = self.at
        where = f"epoch {at.epoch + 1}: no clusters, all {len(self._images)} images are outliers"
        labels = self.config.labels
        hint = f"a larger eps than {labels.eps} or fewer min_samples than {labels.min_samples}"
        if labels.outliers == "drop" and at.barren >= PATIENCE:
            raise NoClusters(
                f"{where}, for {at.barren} epochs on end, and they are to be dropped; try {hint}, "
                "better weights to start from, or outliers: keep"
            )
        self.engine.say(f"warning: {where}; each is a class of its own now. Try {hint}.")

    def _loss_of(
        self, features: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, HybridStats]:
        """The loss of a batch and its statistics, replayed from a CUDA graph where there is one.

        The graphs are captured at the first step of an epoch, whose loss they hold.
        """
        if self._graphed is None and self._replays:
            try:
                self._graphed = GraphedStep(
                    self.loss, self.bank, features, rows, cameras=self._cameras
                )
            except RuntimeError as error:
                self._replays = False
                self.engine.say(
                    "warning: the loss can't be captured in a CUDA graph "
                    f"({first_line(error)}); training goes on, and takes more of the host"
                )
        if self._graphed is None:
            value, stats = self.loss(
                features, self.bank, rows, cameras=self._cameras, return_stats=True
            )
            return value, stats
        return self._graphed(features, rows), self._graphed.stats

    def _look_at_features(self, features: torch.Tensor) -> None:
        """Stop if they are not finite, which the loss takes for a mistake of its caller.

        On CUDA, where the loss looks at its first features only, later ones show in its value.
        """
        if features.is_cuda and self._looked_at_features:
            return
        self._looked_at_features = True
        if not bool(features.isfinite().all()):
            self._look_at_values()  # an earlier step may be the one
            self._diverged("features are", self.at.iteration)

    def _note(self, loss: torch.Tensor, stats: HybridStats) -> None:
        """Keep this step's values for the epoch's averages, and look at them from time to time."""
        parts = [loss, stats.prototype_loss, stats.instance_loss]
        parts += [s and s.clamped_fraction for s in (stats.prototypes, stats.instances)]
        self._values.add(self.at.iteration, parts)
        done = self.at.iteration + 1
        if done % _STEPS_UNSEEN == 0 or done == self.config.batches.iterations:
            self._look_at_values()

    def _look_at_values(self) -> None:
        """Add the steps since the last look to the epoch's averages.

        Several processes average their values, and agree on whether to go on. Each must be here.
        """
        if not len(self._values):
            return
        iterations, values = self._values.take()
        if self.engine.world_size > 1:
            values = self._averaged(values)
        for iteration, means in zip(iterations, values.tolist(), strict=True):
            if not math.isfinite(means[0]):
                self._diverged("the loss is", iteration)
            self.at.totals = [a + b for a, b in zip(self.at.totals, means, strict=True)]

    def _averaged(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over processes of values (steps, V); takes over what any of them requests."""
        requests = torch.zeros(1, values.shape[1])
        requests[0, : len(self._requests)] = torch.tensor(self._own_requests())
        together = torch.cat([values, requests.to(values.device)])
        means: torch.Tensor = self.engine.accelerator.reduce(together, "mean")
        self._requests = [r > 0 for r in means[-1, : len(self._requests)].tolist()]
        return means[:-1]

    def _own_requests(self) -> list[bool]:
        """Whether this process was asked to stop, and whether a checkpoint is due."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return [
            bool(self.engine.stop.requested),
            0 < self.config.checkpoint_minutes <= minutes,
        ]

    def _diverged(self, what: str, iteration: int) -> None:
        at = self.at
        kept = (
            f"The last checkpoint is from before: {show(self.checkpoint)}"
            if self.checkpoint.exists()
            else "There is no checkpoint yet"
        )
        raise Diverged(
            f"{what} not finite in epoch {at.epoch + 1}, iteration {iteration + 1} "
            f"(lr {self.lr:g}). {kept}. A lower lr or precision: fp32 may help."
        )

    # ---- state ----------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The file that the run goes on from."""
        return self.config.run / "checkpoints" / "last.pt"

    @property
    def best_checkpoint(self) -> Path:
        """The model that looked best at evaluations along the way."""
        return self.config.run / "checkpoints" / "best.pt"

    def offer_best(self, metrics: dict[str, Any]) -> None:
        """Keep the model beside the last one if its mAP is the highest so far."""
        if metrics.get("mAP", -1.0) <= self.at.best.get("mAP", -1.0):
            return
        self.at.best = {"epoch": self.at.epoch, **metrics}
        if self.engine.is_main:
            model = {"model": self.model.state_dict(), "metrics": self.at.best}
            save_checkpoint(self.best_checkpoint, model)

    def save(self) -> None:
        """Write everything the run needs to go on, bit for bit.

        Raises Diverged instead if a loss since the last look, or a weight, is not finite.
        """
        self._look_at_values()
        self._check_weights()
        self._saved_at = time.monotonic()
        self._requests[1] = False
        states = [random_state()]
        if self.engine.world_size > 1:
            states = [{}] * self.engine.world_size
            torch.distributed.all_gather_object(states, random_state())
        lists = self.false_negatives if self.at.clustered else None
        folder = self.checkpoint.parent
        bank = self.layout.keep(self.bank, lists, folder) if self._logs else {}
        if self.engine.is_main and self.log is not None:
            self._write(states, bank, self.log.size)
        self.engine.meet()

    def _write(self, states: list[dict[str, Any]], bank: dict[str, Any], log_size: int) -> None:
        """Write the checkpoint.

        Args:
            states: of the random generators of each process.
            bank: what the memory's layout kept.
            log_size: bytes of the log that belong to it.
        """
        accelerator = self.engine.accelerator
        lists = None if "folder" in bank else self.false_negatives
        state = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "bank": bank,
            "rows": self.rows,
            "labels": self.labels,
            "loose": self.loose,
            "false_negatives": lists and tuple(lists),
            "progress": dataclasses.asdict(self.at),
            "random": states,
            "images": fingerprint(self._images),
            "log_size": log_size,
        }
        save_checkpoint(self.checkpoint, state)
        remove_memories(self.checkpoint.parent, bank)

    def _restore(self, state: dict[str, Any]) -> None:
        self.at = Progress.of(state, self.checkpoint)
        if state["images"] != fingerprint(self._images):
            raise ConfigError(
                f"checkpoint: {show(self.checkpoint)} was written with other training images; "
                "to go on, the data must be as it was"
            )
        self.model.load_state_dict(state["model"])
        saved = state["optimizer"]
        for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            group["fused"] = own["fused"]  # how it computes is this run's, not the checkpoint's
        self.optimizer.load_state_dict(saved)
        if state["scaler"]:
            self.engine.accelerator.scaler.load_state_dict(state["scaler"])
        self.bank = self.layout.load(state["bank"], self.checkpoint.parent)
        self.rows = state["rows"].to(self.engine.device)
        self.labels, self.loose = state["labels"], state["loose"]
        self.false_negatives = self.layout.load_lists(state, self.checkpoint.parent)
        if self.at.clustered:
            self.loss = self._new_loss()
        if len(state["random"]) == self.engine.world_size:
            set_random_state(state["random"][self.engine.rank])
        else:
            self.engine.say(
                f"warning: the run had {len(state['random'])} processes and goes on with "
                f"{self.engine.world_size}. Memory, labels, weights and batches are the same to "
                "the bit; what follows is not, since each process has another part of a batch: "
                "its batch-norm statistics and random draws of the network differ"
            )

    def _save_if_due(self) -> None:
        """Between optimiser steps, write a checkpoint if it is time, or if asked to stop."""
        last = self.at.iteration == self.config.batches.iterations
        if last or not self.engine.accelerator.sync_gradients:
            return  # the end of the epoch writes one anyway
        if self.engine.world_size == 1:  # several agree when they look at their values
            self._requests = self._own_requests()
        if any(self._requests):
            self._lap("train")
            self.save()
        if self._requests[0]:
            raise Interrupted(self.engine.stop.requested or signal.SIGTERM)

    def _lap(self, stage: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        seconds = self.at.entry["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + now - self._mark
        self._mark = now

    def _check_weights(self) -> None:
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()])
        if not bool(finite.all()):
            self._diverged("weights are", self.at.iteration)
