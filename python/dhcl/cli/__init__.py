"""The command ``dhcl``: training, what uses a trained model or saved features, and tools.

Exit status: 0 done, 1 a run that could not go on, 2 a wrong option or wrong data, 128 + n a run
that signal n interrupted. Without the extra ``train`` only ``dhcl doctor`` works.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import sys
import warnings
from collections.abc import Sequence

from dhcl.errors import DHCLError
from dhcl.words import did_you_mean

__all__ = ["main"]

_COMMANDS = {
    "train": "train a model on images without labels, or go on with a run",
    "eval": "evaluate a run's model",
    "export": "give a model's features, or the model, to other programs",
    "index": "make an index of a folder of images, or change one",
    "search": "find the people of some images in an index",
    "cluster": "cluster saved features or a folder of images",
    "rerank": "re-rank saved features",
    "metrics": "evaluate saved features",
    "synth": "draw pedestrians: a data set of any size, with identities",
    "demo": "draw data, train every preset on it and compare, in minutes",
    "pretrain": "draw pedestrians and learn them, for weights to start from",
    "report": "write what a run did as one HTML file",
    "compare": "write the charts of several runs as one HTML file",
    "doctor": "report versions, compilers and what runs each op",
}
_LIBRARIES = (
    "torchvision",
    "timm",
    "accelerate",
    "scikit-learn",
    "tensorboard",
    "tyro",
    "Pillow",
    "plotly",
    "pydantic",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name = argv[0]
    if name not in _COMMANDS:
        hint = did_you_mean(name, _COMMANDS)
        return _fail(f"there is no command {name!r}{hint}\n{_usage()}", 2)
    if name == "doctor":
        return _doctor(argv[1:])
    try:
        from dhcl.cli import commands  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("dhcl", "dhcl_ops"):
            raise
        return _fail(f"`dhcl {name}` needs {error.name}: pip install 'dhcl[train]'", 2)
    return _guarded(name, argv[1:])


def _guarded(name: str, arguments: list[str]) -> int:
    """Run a command; turn what can go wrong into one message and a status."""
    from dhcl.cli import commands

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # From inside libraries; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Sparse invariant checks")
    warnings.filterwarnings("ignore", "This DataLoader will create")
    try:
        commands.COMMANDS[name](arguments)
    except DHCLError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("stopped", 128 + signal.SIGINT)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except SystemExit as error:  # tyro's, after its own message or the help
        return int(error.code or 0)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"dhcl: {message}", file=sys.stderr)
    return status


def _usage() -> str:
    lines = [f"  {name:<10}{what}" for name, what in _COMMANDS.items()]
    more = "`dhcl COMMAND --help` shows the options of a command."
    return "\n".join(["usage: dhcl COMMAND [OPTIONS]", "", *lines, "", more])


def _doctor(arguments: list[str]) -> int:
    """The ops' report, and the versions of what the trainer stands on."""
    from dhcl_ops._doctor import main as ops_report

    status = ops_report(arguments)
    if "--json" in arguments:
        return status
    print("trainer")
    for name in _LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed; pip install 'dhcl[train]'"
        print(f"  {name:<13}{version}")
    return status
