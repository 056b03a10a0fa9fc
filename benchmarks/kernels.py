"""Calls that reach every kernel of ours, for Compute Sanitizer and Nsight Compute to watch.

``python -m benchmarks.kernels --check`` calls every op on its sample and on sizes that fill no tile
evenly; ``--profile`` makes the main calls once at the sizes of Market-1501, warmed up, between
``cudaProfilerStart`` and ``cudaProfilerStop``; ``--shares`` prints which ops take their time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

import dhcl_ops
from benchmarks.contrastive import Step, our_loss
from benchmarks.results import format_seconds
from dhcl_ops import _ops
from dhcl_ops._csr import Rows
from dhcl_ops.defaults import SPCL
from dhcl_ops.jaccard import dense_rows, inverted_index, join
from dhcl_ops.reciprocal import encode

Call = Callable[[], object]
Sizes = tuple[int, int, int]  # rows N, width d, batch B

# Not multiples of a warp, a tile or a vector load; the last batch takes two launches of the update.
ODD: tuple[Sizes, ...] = ((2, 1, 1), (33, 7, 5), (257, 130, 67), (40, 8, 4097))
FULL: Sizes = (12_936, 2048, 256)
PER_IDENTITY = 16
SHOWN = 6  # ops of a call whose share is printed


def rows(n: int, d: int, device: torch.device) -> torch.Tensor:
    """Unit rows around one centre per identity."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(-(-n // PER_IDENTITY), d, generator=generator)
    noise = torch.randn(n, d, generator=generator)
    return functional.normalize(centres.repeat_interleave(PER_IDENTITY, 0)[:n] + noise).to(device)


def labels_of(n: int, device: torch.device) -> torch.Tensor:
    """The identities of :func:`rows`, every eleventh row without one."""
    labels = torch.arange(n) // PER_IDENTITY
    labels[::11] = -1
    return labels.to(device)


def memory(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The update with repeated rows, class means and their gradient."""
    n, d, b = sizes
    bank, labels = rows(n, d, device), labels_of(n, device)
    features, indices = rows(b, d, device), (torch.arange(b) * 7 % n).to(device)
    yield "update", lambda: dhcl_ops.momentum_update_(bank, features, indices, 0.2)
    half = bank.half()
    yield "update, fp16", lambda: dhcl_ops.momentum_update_(half, features, indices, 0.2)
    classes = -(-n // PER_IDENTITY)
    means = functools.partial(dhcl_ops.prototypes, labels=labels, num_classes=classes)
    yield "means", lambda: means(bank)

    def gradient() -> object:
        leaf = bank.detach().requires_grad_()
        return torch.autograd.grad(means(leaf, normalize=True).sum(), leaf)

    yield "means and gradient", gradient


def knn(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Neighbours of every row."""
    n, d, _ = sizes
    features = rows(n, d, device)
    yield "neighbours", lambda: dhcl_ops.knn(features, min(n, 30))


def reciprocal(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """From neighbour lists to weighted sets."""
    n, d, _ = sizes
    features = rows(n, d, device)
    found = dhcl_ops.knn(features, min(n, SPCL.k1))
    yield "encoding", lambda: encoded(features, found)


def encoded(features: torch.Tensor, found: dhcl_ops.Neighbours) -> Rows:
    """Weighted sets from neighbour lists."""
    n = len(features)
    k1, k2 = min(n, SPCL.k1), min(n, SPCL.k2)
    return encode("encode", features, k1, k2, "spcl", found, None).rows


def jaccard(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """From weighted sets to the graph, and dense rows."""
    n, d, _ = sizes
    features = rows(n, d, device)
    weights = encoded(features, dhcl_ops.knn(features, min(n, SPCL.k1)))

    def graph() -> object:
        return join(weights, inverted_index(weights, SPCL.eps), SPCL.eps, None)

    yield "graph", graph
    yield "dense rows", lambda: list(dense_rows(weights, None, stop=min(n, 256)))


def dbscan(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Labels from the graph."""
    n, d, _ = sizes
    features = rows(n, d, device)
    graph = dhcl_ops.jaccard_graph(features, min(n, SPCL.k1), min(n, SPCL.k2))
    yield "labels", lambda: dhcl_ops.dbscan(graph, SPCL.eps)


def contrastive(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The loss in one pass and in two."""
    n, d, b = sizes
    proxies, features = rows(n, d, device), rows(b, d, device)
    labels = (torch.arange(b) % n).to(device)
    for name, parts in (("loss", "forward"), ("loss and gradient", "both")):
        yield name, Step(our_loss("exact"), parts, features, proxies, labels)

    def both_gradients() -> object:
        x, c = (t.detach().requires_grad_() for t in (features, proxies))
        loss = dhcl_ops.debiased_contrastive_loss(
            x, c, labels, kappa=0.25, beta=0.1, hardness_gradient="through"
        )
        return torch.autograd.grad(loss, (x, c))

    yield "all gradients", both_gradients


def ranking(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Metrics from features."""
    n, d, b = sizes
    gallery, query = rows(n, d, device), rows(b, d, device)
    ids = [(torch.arange(count) // PER_IDENTITY).to(device) for count in (b, n)]
    cameras = [torch.full((count,), camera).to(device) for camera, count in enumerate((b, n))]
    yield "metrics", lambda: dhcl_ops.evaluate_ranking((query, gallery), *ids, *cameras)


FAMILIES: dict[str, Callable[[Sizes, torch.device], Iterator[tuple[str, Call]]]] = {
    "memory": memory,
    "knn": knn,
    "reciprocal": reciprocal,
    "jaccard": jaccard,
    "dbscan": dbscan,
    "contrastive": contrastive,
    "ranking": ranking,
}


def check(families: Sequence[str], device: torch.device) -> None:
    """Call everything once on small inputs; each name is printed before its call."""
    for op in _ops.OPS.values():
        if op.family in families:
            print(f"{op.family}: {op.name}", flush=True)
            op.overload(*op.sample(device))
    for family in families:
        for sizes in ODD:
            for name, call in FAMILIES[family](sizes, device):
                print(f"{family}: {name} {sizes}", flush=True)
                call()
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(families: Sequence[str], device: torch.device, sizes: Sizes) -> None:
    """Make each call once to warm up and once with the profiler on."""
    for family in families:
        for name, call in FAMILIES[family](sizes, device):
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
        for name, call in FAMILIES[family](sizes, device):
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
