"""The commands about the model of a run: ``dhcl eval`` and ``dhcl export``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dhcl.cli.shared import (
    Reading,
    Which,
    check_cameras,
    hint_cameras,
    options_checked,
    print_left_out,
    print_other_kinds,
)
from dhcl.errors import ConfigError
from dhcl.words import say, show

__all__ = ["evaluate", "export"]


@dataclass(frozen=True)
class EvalArguments:
    """Evaluate the model of a run: mAP, CMC, mINP."""

    run: tyro.conf.Positional[Path]
    """Folder that the run lies in."""
    data: str | None = None
    """Layout of another data set to evaluate on, as for dhcl train."""
    root: Path | None = None
    """Folder that holds the images: of that data set, or of the run's own if it was moved."""
    pattern: str | None = None
    """Regular expression with groups named id, camera, track and frame, searched in each path."""
    which: Which = "last"
    """Checkpoint to use: of the last epoch, or of the one that looked best by test mAP."""
    rerank: bool = False
    """Whether to evaluate with k-reciprocal re-ranking too."""
    ap: Literal["hits", "trapezoid"] = "hits"
    """Average precision: mean at the hits, or the area by trapezoids of older Matlab code."""
    ranks: tuple[int, ...] = (1, 5, 10)
    """Ranks k for which to print the share of queries with a right match among the first k."""
    workers: int = 4
    """Number of processes that load images; 0 is the main one."""


def evaluate(given: EvalArguments) -> None:
    """Evaluate a run's model on its own data set or another."""
    from dhcl.config import read_run, with_changes
    from dhcl.training.runs import evaluate_run

    config = read_run(given.run)
    own = given.data is None and given.root is None
    changes: dict[str, Any] = {"rerank": given.rerank, "workers": given.workers}
    if given.data is not None:
        changes.update(data=given.data, pattern=None)
    if given.root is not None:
        changes["root"] = given.root
    if given.pattern is not None:
        changes["pattern"] = given.pattern
    config = with_changes(config, changes)
    config.validate()
    # Images that were named are the run's own if they are those it was trained on.
    evaluate_run(
        config,
        given.run,
        which=given.which,
        same_data=True if own else None,
        ranks=given.ranks,
        ap=given.ap,
    )


@dataclass(frozen=True)
class ExportArguments:
    """Give a model's features, or the model itself, to other programs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder that the run lies in."""
    features: Path | None = None
    """Folder of images whose features are written to --out."""
    out: Path | None = None
    """File to write the features to, .npz or .parquet."""
    onnx: Path | None = None
    """File to write the model to as ONNX: images (batch, 3, H, W), RGB in [0, 1], to features."""
    pretrained: Path | None = None
    """Folder to write the model to as on the Hugging Face hub: safetensors, config.json, a card."""
    weights: Path | None = None
    """File to write a plain state dict to, which can be loaded without dhcl."""
    which: Which = "last"
    """Checkpoint to use: of the last epoch, or of the one that looked best by test mAP."""
    camera: int | None = None
    """Camera, from 0, whose statistics --onnx and --weights take; without one, those of all."""
    pattern: str | None = None
    """Regular expression that finds identity and camera in the paths; they are written too."""
    trained_cameras: bool = False
    """Whether the pattern's cameras are those of the training, so that their statistics count."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)


def export(given: ExportArguments) -> None:
    """Write what is asked for: weights, ONNX, features."""
    if not any((given.features, given.onnx, given.weights, given.pretrained)):
        raise ConfigError(
            "export: what must be said: --features FOLDER, --pretrained FOLDER, --onnx or "
            "--weights FILE"
        )
    if (given.features is None) != (given.out is None):
        raise ConfigError("features and out: a folder of images and a file go together")
    check_cameras(given.pattern, given.trained_cameras)
    from dhcl.inference.export import export_features, export_onnx, export_weights
    from dhcl.inference.reid import ReID

    model = ReID.load(given.run, given.which, given.reading.device)
    say(f"model: {model}")
    if given.weights is not None:
        shapes = export_weights(model, given.weights, camera=given.camera)
        parts = Counter(name.split(".")[0] for name in shapes)
        listed = ", ".join(f"{count} of {part}" for part, count in parts.items())
        say(f"{show(given.weights)}: {len(shapes)} tensors, {listed}")
    if given.pretrained is not None:
        model.save_pretrained(given.pretrained)
        told = "with metrics" if model.metrics else "nothing was measured of it"
        say(f"{given.pretrained}: the model for ReID.from_pretrained; its card: {told}")
    if given.onnx is not None:
        worst = export_onnx(model, given.onnx, camera=given.camera)
        height, width = model.image_size
        say(
            f"{show(given.onnx)}: images (batch, 3, {height}, {width}), RGB in [0, 1], to features "
            f"(batch, {model.dim}); onnxruntime differs from torch by {worst:.1g} at most"
        )
    if given.features is not None and given.out is not None:
        hint_cameras(model, given.pattern, given.trained_cameras)
        print_other_kinds([given.features])
        with options_checked():
            rows, left_out = export_features(
                model,
                given.features,
                given.out,
                pattern=given.pattern,
                trained_cameras=given.trained_cameras,
                **given.reading.options(),
            )
        print_left_out(left_out)
        say(f"{show(given.out)}: features of {rows:,} images, {model.dim} each")
