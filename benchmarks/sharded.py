"""Clustering over several processes, beside one: ``python -m benchmarks.sharded``.

Every rank is a process with one thread, on CPUs over Gloo. There the time of a row is the
processor's, of the rank that takes longest: ranks that share cores would wait for each other by the
clock. With several GPUs each has a rank, over NCCL; with one, one rank makes the same calls; the
time is the clock's then. Peak memory is that of the rank which has most, beyond its rows. The note
says what a rank sends, in bytes a row and by stage.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

import dhcl_ops
from benchmarks.harness import (
    Bench,
    OneCall,
    Row,
    add_arguments,
    case_label,
    max_difference,
    measured_call,
)
from benchmarks.inputs import identities
from benchmarks.results import Ceilings, Results, format_bytes
from dhcl_ops import sharded
from dhcl_ops.defaults import SPCL

WIDTH = 256
PER_IDENTITY = 20.0
RANKS = (2, 4)
SIZES = (20_000, 60_000)
QUICK_SIZES = (2_000,)
# Rows of a rank where their number grows with the ranks'.
SHARE, QUICK_SHARE = 10_000, 500
CPU_TIMING = "CPU seconds"


@dataclass(frozen=True)
class Measured:
    """What one rank measured and found.

    Attributes:
        call: its time and memory.
        traffic: bytes sent, by stage.
        rows: of this rank.
        result: its own part.
    """

    call: OneCall
    traffic: dict[str, int]
    rows: int
    result: Any


def one_knn(rows: torch.Tensor) -> Any:
    """Neighbour lists, by one process."""
    return dhcl_ops.knn(rows, SPCL.k1)[:2]


def one_cluster(rows: torch.Tensor) -> Any:
    """Labels, by one process."""
    return dhcl_ops.cluster(rows).labels


def many_knn(rows: torch.Tensor, traffic: dict[str, int]) -> Any:
    """Neighbour lists of own rows."""
    return sharded.knn(rows, SPCL.k1, traffic=traffic)[:2]


def many_cluster(rows: torch.Tensor, traffic: dict[str, int]) -> Any:
    """Labels of own rows."""
    return sharded.cluster(rows, traffic=traffic).labels


CALLS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "knn": (one_knn, many_knn),
    "cluster": (one_cluster, many_cluster),
}


def _rank(rank: int, world: int, folder: Path, op: str, size: tuple[int, int], cuda: bool) -> None:
    """One rank: 0 of 0 is a process that is alone and knows nothing of others."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
        )
    count, width = size
    share = -(-count // max(world, 1))
    begin, end = min(rank * share, count), min((rank + 1) * share, count)
    traffic: dict[str, int] = {}
    alone, together = CALLS[op]

    def call(rows: torch.Tensor) -> Any:
        if not world:
            return alone(rows)
        traffic.clear()
        return together(rows, traffic)

    generator = torch.Generator().manual_seed(rank)
    call(functional.normalize(torch.randn(200, width, generator=generator)).to(device))
    flat = np.fromfile(folder / "rows", np.float32, (end - begin) * width, offset=4 * begin * width)
    rows = torch.from_numpy(flat.reshape(end - begin, width)).to(device)
    result, took = measured_call(lambda: call(rows), device)
    parts = [part.cpu() for part in result] if isinstance(result, tuple) else result.cpu()
    measured = Measured(took, traffic, end - begin, parts)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(measured))
    if world:
        dist.destroy_process_group()


def on_ranks(world: int, op: str, rows: torch.Tensor, cuda: bool) -> list[Measured]:
    """Measure an op on so many ranks; 0 is a process that is alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.numpy().tofile(folder / "rows")
        size = (len(rows), rows.shape[1])
        start_processes(  # type: ignore[no-untyped-call]
            _rank, (world, folder, op, size, cuda), nprocs=max(world, 1), start_method="spawn"
        )
        files = [folder / f"{rank}.pickle" for rank in range(max(world, 1))]
        return [pickle.loads(file.read_bytes()) for file in files]


def whole(ranks: Sequence[Measured]) -> Any:
    """The results of all ranks, one after another."""
    if isinstance(ranks[0].result, list):
        return [torch.cat(parts) for parts in zip(*(each.result for each in ranks), strict=True)]
    return torch.cat([each.result for each in ranks])


def sent(ranks: Sequence[Measured]) -> str:
    """What a rank sends, in bytes a row on average, by stage."""
    rows = sum(each.rows for each in ranks)
    stages = dict.fromkeys(stage for each in ranks for stage in each.traffic)
    totals = {s: sum(each.traffic.get(s, 0) for each in ranks) / rows for s in stages}
    parts = ", ".join(f"{stage} {size:,.0f}" for stage, size in totals.items() if size >= 0.5)
    return f"sends {sum(totals.values()):,.0f} bytes a row: {parts}" if parts else ""


def row(
    bench: Bench, op: str, params: Mapping[str, Any], ranks: Sequence[Measured], world: int
) -> Row:
    """The row of a measurement."""
    cuda = bench.device.type == "cuda"
    seconds = max(each.call.seconds if cuda else each.call.cpu_seconds for each in ranks)
    shares = format_bytes(max(4 * each.rows * params["d"] for each in ranks))
    note = "; ".join(filter(None, (f"rows of a rank {shares}", sent(ranks))))
    variant = "one process" if not world else f"{world} rank{'s' if world > 1 else ''}"
    return Row(
        op=op, variant=variant, params=dict(params), device=bench.device.type, threads=1,
        seconds=seconds, iqr_seconds=None, runs=1, calls=1, bytes_moved=0, flop=0,
        peak_extra_bytes=max(each.call.peak for each in ranks), baseline="one process",
        timing="calls" if cuda else CPU_TIMING, note=note,
    )  # fmt: skip


def compare(bench: Bench, op: str, size: int, worlds: Sequence[int]) -> None:
    """An op on one process and on each number of ranks, whose results must be its."""
    params = {"N": size, "d": WIDTH}
    label = f"sharded {op}"
    if not bench.wanted(label, params):
        return
    print(case_label(label, params), file=sys.stderr, flush=True)
    rows = identities(size, WIDTH, PER_IDENTITY)
    cuda = bench.device.type == "cuda"
    one = on_ranks(0, op, rows, cuda)
    made = [row(bench, label, params, one, 0)]
    for world in worlds:
        many = on_ranks(world, op, rows, cuda)
        each = row(bench, label, params, many, world)
        each.max_difference = max_difference(whole(many), whole(one))
        each.speedup = made[0].seconds / each.seconds
        made.append(each)
    made[0].speedup = 1.0
    bench.add_rows(made)


def weak_scaling(bench: Bench, share: int, worlds: Sequence[int]) -> None:
    """Clustering with so many rows on each rank, of more and more ranks."""
    for world in worlds:
        params = {"N": share * world, "d": WIDTH, "rows of a rank": share}
        if bench.wanted("weak scaling", params):
            rows = identities(share * world, WIDTH, PER_IDENTITY)
            many = on_ranks(world, "cluster", rows, bench.device.type == "cuda")
            made = row(bench, "weak scaling", params, many, world)
            made.baseline = made.variant
            bench.add_rows([made])


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of rows N")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks")
    parser.add_argument("--share", type=int, help="rows of a rank for weak scaling")
    parser.add_argument("--ops", nargs="+", choices=CALLS, default=[*CALLS])
    options = parser.parse_args(words)
    options.threads = 1
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    worlds = options.ranks or RANKS[: 1 if bench.quick else None]
    if bench.device.type == "cuda":
        worlds = [torch.cuda.device_count()]
    for size in sorted(options.sizes or (QUICK_SIZES if bench.quick else SIZES)):
        for op in options.ops:
            compare(bench, op, size, worlds)
    share = options.share or (QUICK_SHARE if bench.quick else SHARE)
    weak_scaling(bench, share, sorted({1, *worlds}))
    return bench.finish()


if __name__ == "__main__":
    main()
