"""Clustering, bank and loss over several processes, beside one: ``python -m benchmarks.sharded``.

Every rank is a process with one thread, on CPUs over Gloo. There the time of a row is the
processor's, of the rank that takes longest: ranks that share cores would wait for each other by the
clock. With several GPUs each has a rank, over NCCL; with one, one rank makes the same calls; the
time is the clock's then. Peak memory is that of the rank which has most, beyond its rows. The note
says what a rank sends by stage, in bytes a row, or of what is done in every step of a training in
bytes a step. There the batch of all ranks is the same for any number of them, and a step's is the
time.
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
# One image in so many is in no cluster, and its own prototype.
UNCLUSTERED = 11
# Rows of all ranks in a step, and steps that are measured together.
BATCH, STEPS = 256, 50
RANKS = (2, 4)
QUICK_SIZES = (2_000,)
# Rows of a rank where their number grows with the ranks'.
SHARE, QUICK_SHARE = 10_000, 500
CPU_TIMING = "CPU seconds"


@dataclass(frozen=True)
class Own:
    """What a rank has before anything is measured.

    Attributes:
        rows: (n, d) its rows.
        begin, total: the first of them among all rows, and the number of those.
        rank, world: its number, and how many there are; 0 of 0 is a process that is alone.
        traffic: takes the bytes that it sends, by stage.
    """

    rows: torch.Tensor
    begin: int
    total: int
    rank: int
    world: int
    traffic: dict[str, int]


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


def knn(own: Own) -> Callable[[], Any]:
    """Neighbour lists of own rows."""

    def call() -> Any:
        if not own.world:
            return dhcl_ops.knn(own.rows, SPCL.k1)[:2]
        return sharded.knn(own.rows, SPCL.k1, traffic=own.traffic)[:2]

    return call


def cluster(own: Own) -> Callable[[], Any]:
    """Labels of own rows."""

    def call() -> Any:
        if not own.world:
            return dhcl_ops.cluster(own.rows).labels
        return sharded.cluster(own.rows, traffic=own.traffic).labels

    return call


def _filled(own: Own) -> Any:
    """A bank of own rows, with classes whose members lie anywhere."""
    n, d = own.rows.shape
    device = own.rows.device
    bank: Any = sharded.MemoryBank if own.world else dhcl_ops.MemoryBank
    bank = bank(n, d, device=device) if own.world else bank(n, d).to(device)
    bank.init(own.rows)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(own.total, generator=generator) % max(own.total // int(PER_IDENTITY), 1)
    labels[::UNCLUSTERED] = -1
    bank.set_labels(labels[own.begin : own.begin + n].to(device))
    return bank


def fill(own: Own) -> Callable[[], Any]:
    """A bank is made, filled and given labels; the prototypes of this rank."""

    def call() -> Any:
        bank = _filled(own)
        if own.world:
            own.traffic.update(bank.traffic)
        return bank.prototypes

    return call


def _batches(own: Own) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of each step's batch: features of unit length, and images."""
    generator = torch.Generator().manual_seed(1)
    share = -(-BATCH // max(own.world, 1))
    part = slice(own.rank * share, (own.rank + 1) * share)
    batches = []
    for _ in range(STEPS):
        features = torch.randn(BATCH, own.rows.shape[1], generator=generator)
        images = torch.randint(0, own.total, (BATCH,), generator=generator)
        features = functional.normalize(features)
        batches.append((features[part].to(own.rows.device), images[part].to(own.rows.device)))
    return batches


def update(own: Own) -> Callable[[], Any]:
    """Steps' rows of the bank are moved; the prototypes of this rank."""
    bank, batches = _filled(own), _batches(own)

    def call() -> Any:
        before = dict(bank.traffic) if own.world else {}
        for features, images in batches:
            bank.update_(features, images)
        if own.world:
            after = bank.traffic.items()
            own.traffic.update({name: size - before.get(name, 0) for name, size in after})
        return bank.prototypes

    return call


def loss(own: Own) -> Callable[[], Any]:
    """Steps' losses before the prototypes of all ranks, and back; the last gradient."""
    bank, batches = _filled(own), _batches(own)
    # Summed, since each rank's mean would be one over its own rows.
    options: dict[str, Any] = {"kappa": 0.25, "beta": 0.1, "reduction": "sum"}
    function: Any = dhcl_ops.debiased_contrastive_loss
    if own.world:
        function = sharded.debiased_contrastive_loss
        options["traffic"] = own.traffic

    def call() -> Any:
        gradient = None
        for features, images in batches:
            own_features = features.clone().requires_grad_()
            positives = bank.proto_of[images].long()
            function(own_features, bank.prototypes, positives, **options).backward()
            gradient = own_features.grad
        return gradient

    return call


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        prepare: makes the call that is measured, of what a rank has.
        sizes: numbers of rows N.
        steps: how often the call does it.
    """

    prepare: Callable[[Own], Callable[[], Any]]
    sizes: tuple[int, ...] = (20_000, 200_000)
    steps: int = 0


TASKS: Mapping[str, Task] = {
    # Of a clustering of many rows it is nearly all, which need not be measured twice.
    "knn": Task(knn, (20_000,)),
    "cluster": Task(cluster),
    "bank": Task(fill),
    "update": Task(update, steps=STEPS),
    "loss": Task(loss, steps=STEPS),
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
    prepare, few = TASKS[op].prepare, 200
    generator = torch.Generator().manual_seed(rank)
    first = functional.normalize(torch.randn(few, width, generator=generator)).to(device)
    prepare(Own(first, rank * few, max(world, 1) * few, rank, world, {}))()
    flat = np.fromfile(folder / "rows", np.float32, (end - begin) * width, offset=4 * begin * width)
    rows = torch.from_numpy(flat.reshape(end - begin, width)).to(device)
    own = Own(rows, begin, count, rank, world, {})
    result, took = measured_call(prepare(own), device)
    parts = [part.cpu() for part in result] if isinstance(result, tuple) else result.cpu()
    measured = Measured(took, own.traffic, end - begin, parts)
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


def sent(ranks: Sequence[Measured], steps: int) -> str:
    """What a rank sends, in bytes a row or a step on average, by stage."""
    times, unit = (steps * len(ranks), "step") if steps else (sum(r.rows for r in ranks), "row")
    stages = dict.fromkeys(stage for each in ranks for stage in each.traffic)
    totals = {s: sum(each.traffic.get(s, 0) for each in ranks) / times for s in stages}
    parts = ", ".join(f"{stage} {size:,.0f}" for stage, size in totals.items() if size >= 0.5)
    return f"sends {sum(totals.values()):,.0f} bytes a {unit}: {parts}" if parts else ""


def row(
    bench: Bench, op: str, params: Mapping[str, Any], ranks: Sequence[Measured], world: int,
    steps: int = 0,
) -> Row:  # fmt: skip
    """The row of a measurement."""
    cuda = bench.device.type == "cuda"
    seconds = max(each.call.seconds if cuda else each.call.cpu_seconds for each in ranks)
    shares = format_bytes(max(4 * each.rows * params["d"] for each in ranks))
    note = "; ".join(filter(None, (f"rows of a rank {shares}", sent(ranks, steps))))
    variant = "one process" if not world else f"{world} rank{'s' if world > 1 else ''}"
    return Row(
        op=op, variant=variant, params=dict(params), device=bench.device.type, threads=1,
        seconds=seconds / max(steps, 1), iqr_seconds=None, runs=1, calls=max(steps, 1),
        bytes_moved=0, flop=0, peak_extra_bytes=max(each.call.peak for each in ranks),
        baseline="one process", timing="calls" if cuda else CPU_TIMING, note=note,
    )  # fmt: skip


def compare(bench: Bench, op: str, size: int, worlds: Sequence[int]) -> None:
    """An op on one process and on each number of ranks, whose results must be its."""
    params, steps = {"N": size, "d": WIDTH}, TASKS[op].steps
    if steps:
        params["B"] = BATCH
    label = f"sharded {op}"
    if not bench.wanted(label, params):
        return
    print(case_label(label, params), file=sys.stderr, flush=True)
    rows = identities(size, WIDTH, PER_IDENTITY)
    cuda = bench.device.type == "cuda"
    one = on_ranks(0, op, rows, cuda)
    alone = row(bench, label, params, one, 0, steps)
    alone.speedup = 1.0
    bench.add_rows([alone])
    for world in worlds:
        many = on_ranks(world, op, rows, cuda)
        each = row(bench, label, params, many, world, steps)
        each.max_difference = max_difference(whole(many), whole(one))
        each.speedup = alone.seconds / each.seconds
        bench.add_rows([each])


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
    parser.add_argument("--ops", nargs="+", choices=TASKS, default=[*TASKS])
    options = parser.parse_args(words)
    options.threads = 1
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    worlds = options.ranks or RANKS[: 1 if bench.quick else None]
    if bench.device.type == "cuda":
        worlds = [torch.cuda.device_count()]
    for op in options.ops:
        for size in sorted(options.sizes or (QUICK_SIZES if bench.quick else TASKS[op].sizes)):
            compare(bench, op, size, worlds)
    share = options.share or (QUICK_SHARE if bench.quick else SHARE)
    weak_scaling(bench, share, sorted({1, *worlds}))
    return bench.finish()


if __name__ == "__main__":
    main()
