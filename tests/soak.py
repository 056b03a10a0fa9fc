"""Trains and calls the ops for hours, and says whether memory, open files and threads stay flat.

    python -m tests.soak --minutes 120 --calls 10000 --out soak
    python -m tests.soak --minutes 0 --out soak    # judge and draw what is there, of a cut-off soak

Two processes run side by side. One trains small runs of many epochs, one after another, as
`dhcl train` does; the other calls every op with random shapes. Each notes after every epoch, or
some calls, what it holds, in `OUT/PART.jsonl`, line by line, so that a soak which is cut short has
its samples. At the end `OUT/soak.json` has figures and verdict and `OUT/soak.png` the curves.

What grows is told by a line fitted to all samples after the warm-up, not by two of them: see
`judged`. The status is 1 where something grows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

import dhcl_ops

# Share of the samples that is warm-up: caches fill, and the allocator meets its largest shapes.
WARM_UP = 0.25
# What may be added between the end of the warm-up and the end: noise of an allocator, but no file.
LIMITS = {"memory": 16.0, "gpu": 16.0, "files": 0.5, "threads": 0.5}
UNITS = {"memory": "MiB allocated", "gpu": "MiB of the GPU", "files": "open files",
         "threads": "threads"}  # fmt: skip
EPOCHS = 50
CALLS_BETWEEN = 20


# ---- samples -------------------------------------------------------------------------------------


def sample(done: int) -> dict[str, float]:
    """What this process holds after so many epochs or calls."""
    process = psutil.Process()
    found = {
        "done": done,
        "seconds": time.monotonic(),
        "memory": own_memory(),
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["gpu"] = (total - free) / 2**20
    return found


def own_memory() -> float:
    """MiB that this process has allocated, also where the system has swapped them out.

    Pages of files, such as those of libraries, come and go as others need memory.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


@contextlib.contextmanager
def sampling(path: Path) -> Iterator[Callable[[int], None]]:
    """A function that appends a sample to the file, at once."""
    with path.open("a") as file:

        def note(done: int) -> None:
            file.write(json.dumps(sample(done)) + "\n")
            file.flush()

        yield note


def samples(path: Path) -> list[dict[str, float]]:
    """Those in a file; of one that is cut short, the whole lines."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def judged(taken: list[dict[str, float]]) -> dict[str, Any]:
    """For each quantity: level, growth from the end of the warm-up to the end, and whether flat.

    Growth is the slope of the line of least squares, times the span that it is fitted to.
    """
    kept = taken[int(len(taken) * WARM_UP) :]
    if len(kept) < 10:
        return {}
    done = np.array([each["done"] for each in kept], float)
    found = {}
    for name, limit in LIMITS.items():
        if name not in kept[0]:
            continue
        values = np.array([each[name] for each in kept], float)
        slope = float(np.polyfit(done, values, 1)[0])
        growth = slope * float(done[-1] - done[0])
        found[name] = {
            "level": round(float(np.median(values)), 2),
            "growth": round(growth, 3),
            "limit": limit,
            "flat": growth <= limit,
        }
    return found


# ---- trainings -----------------------------------------------------------------------------------


def trainings(out: Path, seconds: float) -> None:
    """Train one small run after another until the time is over; the last one is cut short."""
    from dhcl.cli import main
    from dhcl.training.trainer import Trainer

    from tests.dhcl.toy import command_line, options, write_images

    quiet()
    pictures = write_images(out / "pictures")
    end, epochs = time.monotonic() + seconds, itertools.count(1)
    finish = Trainer.finish_epoch
    with sampling(out / "epochs.jsonl") as note:

        def finish_epoch(self: Trainer) -> None:
            finish(self)
            note(next(epochs))
            if time.monotonic() > end:
                raise KeyboardInterrupt

        Trainer.finish_epoch = finish_epoch  # type: ignore[method-assign]
        for number in itertools.count():
            run = out / f"run{number}"
            config = options(pictures, run, epochs=EPOCHS, eval_every=5, workers=1)
            status = main(["train", *command_line(config)])
            shutil.rmtree(run)
            if status:
                break
    shutil.rmtree(pictures)
    if time.monotonic() < end:
        raise SystemExit(f"a training ended with status {status}")


def quiet() -> None:
    """What a training prints goes nowhere; errors are still shown where it ends early."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


# ---- calls ---------------------------------------------------------------------------------------


class Shapes:
    """Arguments of random sizes, on the GPU where there is one."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator().manual_seed(seed)

    def count(self, least: int = 40, most: int = 400) -> int:
        return self.draw.randint(least, most)

    def unit(self, count: int, width: int) -> torch.Tensor:
        rows = torch.randn(count, width, generator=self.generator)
        return F.normalize(rows).to(self.device)

    def labels(self, count: int, classes: int, least: int = 0) -> torch.Tensor:
        drawn = torch.randint(least, classes, (count,), generator=self.generator)
        return drawn.to(self.device)

    def rows(self) -> torch.Tensor:
        return self.unit(self.count(), self.count(8, 256))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and a gallery of one width."""
        width = self.count(8, 256)
        return self.unit(self.count(5, 60), width), self.unit(self.count(), width)

    def graph(self) -> Any:
        return dhcl_ops.jaccard_graph(self.rows(), self.count(6, 30), self.count(1, 6), 0.6)

    def bank(self) -> dhcl_ops.MemoryBank:
        rows = self.rows()
        bank = dhcl_ops.MemoryBank(*rows.shape, device=self.device)
        bank.init(rows)
        # Every class has a member, whatever is drawn.
        classes = self.count(2, 20)
        labels = self.labels(len(rows), classes, -1)
        labels[:classes] = torch.arange(classes, device=self.device)
        bank.set_labels(labels)
        return bank


def _momentum(s: Shapes) -> Any:
    features, bank = s.pair()
    return dhcl_ops.momentum_update_(bank, features, s.labels(len(features), len(bank)), 0.2)


def _least_similar(s: Shapes) -> Any:
    features, bank = s.pair()
    return dhcl_ops.least_similar(features, s.labels(len(features), 9), bank)


def _prototypes(s: Shapes) -> Any:
    bank, classes = s.rows(), s.count(1, 30)
    return dhcl_ops.prototypes(bank, s.labels(len(bank), classes, -1), classes)


def _contrastive(s: Shapes) -> Any:
    features, proxies = s.pair()
    features.requires_grad_()
    labels = s.labels(len(features), len(proxies))
    loss = dhcl_ops.debiased_contrastive_loss(
        features, proxies, labels, temperature=0.05, kappa=0.3, beta=0.2
    )
    loss.backward()
    return loss


def _hybrid(s: Shapes) -> Any:
    bank = s.bank()
    rows, width = bank.features.shape
    features = s.unit(s.count(4, 64), width).requires_grad_()
    indices = s.labels(len(features), rows)
    loss = dhcl_ops.hybrid_contrastive_loss(features, bank, indices, instance_weight=0.25)
    loss.backward()
    bank.update_(features.detach(), indices)
    return loss


def _suspects(s: Shapes) -> Any:
    bank = s.bank()
    return dhcl_ops.suspected_false_negatives(bank, s.labels(len(bank.features), 9, -1))


def _cluster(s: Shapes) -> Any:
    return dhcl_ops.cluster(s.rows(), k1=s.count(6, 30), k2=s.count(1, 6), eps=0.55,
                            self_paced=s.draw.random() < 0.5)  # fmt: skip


def _constrained(s: Shapes) -> Any:
    graph = s.graph()
    rows = graph.shape[0]
    apart = torch.stack([torch.arange(0, rows - 1, 2), torch.arange(1, rows, 2)], 1)
    return dhcl_ops.constrained_dbscan(graph, apart, 0.55, 2)


def _self_paced(s: Shapes) -> Any:
    rows = s.count()
    return dhcl_ops.self_paced_labels(*(s.labels(rows, most, -1) for most in (20, 25, 15)))


def _false_negatives(s: Shapes) -> Any:
    graph = s.graph()
    return dhcl_ops.graph_false_negatives(s.labels(graph.shape[0], 20, -1), graph)


def _cameras(s: Shapes) -> Any:
    rows = s.rows()
    return dhcl_ops.camera_neighbours(rows, s.labels(len(rows), 3), k=8, own=3)


def _ranking(s: Shapes) -> Any:
    query, gallery = s.pair()
    ids = torch.arange(len(query)) % 9, torch.arange(len(gallery)) % 9
    return dhcl_ops.evaluate_ranking((query, gallery), *ids)


def _rerank(s: Shapes) -> Any:
    return dhcl_ops.rerank(*s.pair(), k1=s.count(6, 20), k2=s.count(1, 6))


def _rerank_distances(s: Shapes) -> Any:
    query, gallery = s.pair()
    pairs = ((query, gallery), (query, query), (gallery, gallery))
    return dhcl_ops.rerank_distances(*(torch.cdist(*pair) for pair in pairs), k1=12, k2=3)


CALLS: dict[str, Callable[[Shapes], Any]] = {
    "camera_neighbours": _cameras,
    "cluster": _cluster,
    "constrained_dbscan": _constrained,
    "dbscan": lambda s: dhcl_ops.dbscan(s.graph(), 0.55, 4),
    "debiased_contrastive_loss": _contrastive,
    "evaluate_ranking": _ranking,
    "graph_false_negatives": _false_negatives,
    "hybrid_contrastive_loss": _hybrid,
    "jaccard_distance": lambda s: dhcl_ops.jaccard_distance(s.rows(), s.count(6, 30), 3),
    "jaccard_graph": lambda s: s.graph(),
    "knn": lambda s: dhcl_ops.knn(s.rows(), s.count(1, 40)),
    "least_similar": _least_similar,
    "momentum_update_": _momentum,
    "prototypes": _prototypes,
    "rerank": _rerank,
    "rerank_distances": _rerank_distances,
    "self_paced_labels": _self_paced,
    "suspected_false_negatives": _suspects,
}


def calls(out: Path, count: int) -> None:
    """Call the ops in turn, each time with other sizes."""
    torch.set_num_threads(1)
    shapes = Shapes(seed=0)
    with sampling(out / "calls.jsonl") as note:
        for number, call in enumerate(itertools.islice(itertools.cycle(CALLS.values()), count), 1):
            call(shapes)
            if number % CALLS_BETWEEN == 0:
                note(number)


# ---- both ----------------------------------------------------------------------------------------

PARTS = ("epochs", "calls")


def draw(out: Path, taken: dict[str, list[dict[str, float]]], verdict: dict[str, Any]) -> None:
    """The curves, with the lines that were fitted to them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in LIMITS if any(name in verdict[part] for part in PARTS)]
    size = (11, 2.4 * len(names))
    figure, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        for axis, part in zip(row, PARTS, strict=True):
            about = verdict[part].get(name)
            if about is None:
                continue
            done = np.array([each["done"] for each in taken[part]], float)
            values = np.array([each[name] for each in taken[part]], float)
            first = int(len(done) * WARM_UP)
            line = np.polyval(np.polyfit(done[first:], values[first:], 1), done[first:])
            axis.plot(done, values, ".", markersize=2, alpha=0.5)
            axis.plot(done[first:], line, linewidth=2)
            axis.axvline(done[first], color="grey", linestyle=":")
            word = "flat" if about["flat"] else "grows"
            axis.set_title(f"{word}: {about['growth']:+.2f} (limit {about['limit']:g})", size=9)
            axis.set(xlabel=part, ylabel=UNITS[name], ylim=(0, 1.25 * values.max() + 1))
    figure.savefig(out / "soak.png", dpi=110)
    plt.close(figure)


def conclude(out: Path, *, curves: bool = True) -> bool:
    """Write figures, verdict and curves of the samples that are there; whether all are flat."""
    taken = {part: samples(out / f"{part}.jsonl") for part in PARTS}
    verdict = {part: judged(taken[part]) for part in PARTS}
    about = {
        part: {
            "done": int(each[-1]["done"]) if each else 0,
            "hours": round((each[-1]["seconds"] - each[0]["seconds"]) / 3600, 2) if each else 0.0,
            **verdict[part],
        }
        for part, each in taken.items()
    }
    head = {"torch": torch.__version__, "library": dhcl_ops.status().how}
    (out / "soak.json").write_text(json.dumps({**head, **about}, indent=1) + "\n")
    if curves and any(verdict.values()):
        draw(out, taken, verdict)
    whole = all(verdict.values())  # a part of few samples has none
    return whole and all(each["flat"] for part in verdict.values() for each in part.values())


def soak(out: Path, minutes: float, count: int) -> bool:
    """Run both parts and judge them; once a minute what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (out / f"{part}.jsonl").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=trainings, args=(out, minutes * 60)),
        context.Process(target=calls, args=(out, count)),
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(30)
        conclude(out, curves=False)
    ended = [process.exitcode for process in processes]
    if any(ended):
        print(f"a part ended early, with status {ended}", file=sys.stderr)
    return conclude(out) and not any(ended)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.minutes:
        flat = soak(chosen.out, chosen.minutes, chosen.calls)
    else:
        flat = conclude(chosen.out)
    print((chosen.out / "soak.json").read_text())
    print("flat" if flat else "something grows")
    return 0 if flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
