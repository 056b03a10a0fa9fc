"""The command ``dhcl train``."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dhcl.config import (
    ConfigError,
    TrainConfig,
    check_resumed,
    flat_options,
    load_config,
    preset,
    read_options,
    read_run,
    with_changes,
)
from dhcl.errors import Interrupted, PeerLost
from dhcl.words import say

__all__ = ["train", "train_options"]


@dataclass(frozen=True)
class _First:
    """What decides the defaults of all others."""

    config: Path | None = None
    resume: Path | None = None
    preset: str | None = None


@dataclass(frozen=True)
class TrainArguments:
    """Train a model on images without labels."""

    config: Path | None = None
    """YAML file with options; the command line goes before it."""
    resume: Path | None = None
    """Folder of a run to go on with, bit for bit."""
    # Without a name, so that the help's headings are those of the sections.
    options: Annotated[tyro.conf.OmitArgPrefixes[TrainConfig], tyro.conf.arg(name="")] = (
        dataclasses.field(default_factory=TrainConfig)
    )


def train(words: list[str]) -> None:
    """Train or go on training, and write the report of the run."""
    config, resume = train_options(words)
    from dhcl.report import report_training
    from dhcl.training import runs
    from dhcl.training.checkpoint import how_to_go_on

    try:
        trained = runs.train(config, resume=resume)
    except PeerLost as error:  # which says itself how to go on
        if error.speaks:
            raise
        raise SystemExit(error.status) from error
    except (Interrupted, KeyboardInterrupt, OSError, RuntimeError):
        if os.environ.get("RANK", "0") == "0" and (config.run / "config.yaml").exists():
            say(f"dhcl: {how_to_go_on(config.run)}", sys.stderr)
        raise
    report_training(trained)


def train_options(words: list[str]) -> tuple[TrainConfig, bool]:
    """Options from preset, file and command line, and whether a run is to go on."""
    first, _ = tyro.cli(_First, args=words, return_unknown_args=True, add_help=False)
    if first.resume is not None:
        if first.config is not None:
            raise ConfigError("config and resume: a run goes on with the options it began with")
        began = read_run(first.resume)
        config = _parse(began, words)
        check_resumed(began, config)
        return config.resolved(), True
    chosen = first.preset
    if chosen is None and first.config is not None:
        chosen = read_options(first.config).get("preset")
    base = preset(chosen or "dhcl")
    if first.config is not None:
        base = load_config(first.config, base)
    return _parse(base, words).resolved(), False


def _parse(base: TrainConfig, words: list[str]) -> TrainConfig:
    """The options with those on a command line, which tyro reads and checks."""
    default = TrainArguments(options=base)
    parsed = tyro.cli(TrainArguments, prog="dhcl train", default=default, args=words)
    before = flat_options(base)
    given = flat_options(parsed.options)
    return with_changes(base, {k: v for k, v in given.items() if v != before[k]})
