"""Which implementation runs: a prebuilt library, else one built once, else the PyTorch reference.

The policy is here and nowhere else. The library is looked for at the first call of an op, not at
import; whatever is chosen is said in one line through the logger ``dhcl_ops``. ``DHCL_BUILD``
narrows the choice: ``aot`` takes a prebuilt library or none, ``jit`` builds even where a prebuilt
one lies, ``off`` keeps to the reference.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal

import torch

from dhcl_ops import _build

logger = logging.getLogger("dhcl_ops")

PREBUILT = Path(__file__).resolve().parent / "_prebuilt.so"
MODES = ("auto", "aot", "jit", "off")


@dataclasses.dataclass(frozen=True)
class Status:
    """What runs in this process and why.

    ``how`` is ``"prebuilt"``, ``"built"`` or ``"reference"``; ``path`` the library's file, if any;
    ``cuda`` whether it holds CUDA kernels; ``reason`` why not more; ``advice`` what to do about it.
    """

    how: Literal["prebuilt", "built", "reference"]
    path: Path | None
    cuda: bool
    reason: str
    advice: str
    record: dict[str, Any]

    @property
    def line(self) -> str:
        """The one line that tells a user which implementation runs, why, and what to do."""
        if self.how == "reference":
            text = f"pure PyTorch reference, equal but slower: {self.reason}"
        else:
            what = "C++ and CUDA kernels" if self.cuda else "C++ kernels, no CUDA kernels"
            seconds = self.record.get("built_now")
            made = "prebuilt" if self.how == "prebuilt" else "built on this machine"
            text = f"{what}, {made}{f' in {seconds:.0f} s' if seconds else ''}, {self.path}"
            if self.reason:
                text += f" ({self.reason})"
        return f"dhcl_ops: {text}" + (f"; {self.advice}" if self.advice else "")


def mode() -> str:
    """The build mode from ``DHCL_BUILD``; raises ``ValueError`` for an unknown one."""
    value = os.environ.get("DHCL_BUILD", "") or "auto"
    if value not in MODES:
        raise ValueError(f"DHCL_BUILD must be one of {', '.join(MODES)} (got {value!r})")
    return value


def _load(path: Path) -> str:
    """Load a library; returns why that failed, empty if it did not."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error).splitlines()[0]
    return ""


def _prebuilt() -> tuple[Status | None, str]:
    """The prebuilt library if it fits, and why it is not taken otherwise."""
    if not PREBUILT.is_file():
        return None, "no prebuilt library in this installation"
    record_path = PREBUILT.with_suffix(".json")
    try:
        record = json.loads(record_path.read_text())
    except (OSError, ValueError):
        record = {}
    if not isinstance(record, dict) or record.get("sources") != _build.source_hash():
        return None, f"{PREBUILT} was made from other sources"
    problem = _load(PREBUILT)
    if problem:
        return None, f"{PREBUILT} does not load here: {problem}"
    cuda = bool(record.get("cuda"))
    reason = "" if cuda else str(record.get("why_no_cuda", ""))
    return Status("prebuilt", PREBUILT, cuda, reason, "", record), ""


def _built() -> Status:
    plan = _build.plan()
    built = _build.build(plan, announce=lambda text: logger.warning("dhcl_ops: %s", text))
    problem = _load(built.path)
    if problem:
        raise _build.BuildError(
            f"{built.path} does not load: {problem}", "retry with `python -m dhcl_ops --rebuild`"
        )
    record = {**built.record, "built_now": built.seconds}
    return Status("built", built.path, built.cuda, plan.why_no_cuda, "", record)


def _choose() -> Status:
    wanted = mode()
    if wanted == "off":
        return Status("reference", None, False, "DHCL_BUILD=off", "", {})
    why_not = ""
    if wanted in {"auto", "aot"}:
        status, why_not = _prebuilt()
        if status is not None:
            return status
        if wanted == "aot":
            advice = "DHCL_BUILD=aot pip install --no-build-isolation . builds it"
            return Status("reference", None, False, f"DHCL_BUILD=aot and {why_not}", advice, {})
    try:
        return _built()
    except _build.BuildError as error:
        return Status("reference", None, False, error.reason, error.advice, {})


_status: Status | None = None
_lock = threading.Lock()


def load_once() -> bool:
    """Load the library at the first call; True if the caller found it not loaded yet.

    An op's Python kernel calls this first. After True the compiled kernels, if any, have taken
    over, and the op is to be called once more.
    """
    global _status
    if _status is not None:
        return False
    with _lock:
        if _status is None:
            chosen = _choose()
            level = logging.WARNING if chosen.how == "reference" else logging.INFO
            if chosen.reason == "DHCL_BUILD=off":
                level = logging.INFO
            logger.log(level, chosen.line)
            _status = chosen
    return True


def status() -> Status:
    """What runs in this process; loads (and builds, where needed) first.

    Call it up front where a first call in the middle would be in the way: before timing, before
    capturing a CUDA graph, before forking workers.
    """
    load_once()
    assert _status is not None
    return _status
