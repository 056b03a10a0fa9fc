"""A run from its options to its results: data, model, training, evaluation, and its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dhcl.config import (
    RUN_FILE,
    ConfigError,
    DataOptions,
    TrainConfig,
    has_no_instance_loss,
    run_text,
)
from dhcl.data import DataError, ReIDData, check_images, load_data
from dhcl.data.tracks import Tracklets
from dhcl.files import NotPlainFile, Taken, write_atomic, writing_folder
from dhcl.metrics import RANKS, check_ranks, table
from dhcl.training.checkpoint import load_checkpoint
from dhcl.training.engine import Engine
from dhcl.training.evaluation import WITHIN_CAMERA, Evaluator, IdentityObserver
from dhcl.training.network import make_model, read_model, without_weights
from dhcl.training.record import CHOSEN_BY
from dhcl.training.trackers import check_trackers
from dhcl.training.trainer import Trainer, fingerprint
from dhcl.words import show

__all__ = [
    "Trained",
    "evaluate_run",
    "find_data",
    "open_data",
    "train",
]


def find_data(options: DataOptions, *, training: bool = True) -> ReIDData:
    """Load the lists of a data set, with images to train on or without; no image is opened.

    Raises:
        ConfigError: the options name no root. DataError: as :func:`dhcl.data.load_data`.
    """
    if options.root is None:
        raise ConfigError("root: where the images lie must be given (got None)")
    try:
        return load_data(options.data, options.root, pattern=options.pattern, training=training)
    except DataError as error:
        if options.root.expanduser().exists():
            raise
        hint = "; if the images were moved, --root FOLDER says where they are now"
        raise DataError(f"{error}{hint}") from error


def open_data(
    options: DataOptions, engine: Engine, *, quiet: bool = False, training: bool = True
) -> ReIDData:
    """Load the data set, say what it holds, and check every image.

    Args:
        options: say where it is.
        engine: its first process looks at the images.
        quiet: say nothing but of bad images.
        training: there must be images to train on; without, there may be.
    """
    data = find_data(options, training=training)
    if not quiet:
        engine.say(data.description)
    engine.peers.stage = "check of the images"
    data = dataclasses.replace(
        data, **engine.by_first(lambda: _checked(options, engine, data, quiet))
    )
    if training and len(data.train) < 2:
        raise ConfigError(f"root: at least 2 images to train on are needed (got {len(data.train)})")
    return data


def _checked(options: DataOptions, engine: Engine, data: ReIDData, quiet: bool) -> dict[str, Any]:
    """The lists of a data set by their split, without images that can't be read."""
    splits = {"train": data.train, "query": data.query, "gallery": data.gallery}
    bar = engine.bar((), "check images", sum(map(len, splits.values())))

    def advance(done: int, total: int) -> None:
        bar.update(done - bar.n)

    lists, report = check_images(
        splits, on_bad=options.on_bad, workers=max(options.workers, 2), progress=advance
    )
    bar.close()
    if not quiet or report.bad:
        engine.say(str(report))
    return lists


@dataclass(frozen=True)
class Trained:
    """What a training ends with, so that nothing of it need be made again.

    Attributes:
        config: its options.
        engine: its processes and device.
        data: its images.
        features: of query (Q, d) and gallery (G, d) by the last epoch's model, float32 of unit
            length; None without identities to evaluate on, or where the gallery is sharded.
        metrics: what is in ``metrics.json``: ``last``; ``best`` where evaluations were looked at
            along the way; ``protocol`` where matches within the camera count. Empty without
            identities to evaluate on, and on other processes than the first.
    """

    config: TrainConfig
    engine: Engine
    data: ReIDData
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def train(
    config: TrainConfig, *, resume: bool = False, quiet: bool = False, drawn: bool = False
) -> Trained:
    """Train, evaluate the last epoch, and write everything but a report to the run's folder.

    Args:
        config: checked options.
        resume: go on from the checkpoint in the folder, or from the start if there is none yet.
            Processes that torchrun starts again (``--max-restarts``) do so by themselves.
        quiet: print neither options nor data, but the epochs.
        drawn: learn the identities instead of pseudo-labels, of people that ``dhcl synth`` drew.

    Raises:
        ConfigError, DataError: wrong options or data; another process trains this run.
        NotPlainFile: the run's lock or log is a link, a FIFO or a device.
        Interrupted, Diverged, NoClusters, CheckpointError: as
            :meth:`dhcl.training.trainer.Trainer.fit`.
        PeerLost: another process was killed, does not answer in ``timeout_minutes``, or ended.
        WorkerLost: processes that load images were lost again and again.
    """
    check_trackers(config.log_with)
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    engine = Engine(config)
    with engine.peers.watched(), _only_trainer(config.run, engine, resume):
        return _train(config, engine, resume, quiet, drawn)


@contextlib.contextmanager
def _only_trainer(run: Path, engine: Engine, resume: bool) -> Iterator[None]:
    """Hold the run's lock, on the first process; all raise where it or the folder can't be had."""
    with contextlib.ExitStack() as held:

        def refused() -> str | None:
            try:
                held.enter_context(writing_folder(run, RUN_FILE))
                _check_folder(run, resume)
            except Taken as error:
                return f"out: {error} trains in {show(run)}; wait for it or end it"
            except (ConfigError, NotPlainFile) as error:
                return str(error)
            except OSError as error:
                return f"out: {show(run)} can't be written to ({error.strerror})"
            return None

        if why := engine.by_first(refused):
            raise ConfigError(why)
        yield


def _check_folder(run: Path, resume: bool) -> None:
    """Refuse a folder that holds a run already, or links to where others' files may be."""
    if (run / RUN_FILE).exists() and not resume:
        raise ConfigError(
            f"out: {show(run)} holds a run already; go on with --resume {show(run)}, or choose "
            "another --out"
        )
    for name in ("checkpoints", "tensorboard", "wandb"):
        if (run / name).is_symlink():
            raise ConfigError(
                f"out: {show(run / name)} must be a folder (got a symbolic link), nothing is "
                "written through it; remove it, or put a copy in its place"
            )


def _train(config: TrainConfig, engine: Engine, resume: bool, quiet: bool, drawn: bool) -> Trained:
    """What :func:`train` does once the folder is its own."""
    if not quiet:
        engine.say(config.to_yaml())
    data = open_data(config.data, engine, quiet=quiet)
    _check_data(config, engine, data)
    go_on = resume and (config.run / "checkpoints" / "last.pt").exists()
    # A checkpoint has all weights; those that the run began with may be gone.
    options = without_weights(config.model) if go_on else config.model
    model = make_model(options, data.train.num_cameras, config.seed)
    if not quiet and not go_on:
        engine.say(f"model: {model.description}")
    engine.peers.stage = "setting up"
    if engine.is_main:
        write_atomic(config.run / RUN_FILE, run_text(config).encode())
    evaluator = Evaluator(engine, data, model) if data.can_evaluate else None
    observer = IdentityObserver(data, evaluator)
    known = _drawn_classes(config.data.root, data) if drawn else None
    trainer = Trainer(config, engine, model, data.unlabeled, observer, resume=go_on, known=known)
    if go_on:
        at = trainer.at
        engine.say(f"goes on in epoch {at.epoch + 1} after {at.iteration} iterations")
    try:
        return _fitted(config, engine, data, trainer, evaluator, quiet)
    finally:
        if trainer.log:
            trainer.log.close()


def _fitted(
    config: TrainConfig,
    engine: Engine,
    data: ReIDData,
    trainer: Trainer,
    evaluator: Evaluator | None,
    quiet: bool,
) -> Trained:
    """Train to the last epoch, and evaluate it."""
    trainer.fit()
    engine.peers.stage = "evaluation of the last epoch"
    if evaluator is None:
        engine.say(f"trained: {show(trainer.checkpoint)}. No identities to evaluate on.")
        return Trained(config, engine, data)
    features = evaluator.features(trainer.model)
    last = evaluator.metrics(*features, reranked=config.evaluation.rerank)
    protocol = {} if data.across_cameras else {"protocol": f"within the camera: {WITHIN_CAMERA}"}
    metrics = _report(config, engine, trainer, last, protocol, quiet) if engine.is_main else {}
    whole = None if evaluator.sharded else features
    return Trained(config, engine, data, whole, metrics)


def _drawn_classes(root: Path | None, data: ReIDData) -> torch.Tensor:
    """The identities (N,) of drawn people, numbered from 0; those of others are not given out."""
    if root is None or not (root / "synth.json").exists():
        raise ConfigError(
            f"root: identities are learned of drawn people only, and {show(str(root))} holds no "
            "synth.json of dhcl synth"
        )
    classes: torch.Tensor = torch.from_numpy(data.train.ids).unique(return_inverse=True)[1]
    return classes


def _check_data(config: TrainConfig, engine: Engine, data: ReIDData) -> None:
    if config.batches.classes_per_batch % engine.world_size:
        raise ConfigError(
            f"classes_per_batch: must be a multiple of the {engine.world_size} processes "
            f"(got {config.batches.classes_per_batch})"
        )
    if config.labels.k1_own and data.train.num_cameras < 2:
        raise ConfigError(
            "k1_own: the cameras of the training images must be known, and two at least "
            f"(got {data.train.num_cameras})"
        )
    if has_no_instance_loss(config.loss, data.train.num_cameras):
        if not config.loss.prototype_weight:
            raise ConfigError(
                "instance_positives: cross-camera without a loss over prototypes needs training "
                f"images of two known cameras at least (got {data.train.num_cameras})"
            )
        engine.say(
            "no loss over single images: its positives are of another camera, and of the training "
            f"images {'one camera is' if data.train.num_cameras else 'no cameras are'} known; "
            "--instance-positives has others"
        )
    if config.loss.debias == "graph" and Tracklets.of_list(data.train) is not None:
        raise ConfigError(
            "debias: the graph is one of images, and these belong to tracklets; use constant"
        )
    if data.train.num_cameras > 1 and not config.model.camera_bn:
        engine.say(
            f"hint: {data.train.num_cameras} cameras are known; if their pictures differ much, "
            "--camera-bn may help a lot"
        )
    _say_within_camera(engine, data)


def _say_within_camera(engine: Engine, data: ReIDData) -> None:
    if data.can_evaluate and not data.across_cameras:
        engine.say(f"evaluation within the camera: {WITHIN_CAMERA}")


def _why_not_evaluated(options: DataOptions, data: ReIDData) -> str:
    found = f"{len(data.query):,} queries and {len(data.gallery):,} images in a gallery"
    if not len(data.query) or not len(data.gallery):
        return (
            f"to evaluate on, {options.root} must hold the folders query/ and gallery/ "
            f"(got {found}; {len(data.train):,} images to train on)"
        )
    if not data.query.num_ids:
        return (
            f"the identities of the queries must be known (got {found}, and the pattern "
            f"{options.pattern!r}); --pattern says where they stand, in a group named id"
        )
    return f"{options.root} has no queries with their identity in a gallery (got {found})"


def _report(
    config: TrainConfig,
    engine: Engine,
    trainer: Trainer,
    last: dict[str, Any],
    about: dict[str, str],
    quiet: bool,
) -> dict[str, Any]:
    """Write and print the last epoch's metrics, and the best ones beside them."""
    rows = {"last epoch": last}
    results: dict[str, Any] = {"last": {"epoch": config.epochs - 1, **last}, **about}
    if "reranked" in last:
        rows["last epoch, re-ranked"] = last["reranked"]
    best = trainer.at.best
    if best:
        if best["mAP"] <= last["mAP"]:
            best = results["last"]
        results["best"] = {**best, "chosen_by": CHOSEN_BY}
        rows[f"best, looked up by test mAP (epoch {best['epoch'] + 1})"] = best
    write_atomic(config.run / "metrics.json", json.dumps(results, indent=1).encode())
    if trainer.log:
        trainer.log.add_metrics(results)
    if not quiet:
        engine.say(f"{table(rows)}\nrun: {show(config.run)}")
    return results


def evaluate_run(
    config: TrainConfig,
    run: Path,
    *,
    which: str = "last",
    same_data: bool | None = True,
    ranks: Sequence[int] = RANKS,
    ap: Literal["hits", "trapezoid"] = "hits",
) -> dict[str, Any]:
    """Evaluate a model of a run, on its own data or other.

    Args:
        config: the run's options, with data set, root and pattern of what to evaluate on.
        run: its folder.
        which: ``last`` or ``best`` (by test mAP along the way).
        same_data: whether the cameras are those of the training; None finds out, by the names and
            cameras of the training images.
        ranks: the k of which CMC(k) is given.
        ap: as of :func:`dhcl_ops.evaluate_ranking`.
    """
    check_ranks(ranks)
    engine = Engine(config)
    with engine.peers.watched():
        return _evaluate_run(config, engine, run, which, same_data, ranks, ap)


def _evaluate_run(
    config: TrainConfig,
    engine: Engine,
    run: Path,
    which: str,
    same_data: bool | None,
    ranks: Sequence[int],
    ap: Literal["hits", "trapezoid"],
) -> dict[str, Any]:
    """What :func:`evaluate_run` does once all processes are there."""
    model = read_model(config.model, run, which).to(engine.device)
    data = open_data(config.data, engine, training=False)
    if not data.can_evaluate:
        raise ConfigError(f"root: {_why_not_evaluated(config.data, data)}")
    _say_within_camera(engine, data)
    if same_data is None:
        trained_on = load_checkpoint(run / "checkpoints" / "last.pt")["images"]
        same_data = fingerprint(data.train) == trained_on
        if model.num_cameras and not len(data.train):
            engine.say(
                "hint: the training images are not here, by which cameras are known to be those of "
                "the training; statistics of all cameras together are used"
            )
    evaluate = Evaluator(engine, data, model, same_cameras=same_data, ranks=ranks, ap=ap)
    metrics = evaluate(model, reranked=config.evaluation.rerank)
    if engine.is_main:
        rows = {which: metrics}
        if "reranked" in metrics:
            rows[f"{which}, re-ranked"] = metrics["reranked"]
        engine.say(table(rows))
    return metrics
