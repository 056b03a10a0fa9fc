"""The command ``dhcl``: training, what uses a trained model or saved features, and tools.

Exit status: 0 done, 1 a run that could not go on, 2 a wrong option or wrong data, 128 + n a run
that signal n interrupted. Whatever goes wrong is said in a message; ``--debug``, or
``DHCL_DEBUG=1`` in the environment, shows the traceback of an error too. Without the extra
``train`` only ``dhcl doctor`` works.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from dhcl.cli.table import COMMANDS, usage
from dhcl.errors import DHCLError
from dhcl.words import did_you_mean, first_line, say, show

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        say(usage())
        return 0 if name else 2
    debug = "--debug" in words or os.environ.get("DHCL_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        return _fail(f"there is no command {name!r}{hint}\n{usage()}", 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if name == "demo":
        # Threads of OpenMP wait for each other by turning in circles, which takes many times as
        # long where others use the cores too. It reads this when torch is loaded, later than here.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Where a process is lost, torch warns of each broken connection with its C++ stack. It
        # reads this when it is loaded, later than here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # From inside libraries; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Sparse invariant checks")
    warnings.filterwarnings("ignore", "This DataLoader will create")
    try:
        return COMMANDS[name](name, words)
    except SystemExit as error:  # tyro's, after its own message or the help
        return int(error.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        return _fail(*_said(name, error))


def _said(name: str, error: BaseException) -> tuple[str, int]:
    """What is said of an error that ended a command, and the exit status."""
    if isinstance(error, DHCLError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 128 + signal.SIGINT
    if isinstance(error, OSError):
        return _of_system(error), 1
    if isinstance(error, ModuleNotFoundError) and not _is_ours(error.name):
        extras = COMMANDS[name].extras
        return f"`dhcl {name}` needs {error.name}: pip install 'dhcl[{extras}]'", 2
    what = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, MemoryError):
        what = f"there is not enough memory ({first_line(error)})"
    return f"{name}: {what}; --debug shows where", 1


def _of_system(error: OSError) -> str:
    """What the system says, and of which file."""
    said = error.strerror or str(error) or type(error).__name__
    files = [os.fsdecode(file) for file in (error.filename, error.filename2) if _is_name(file)]
    return f"{said}: {', '.join(map(show, files))}" if files else said


def _is_name(file: object) -> bool:
    return isinstance(file, (str, bytes, os.PathLike)) and bool(file)


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("dhcl", "dhcl_ops")


def _fail(message: str, status: int) -> int:
    say(f"dhcl: {message}", sys.stderr)
    return status
