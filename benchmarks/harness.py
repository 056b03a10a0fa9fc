"""Timing, memory and accuracy measurements shared by all benchmark scripts.

A script builds its inputs, hands the variants of one case to :meth:`Bench.run_case` and ends
with :meth:`Bench.finish`. Times are in seconds, sizes in bytes and rates per second everywhere.
The same inputs are used again in every run, so a case that fits into a cache can be faster than
its floor time, which assumes main (or device) memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_facts, measure_ceilings, timer
from benchmarks.results import (
    RATES,
    SCHEMA_VERSION,
    Ceilings,
    Comparison,
    Results,
    Row,
    SchemaError,
    case_label,
    compare,
    format_bytes,
    format_seconds,
    load_results,
    plain,
    render_table,
)

__all__ = [
    "RATES",
    "SCHEMA_VERSION",
    "Bench",
    "Ceilings",
    "Comparison",
    "OneCall",
    "Results",
    "Row",
    "SchemaError",
    "Variant",
    "add_arguments",
    "case_label",
    "compare",
    "format_bytes",
    "format_seconds",
    "load_results",
    "machine_facts",
    "max_difference",
    "measure_ceilings",
    "measured_call",
    "peak_extra_bytes",
    "render_table",
]

ROUNDS = 5  # alternating rounds in which the variants of a case share the time budget
# Calls that take longer than this many time budgets are not repeated: not at all, and not for
# the memory measurement, which slows down a call of many allocations.
ONE_RUN_BUDGETS = 60
MEMORY_BUDGETS = 5


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: ``call`` takes no arguments and returns the result.

    A call that changes its inputs in place needs its own copy of them. ``cuda_graph`` times
    replays of the captured call on CUDA and has no effect on the CPU. ``context`` makes a context
    manager that is entered around each block of calls; its own time does not count.
    """

    name: str
    call: Callable[[], Any]
    cuda_graph: bool = False
    note: str = ""
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def max_difference(result: Any, reference: Any) -> float:
    """Largest absolute difference of two results, which may be nested in tuples or dicts.

    Infinite where structure or shape differ or only one side is NaN.
    """
    if isinstance(result, Mapping) and isinstance(reference, Mapping):
        if result.keys() != reference.keys():
            return math.inf
        return max((max_difference(result[k], reference[k]) for k in result), default=0.0)
    if isinstance(result, (tuple, list)) and isinstance(reference, (tuple, list)):
        if len(result) != len(reference):
            return math.inf
        pairs = zip(result, reference, strict=True)
        return max((max_difference(a, b) for a, b in pairs), default=0.0)
    if result is None or reference is None:
        return 0.0 if result is reference else math.inf
    a, b = torch.as_tensor(result).detach(), torch.as_tensor(reference).detach()
    if a.shape != b.shape:
        return math.inf
    worst = 0.0
    # In chunks, as double precision copies of a whole result might not fit into memory.
    for start in range(0, a.numel(), 1 << 22):
        x = a.reshape(-1)[start : start + (1 << 22)].double()
        y = b.reshape(-1)[start : start + (1 << 22)].to(x.device).double()
        equal = (x == y) | (x.isnan() & y.isnan())
        part = torch.where(equal, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        worst = max(worst, float(part.max()))
    return worst


def _copy(value: Any) -> Any:
    """A copy of a nested result which later in-place calls cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (tuple, list)) else value


def _set_malloc(threshold: int) -> None:
    """Have glibc serve blocks of at least ``threshold`` bytes from pages of their own."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems lack mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


# By default glibc raises the threshold up to here as large blocks are freed. Times depend on it,
# and fixing it makes them independent of what ran before.
TIMING_THRESHOLD = 32 << 20
PEAK_THRESHOLD = 64 << 10


def _resident_bytes(name: str) -> int:
    """``VmRSS`` (resident memory) or ``VmHWM`` (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_extra_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Peak memory in bytes that one call needs above what is allocated before it.

    On CUDA this is what torch's allocator hands out in one call; on the CPU the growth of the
    resident memory, so pages never touched do not count, in the second of two calls. None where
    the system does not tell.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    grad = torch.is_grad_enabled()

    def measure() -> int | None:
        with torch.set_grad_enabled(grad):  # a setting of the thread
            call()  # sets up what libraries keep for each thread
            _set_malloc(PEAK_THRESHOLD)  # gives free pages back, too
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _resident_bytes("VmRSS")
            if _resident_bytes("VmHWM") - before > 4 << 20:  # some sandboxes ignore the reset
                return None
            result = call()
            peak = _resident_bytes("VmHWM")
            del result
            return max(peak - before, 0)

    # Freed memory that glibc still holds must neither hide what the call needs nor count anew
    # when other parts of it are used. So large blocks get pages of their own, and a thread
    # brings an arena that has no gaps from earlier large blocks.
    _set_malloc(PEAK_THRESHOLD)
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(measure).result()
    except (OSError, StopIteration):
        return None
    finally:
        _set_malloc(TIMING_THRESHOLD)


@dataclass(frozen=True)
class OneCall:
    """What one call took.

    Seconds are by the clock and of the processor; the peak is in bytes above what was there before.
    """

    seconds: float
    cpu_seconds: float
    peak: int


def measured_call(call: Callable[[], Any], device: torch.device) -> tuple[Any, OneCall]:
    """Make a call that is too long, or needs too many others, to be made again for its memory.

    What libraries set up in their first call counts, so one that is small should come before.
    """
    _set_malloc(PEAK_THRESHOLD)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
    cpu = time.process_time()
    result, seconds = _timed_call(call, device)
    cpu = time.process_time() - cpu
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = _resident_bytes("VmHWM")
    return result, OneCall(seconds, cpu, peak - before)


def _timed_call(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Call once; returns the result and the seconds taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def capture_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture ``call`` in a CUDA graph; returns the function that replays it."""
    # Capture asks for a warm-up on a side stream.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def _others_seconds() -> float:
    """Processor seconds that other processes have used so far, 0 if the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system = (int(text) / os.sysconf("SC_CLK_TCK") for text in fields[1:4])
    except (OSError, ValueError):
        return 0.0
    own = os.times()
    return user + nice + system - own.user - own.system


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options common to all benchmark scripts."""

    def positive(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    def count(text: str) -> int:
        return int(positive(str(int(text))))

    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="short time budget, for a trial")
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="on a GPU too, measure what takes minutes: compiled variants and dense NumPy",
    )
    parser.add_argument(
        "--seconds", type=positive, help="time budget per row (default: 1, with --quick 0.1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="run cases whose label contains this"
    )


@dataclass
class _Samples:
    """What is known of one variant while its case runs; times in seconds per call."""

    variant: Variant
    call: Callable[[], Any]
    times: list[float]
    calls: int
    estimate: float
    difference: float | None
    peak: int | None = None
    note: str = ""


class Bench:
    """One run of a benchmark script; measures the ceilings at once unless they are given."""

    def __init__(self, args: argparse.Namespace, ceilings: Ceilings | None = None) -> None:
        name = args.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device")
        self.device = torch.device(name)
        self.threads: int = args.threads or torch.get_num_threads()
        self.quick: bool = args.quick
        # A GPU is lent by the minute: what a processor takes minutes for is asked for there.
        thorough = self.device.type == "cpu" or args.thorough
        self.compiled: bool = thorough and not args.quick
        self.dense: bool = thorough
        self.seconds: float = args.seconds or (0.1 if args.quick else 1.0)
        self.only: str = args.only
        self.json: Path | None = args.json
        torch.set_num_threads(self.threads)
        _set_malloc(TIMING_THRESHOLD)
        if ceilings is None:
            budget = min(self.seconds, 0.5)
            ceilings = measure_ceilings(self.device, self.threads, budget)
        self.results = Results(machine_facts(self.threads), ceilings)

    def wanted(self, op: str, params: Mapping[str, Any]) -> bool:
        """Whether ``--only`` selects this case; ask before building large inputs."""
        return self.only in case_label(op, params)

    def run_case(
        self,
        op: str,
        params: Mapping[str, Any],
        variants: Sequence[Variant],
        *,
        baseline: str,
        bytes_read: int = 0,
        bytes_written: int = 0,
        flop: int = 0,
        rate: str = "fp32",
        reference: Any = None,
    ) -> list[Row]:
        """Measure the variants side by side and return one row for each.

        ``bytes_read`` and ``bytes_written`` are the least traffic in bytes, ``flop`` the number
        of operations and ``rate`` the kind of arithmetic (one of ``RATES``). Results are
        compared to ``reference``, by default to what the variant named ``baseline`` returns.
        Every variant's first result counts. Each variant gets the time budget; variants that
        take longer run once after a warm-up, or once at all from ``ONE_RUN_BUDGETS`` on. Those
        that run out of GPU memory are skipped.
        """
        if not self.wanted(op, params):
            return []
        ceilings = self.results.ceilings
        assert ceilings is not None
        floor, kind = ceilings.floor(bytes_read, bytes_written, flop, rate)
        names = [variant.name for variant in variants]
        values = {key: plain(value) for key, value in params.items()}
        if baseline not in names or len(set(names)) < len(names):
            raise ValueError(f"variants {names} must differ and contain the baseline {baseline!r}")
        label = case_label(op, values)
        if label in (case_label(row.op, row.params) for row in self.results.rows):
            raise ValueError(f"{label} was measured before")
        print(label, file=sys.stderr, flush=True)

        samples, crowd = self._measure(label, variants, baseline, reference)
        base = _quantile(samples[baseline].times, 0.5) if baseline in samples else None
        rows = []
        for name, s in ((name, samples[name]) for name in names if name in samples):
            low, seconds, high = (_quantile(s.times, share) for share in (0.25, 0.5, 0.75))
            graph = s.variant.cuda_graph and self.device.type == "cuda"
            rows.append(
                Row(
                    op=op,
                    variant=name,
                    params=values,
                    device=self.device.type,
                    threads=self.threads,
                    seconds=seconds,
                    iqr_seconds=high - low if len(s.times) > 1 else None,
                    runs=len(s.times),
                    calls=s.calls,
                    bytes_moved=bytes_read + bytes_written,
                    flop=flop,
                    floor_seconds=floor,
                    floor_kind=kind,
                    time_over_floor=seconds / floor if floor else None,
                    peak_extra_bytes=s.peak,
                    max_difference=s.difference,
                    baseline=baseline,
                    speedup=base / seconds if base else None,
                    timing="cuda graph" if graph else "calls",
                    note="; ".join(filter(None, (s.variant.note, s.note, crowd))),
                )
            )
        self.add_rows(rows)
        return rows

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Keep the rows of a case, here and in the file: an interrupted run keeps what it has."""
        self.results.rows += rows
        self._save()

    def _measure(
        self, label: str, variants: Sequence[Variant], baseline: str, reference: Any
    ) -> tuple[dict[str, _Samples], str]:
        """Samples of the variants that ran, by name, and a note where others kept cores busy."""
        start, others = time.perf_counter(), _others_seconds()
        samples: dict[str, _Samples] = {}
        # The baseline comes first because its result is the default reference.
        for variant in sorted(variants, key=lambda v: v.name != baseline):
            try:
                with variant.context():
                    first, samples[variant.name] = self._prepare(variant, reference)
            except torch.cuda.OutOfMemoryError:
                self.results.skipped.append(f"{label}: {variant.name}: out of GPU memory")
                continue
            if reference is None and variant.name == baseline:
                reference = first
        active = list(samples.values())
        for turn in range(ROUNDS):
            # Alternating directions, so that no variant always follows the same other one.
            for sample in active if turn % 2 == 0 else reversed(active):
                with sample.variant.context():
                    self._run_round(sample)
        busy = (_others_seconds() - others) / (time.perf_counter() - start)
        for sample in active:  # last, as it leaves the allocator without memory at hand
            if sample.estimate <= MEMORY_BUDGETS * self.seconds:
                with sample.variant.context():
                    sample.peak = peak_extra_bytes(sample.variant.call, self.device)
        return samples, f"other processes kept {busy:.1f} cores busy" if busy > 0.25 else ""

    def _prepare(self, variant: Variant, reference: Any) -> tuple[Any, _Samples]:
        """First calls: a copy of the result if there is no reference yet, and the samples."""
        result, seconds = _timed_call(variant.call, self.device)
        difference = None if reference is None else max_difference(result, reference)
        kept = _copy(result) if reference is None else None
        del result
        sample = _Samples(variant, variant.call, [seconds], 1, seconds, difference)
        if seconds > ONE_RUN_BUDGETS * self.seconds:
            sample.note = "one run, not warmed up"
            return kept, sample
        if variant.cuda_graph and self.device.type == "cuda":
            sample.call = capture_graph(variant.call)
        # The first call of even a long one tells little: it can take ten times as long as the
        # next one, as it sets up libraries and gets its memory from the system.
        _, sample.estimate = _timed_call(sample.call, self.device)
        sample.times = [sample.estimate] if sample.estimate > self.seconds else []
        sample.calls = len(sample.times)
        return kept, sample

    def _run_round(self, sample: _Samples) -> None:
        """Add one round's runs to ``sample``."""
        budget = self.seconds / ROUNDS
        if sample.estimate <= budget:
            # Blocks of a twentieth of the round, until the spread is small or time is up.
            measurement = timer(sample.call, self.threads).adaptive_autorange(
                threshold=0.02, min_run_time=budget / 20, max_run_time=budget
            )
            sample.times += measurement.times
            sample.calls += len(measurement.times) * measurement.number_per_run
        elif not sample.times or sum(sample.times) + sample.estimate <= self.seconds:
            # The autorange would spend a further call on choosing the size of a block.
            _, seconds = _timed_call(sample.call, self.device)
            sample.times.append(seconds)
            sample.calls += 1

    def _save(self) -> None:
        if self.json is not None:
            self.results.save(self.json)

    def finish(self) -> Results:
        """Print the ceilings and the table, write the JSON file, return the results."""
        machine, ceilings = self.results.machine, self.results.ceilings
        if ceilings is not None:
            rates = (f"{k} {v / 1e9:.4g} GFLOP/s" for k, v in ceilings.flop_per_second.items())
            name = machine["gpu"] if ceilings.device == "cuda" else machine["cpu"]
            print(f"{name}, threads={ceilings.threads}, torch {machine['torch']}")
            print(
                f"ceilings: copy {ceilings.copy_bytes_per_second / 1e9:.4g} GB/s, "
                f"read {ceilings.read_bytes_per_second / 1e9:.4g} GB/s, {', '.join(rates)}"
            )
        print(render_table(self.results.rows))
        for text in self.results.skipped:
            print(f"skipped: {text}")
        self._save()
        return self.results


def _quantile(values: Sequence[float], fraction: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(fraction))
