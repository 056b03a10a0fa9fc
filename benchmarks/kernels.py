"""Calls that reach every kernel of ours, for Compute Sanitizer and Nsight Compute to watch.

``python -m benchmarks.kernels --check`` calls every op on its sample and on sizes that fill no tile
evenly; ``--profile`` makes the main calls once at the sizes of Market-1501, warmed up, between
``cudaProfilerStart`` and ``cudaProfilerStop``; ``--shares`` prints which ops take their time.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence

import torch

import dhcl_ops
from benchmarks.families import FAMILIES
from benchmarks.inputs import Call, Sizes, Watched
from benchmarks.results import format_seconds
from dhcl_ops import _ops

# Not multiples of a warp, a tile or a vector load; the last batch takes two launches of the update.
ODD: tuple[Sizes, ...] = ((2, 1, 1), (33, 7, 5), (257, 130, 67), (40, 8, 4097))
FULL: Sizes = (12_936, 2048, 256)
SHOWN = 6  # ops of a call whose share is printed


def calls(family: str, sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The calls of a family's benchmark module that are watched."""
    watched: Watched = importlib.import_module(f"benchmarks.{family}").watched
    return watched(sizes, device)


def check(families: Sequence[str], device: torch.device) -> None:
    """Call everything once on small inputs; each name is printed before its call."""
    for op in _ops.OPS.values():
        if op.family in families:
            print(f"{op.family}: {op.name}", flush=True)
            op.overload(*op.sample(device))
    for family in families:
        for sizes in ODD:
            for name, call in calls(family, sizes, device):
                print(f"{family}: {name} {sizes}", flush=True)
                call()
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(families: Sequence[str], device: torch.device, sizes: Sizes) -> None:
    """Make each call once to warm up and once with the profiler on."""
    for family in families:
        for name, call in calls(family, sizes, device):
            print(f"{family}: {name} {sizes}", flush=True)
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def shares(families: Sequence[str], device: torch.device, sizes: Sizes) -> None:
    """Print, for each call, its seconds and the ops that take most of them."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]
    for family in families:
        for name, call in calls(family, sizes, device):
            call()
            with torch.profiler.profile(activities=activities, acc_events=True) as run:
                call()
            spent = {
                event.key: (
                    event.self_device_time_total
                    if device.type == "cuda"
                    else event.self_cpu_time_total
                )
                for event in run.key_averages()
            }
            total = sum(spent.values())
            print(f"{family}: {name}, {format_seconds(total / 1e6)}")
            for key in sorted(spent, key=lambda key: -spent[key])[:SHOWN]:
                if spent[key] >= total / 100:
                    print(f"  {100 * spent[key] / total:5.1f} %  {key}")


def main(words: Sequence[str] | None = None) -> None:
    """Call what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--check", action="store_true", help="all ops, small odd sizes")
    kind.add_argument("--profile", action="store_true", help="the main calls at full size")
    kind.add_argument("--shares", action="store_true", help="which ops take the main calls' time")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    options = parser.parse_args(words)
    for family in options.family:
        if family not in FAMILIES:
            parser.error(f"no family {family}: expected one of {', '.join(FAMILIES)}")
    families = options.family or [*FAMILIES]
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device (--device cpu makes the same calls on the CPU)")
    status = dhcl_ops.status()
    print(status.line, flush=True)
    if device.type == "cuda" and not status.cuda:
        raise SystemExit("no CUDA kernels to watch")
    if options.check:
        check(families, device)
    elif options.shares:
        shares(families, device, FULL)
    else:
        profile(families, device, FULL)


if __name__ == "__main__":
    main()
