"""Loggers of other projects that follow a run too, such as MLflow and W&B: Accelerate's trackers.

Each one's own settings, as of its server, are those of its environment variables.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dhcl.config import TrainConfig, flat_options
from dhcl.errors import ConfigError
from dhcl.files import write_atomic
from dhcl.stored import read_json
from dhcl.words import first_line, show

__all__ = ["Trackers", "check_trackers"]

PROJECT = "dhcl"
"""Name of the experiment or project, unless an environment variable of the logger has another."""

# In the run's folder: which run of each logger this one is.
_FILE = "loggers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`dhcl.errors.ConfigError` where the package of a logger is not installed."""
    there = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in there:
            package = name.replace("_", "-")
            raise ConfigError(f"log_with: {name} is not installed: pip install {package}")


class Trackers:
    """The loggers of a run, which goes on in the same run of each where the logger can do that.

    Args:
        config: of the run; ``log_with`` names the loggers. TensorBoard is not among these, since
            every run writes it in any case.
        say: prints a line, where a logger fails later on: the training goes on without it.

    Raises:
        ConfigError: a logger that can't start, as without its server; or a damaged file of those
            that the run had before.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._trackers: dict[str, Any] = {}
        names = [name for name in dict.fromkeys(config.log_with) if name != "tensorboard"]
        file = config.run / _FILE
        known = _read(file) if names else {}
        options = {name: _plain(value) for name, value in flat_options(config).items()}
        for name in names:
            given = known.get(name)
            try:
                tracker = _tracker(name, config.run, given)
                tracker.start()
                if given is None:  # MLflow refuses other values than it has
                    tracker.store_init_configuration(options)
                    known[name] = _identity(name, tracker)
            except Exception as error:  # each logger has its own
                self.close()
                raise ConfigError(f"log_with: {name} can't start ({_what(error)})") from error
            self._trackers[name] = tracker
        known = {name: identity for name, identity in known.items() if identity is not None}
        if known:
            write_atomic(file, json.dumps(known, indent=1).encode())

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Log numbers by name, those of an epoch."""
        for name, tracker in self._trackers.items():
            try:
                tracker.log(dict(values), step=epoch)
            except Exception as error:  # each logger has its own, and none may end a training
                self._say(f"warning: {name} did not take epoch {epoch + 1} ({_what(error)})")

    def close(self) -> None:
        """Finish the loggers' runs."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self._say(f"warning: {name} did not finish ({_what(error)})")
        self._trackers = {}


def _read(file: Path) -> dict[str, str | None]:
    try:
        known = read_json(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"log_with: {show(file)} can't be read ({error})") from error
    if not isinstance(known, dict) or not all(isinstance(each, str) for each in known.values()):
        raise ConfigError(f"log_with: {show(file)} must hold a name and a text for each logger")
    return known


def _tracker(name: str, run: Path, identity: str | None) -> Any:
    """Accelerate's tracker, which goes on in the logger's run of this identity if there is one."""
    kind, options, project = LOGGER_TYPE_TO_CLASS[name], {}, PROJECT
    title = show(run.resolve().name)
    if name == "mlflow":  # whose tracker lets MLFLOW_EXPERIMENT_NAME go before the project
        options = {"run_name": title, "run_id": identity}
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        options = {"name": title, "id": identity or uuid.uuid4().hex[:8], "resume": "allow"}
        options["dir"] = str(run)
    where = (str(run),) if kind.requires_logging_directory else ()
    return kind(project, *where, **options)


def _identity(name: str, tracker: Any) -> str | None:
    """What names the logger's run, for the loggers that can go on with one."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.id) if name == "wandb" else None


def _plain(value: Any) -> Any:
    """An option as loggers take it: a number, a truth value or text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
