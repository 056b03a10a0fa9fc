"""The command ``dhcl``: training, what uses a trained model or saved features, and tools.

Exit status: 0 done, 1 a run that could not go on, 2 a wrong option or wrong data, 128 + n a run
that signal n interrupted. Without the extra ``train`` only ``dhcl doctor`` works.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from dhcl.cli.table import COMMANDS, usage
from dhcl.errors import DHCLError
from dhcl.words import did_you_mean

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        return _fail(f"there is no command {name!r}{hint}\n{usage()}", 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if name == "demo":
        # Threads of OpenMP wait for each other by turning in circles, which takes many times as
        # long where others use the cores too. It reads this when torch is loaded, later than here.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # From inside libraries; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Sparse invariant checks")
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return _status(name, words)


def _status(name: str, words: list[str]) -> int:
    """Run a command; turn what can go wrong into one message and a status."""
    try:
        return COMMANDS[name](name, words)
    except DHCLError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("stopped", 128 + signal.SIGINT)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("dhcl", "dhcl_ops"):
            raise
        return _fail(f"`dhcl {name}` needs {error.name}: pip install 'dhcl[train]'", 2)
    except SystemExit as error:  # tyro's, after its own message or the help
        return int(error.code or 0)


def _fail(message: str, status: int) -> int:
    print(f"dhcl: {message}", file=sys.stderr)
    return status
