"""What a machine is and what it can do: facts, memory bandwidth and rates of matrix products."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.results import RATES, Ceilings


def timer(call: Callable[[], Any], threads: int) -> Timer:
    """A timer of ``call``; torch's Timer synchronises with the accelerator around each block."""
    return Timer("call()", globals={"call": call}, num_threads=threads)


def measure_ceilings(
    device: torch.device | str,
    threads: int,
    seconds: float = 0.5,
    array_bytes: int | None = None,
    matrix_size: int | None = None,
) -> Ceilings:
    """Measure memory bandwidth and matrix product rates, ``seconds`` for each.

    The fastest run counts, as a ceiling is an upper limit. ``array_bytes`` defaults to several
    times the last cache level, within an eighth of the memory.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    if array_bytes is None:
        if cuda:
            total, cache = torch.cuda.get_device_properties(device).total_memory, 256 << 20
        else:
            total, cache = _ram_bytes() or 4 << 30, _cache_bytes()
        array_bytes = min(max(256 << 20, 2 * cache), total // 8)

    rates = {}
    for rate in RATES if cuda else RATES[:1]:
        rates[rate] = _product_rate(device, threads, seconds, rate, matrix_size)
    copy, read = _bandwidths(device, threads, seconds, array_bytes)
    return Ceilings(device.type, threads, copy, read, rates)


def _fastest(call: Callable[[], Any], threads: int, seconds: float) -> float:
    return min(timer(call, threads).blocked_autorange(min_run_time=seconds).times)


def _bandwidths(
    device: torch.device, threads: int, seconds: float, array_bytes: int
) -> tuple[float, float]:
    """Bytes per second of a copy (read and written) and of a read-only reduction."""
    source = torch.ones(max(array_bytes // 4096, 1), 1024, device=device)
    size = source.numel() * source.element_size()
    target, vector = torch.empty_like(source), torch.ones(1024, device=device)
    copy = 2 * size / _fastest(lambda: target.copy_(source), threads, seconds)
    # Which reduction reaches the bandwidth depends on the device and on the threads.
    reductions = (lambda: source.sum(), lambda: source.mv(vector))
    return copy, size / min(_fastest(call, threads, seconds / 2) for call in reductions)


def _product_rate(
    device: torch.device, threads: int, seconds: float, rate: str, size: int | None
) -> float:
    """Floating-point operations per second of a square matrix product."""
    n = size or (8192 if device.type == "cuda" else 2048)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(rate, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    call = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if rate == "tf32" else "highest")
    try:
        return 2 * n**3 / _fastest(call, threads, seconds)
    finally:
        torch.set_float32_matmul_precision(precision)


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cache_bytes() -> int:
    """Size of the last cache level in bytes, 32 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def _command(*words: str) -> str | None:
    """Output of a command, None if it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine_facts(threads: int, repository: str | Path = Path(__file__).parent) -> dict[str, Any]:
    """Hardware, software and source version of this run; sizes in bytes.

    ``git_dirty`` tells of changed tracked files: new files, such as results, do not count.
    """
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x for x in lines if x.startswith("model name")).split(":", 1)[1].strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    git = ("git", "--no-optional-locks", "-C", str(repository))
    status = _command(*git, "status", "--porcelain", "--untracked-files=no")
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "ram_bytes": _ram_bytes(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": None,
        # A copy without its history is told where it comes from.
        "git_commit": _command(*git, "rev-parse", "--verify", "--quiet", "HEAD")
        or os.environ.get("DHCL_COMMIT"),
        "git_dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["gpu"] = properties.name
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_driver"] = driver.splitlines()[0] if driver else None
    return facts
