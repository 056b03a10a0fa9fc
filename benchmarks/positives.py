"""The hardest positive of another camera against plain PyTorch: ``python -m benchmarks.positives``.

Sizes are those of Market-1501 and MSMT17 with ResNet-50's feature width, for a batch of 64 and 256.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identity_rows, labels_of
from benchmarks.results import Ceilings, Results
from dhcl_ops import _ops
from dhcl_ops.memory import class_csr

SIZES = (12_936, 32_621)
QUICK_SIZES = (2_000,)
BATCHES = (64, 256)
WIDTH = 2048
CAMERAS = 6


def bank_of(n: int, d: int, device: torch.device) -> tuple[dhcl_ops.MemoryBank, torch.Tensor]:
    """A bank of identities as classes, and the cameras of its rows."""
    bank = dhcl_ops.MemoryBank(n, d, device=device)
    bank.init(identity_rows(n, d, device))
    bank.set_labels(labels_of(n, device).unique(return_inverse=True)[1] - 1)
    generator = torch.Generator().manual_seed(1)
    return bank, torch.randint(0, CAMERAS, (n,), generator=generator).to(device)


def plain_hardest(
    bank: dhcl_ops.MemoryBank, cameras: torch.Tensor, features: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """All similarities with the bank, and the least of those that count: the usual PyTorch."""
    classes = bank.proto_of
    similarities = features @ bank.features.t()
    counts = (classes[indices][:, None] == classes) & (cameras[indices][:, None] != cameras)
    least, rows = similarities.masked_fill(~counts, torch.inf).min(1)
    return torch.where(least < torch.inf, rows, indices)


def bench_positives(bench: Bench, bank: dhcl_ops.MemoryBank, cameras: torch.Tensor, b: int) -> None:
    """The choice for one batch size."""
    n, d = bank.features.shape
    params = {"B": b, "N": n, "d": d, "dtype": "float32"}
    if not bench.wanted("hardest_positives", params):
        return
    indices = (torch.arange(b) * 7 % n).to(bench.device)
    features = identity_rows(b, d, bench.device)
    lists = (bank.proto_of, *class_csr(bank.proto_of, len(bank.prototypes)))
    reference = _ops.OPS["hardest_positive"].reference
    members = int(bank.class_sizes[bank.proto_of[indices]].sum())
    variants = [
        Variant("pytorch matmul", lambda: plain_hardest(bank, cameras, features, indices)),
        Variant(
            "pytorch fixed order",
            lambda: reference(features, bank.features, indices, *lists, cameras),
        ),
        Variant("dhcl", lambda: bank.hardest_positives(features, indices, cameras)),
    ]
    bench.run_case(
        "hardest_positives",
        params,
        variants,
        baseline="pytorch matmul",
        bytes_read=members * (4 * d + 16) + 4 * b * d,
        bytes_written=8 * b,
    )


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The choice among all cameras and among others."""
    n, d, b = sizes
    bank, cameras = bank_of(n, d, device)
    features, indices = identity_rows(b, d, device), (torch.arange(b) * 7 % n).to(device)
    yield "hardest", lambda: bank.hardest_positives(features, indices)
    yield "hardest of another camera", lambda: bank.hardest_positives(features, indices, cameras)


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    for n in QUICK_SIZES if bench.quick else SIZES:
        bank, cameras = bank_of(n, WIDTH, bench.device)
        for b in BATCHES:
            bench_positives(bench, bank, cameras, b)
    return bench.finish()


if __name__ == "__main__":
    main()
