"""Functions run by several processes over Gloo, for tests of what is sharded."""

import datetime
import pickle
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _one(rank, world, folder, seconds, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        result = function(rank, world, *args)
    except Exception as error:
        traceback.print_exc()
        result = error
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if not isinstance(result, Exception):
        dist.destroy_process_group()


def on_ranks(world, folder, function, *args, seconds=60):
    """What ``function(rank, world, *args)`` returned or raised on each rank.

    A rank that was killed has None. ``seconds`` is how long ranks wait for one another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(
        _one,
        (world, folder, seconds, function, args),
        nprocs=world,
        join=False,
        start_method="spawn",
    )
    for process in context.processes:
        process.join(120)
        assert process.exitcode is not None, "a rank did not end"
    files = [folder / f"{rank}.pickle" for rank in range(world)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def shares_of(kind, rows, world):
    """Rows of each rank: as torch.chunk has them, uneven, or all on the last rank."""
    if kind == "even":
        share = -(-rows // world)
        return [max(0, min(share, rows - rank * share)) for rank in range(world)]
    if kind == "one":
        return [0] * (world - 1) + [rows]
    sizes = [
        rows * (rank + 1) ** 2 // sum((i + 1) ** 2 for i in range(world)) for rank in range(world)
    ]
    sizes[0] += rows - sum(sizes)
    return sizes


def own_slice(kind, rows, rank, world):
    """The rows of this rank."""
    sizes = shares_of(kind, rows, world)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
