"""The doctor: what was found here, which implementation each op runs, and whether it agrees."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from dhcl_ops import _build, _library, _ops
from dhcl_ops._version import __version__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cupy() -> str | None:
    names = [d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"]]
    found = sorted({n for n in names if n.startswith("cupy")})
    return f"{found[0]} {_version(found[0])}" if found else None


def _implementation(op: _ops.Op, device_type: str, status: _library.Status) -> dict[str, str]:
    """Which code runs this op on a device, and why not a compiled kernel where it does not."""
    extension = {"cpu": "cpp", "cuda": "cu"}[device_type]
    if op.composed:
        return {"runs": op.composed, "why": "no kernel of its own"}
    if op.compiled(device_type):
        return {"runs": f"csrc/{op.family}.{extension}", "why": status.how}
    if device_type == "cuda" and op.cuda_library and status.how != "reference":
        return {"runs": f"PyTorch ({op.cuda_library})", "why": "torch's own kernel is the best one"}
    return {"runs": "PyTorch reference", "why": status.reason or "no compiled kernel"}


def _agreement(op: _ops.Op, device: torch.device) -> str:
    """Run the op and its reference on the same small arguments and compare all tensors."""
    ours, theirs = op.sample(device), op.sample(device)
    got, expected = op.overload(*ours), op.reference(*theirs)

    def tensors(arguments: tuple[Any, ...], result: Any) -> list[torch.Tensor]:
        results = result if isinstance(result, tuple) else (result,)
        return [t for t in (*arguments, *results) if isinstance(t, torch.Tensor)]

    worst = 0.0
    for a, b in zip(tensors(ours, got), tensors(theirs, expected), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"WRONG: {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        if a.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    if worst == 0.0:
        return "same bits as the reference"
    return f"{'within' if worst < 1e-5 else 'WRONG: off by'} {worst:.1e} of the reference"


def examine(*, load: bool = True) -> dict[str, Any]:
    """Everything the report says, as plain data; ``load=False`` builds and loads nothing."""
    compiler, nvcc = _build.find_compiler(), _build.find_nvcc()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    report: dict[str, Any] = {
        "versions": {
            "dhcl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda or "none, a build without CUDA",
            "numpy": _version("numpy"),
            "ninja": _version("ninja"),
            "cupy": _cupy() or "not installed (optional)",
        },
        "machine": {
            "platform": platform.platform(),
            "CPU threads": torch.get_num_threads(),
            "GPU": ", ".join(
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            )
            or "none visible",
        },
        "compilers": {
            "C++": f"{compiler.version} ({compiler.path})" if compiler else "not found",
            "nvcc": f"{nvcc.release} in {nvcc.home}, from {nvcc.found_by}" if nvcc else "not found",
        },
        "build": {
            "DHCL_BUILD": os.environ.get("DHCL_BUILD") or "not set (auto)",
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or "not set",
        },
    }
    try:
        report["build"]["cache"] = str(_build.cache_root())
    except _build.BuildError as error:
        report["build"]["cache"] = error.reason
    if not load:
        return report
    status = _library.status()
    report["library"] = {
        "how": status.how,
        "path": str(status.path) if status.path else None,
        "cuda": status.cuda,
        "reason": status.reason,
        "advice": status.advice,
        "line": status.line,
        "record": status.record,
    }
    report["ops"] = {
        op.name: {
            "cpu": _implementation(op, "cpu", status),
            "cuda": _implementation(op, "cuda", status),
            **{f"check on {d.type}": _agreement(op, d) for d in devices},
        }
        for op in _ops.OPS.values()
    }
    return report


def _render(report: dict[str, Any]) -> str:
    lines = []
    for title in ("versions", "machine", "compilers", "build"):
        lines.append(title)
        width = max(len(name) for name in report[title])
        lines += [f"  {name:<{width}}  {value}" for name, value in report[title].items()]
    if "library" in report:
        lines += ["library", f"  {report['library']['line']}"]
        record = report["library"]["record"]
        if record.get("architectures"):
            lines.append(f"  CUDA architectures: {record['architectures']}")
        lines.append("ops")
        for name, op in report["ops"].items():
            lines.append(f"  dhcl::{name}")
            for device in ("cpu", "cuda"):
                lines.append(f"    {device:<5} {op[device]['runs']} ({op[device]['why']})")
            for key, value in op.items():
                if key.startswith("check"):
                    lines.append(f"    {key}: {value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m dhcl_ops") -> int:
    """Print the report; exit status 1 if an op disagrees with its reference.

    Args:
        arguments: words of the command line, by default this process's.
        prog: the command, as its help calls it.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Report versions, compilers, the compiled library, and what runs each op.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-build", action="store_true", help="only look; build and load nothing")
    parser.add_argument(
        "--rebuild", action="store_true", help="forget an earlier build, or its failure, first"
    )
    options = parser.parse_args(arguments)
    if options.rebuild:
        try:
            _build.forget(_build.plan())
        except _build.BuildError as error:
            print(f"nothing to rebuild: {error.reason}; {error.advice}")
    report = examine(load=not options.no_build)
    print(json.dumps(report, indent=1, default=str) if options.json else _render(report))
    wrong = [
        name
        for name, op in report.get("ops", {}).items()
        if any(str(value).startswith("WRONG") for value in op.values())
    ]
    return 1 if wrong else 0
