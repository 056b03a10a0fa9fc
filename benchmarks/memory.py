"""The memory bank against plain PyTorch: ``python -m benchmarks.memory``.

Sizes are those of Market-1501 (12,936 training images), MSMT17 (32,621) and a million images, with
ResNet-50's feature width of 2048.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import PER_IDENTITY, Call, Sizes, identity_rows, labels_of
from benchmarks.results import Ceilings, Results
from dhcl_ops import _ops

SIZES = (12_936, 32_621, 1_000_000)
QUICK_SIZES = (3_000,)
BATCHES = (64, 256, 4096)
WIDTH = 2048
# Of the bank whose labels are set: what a head after the backbone gives, and a million fit.
NARROW = 256
MOMENTUM = 0.2
IMAGES_PER_CLASS = 20

Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def loop_update(bank: torch.Tensor, features: torch.Tensor, indices: torch.Tensor) -> None:
    """One sample after another, as SpCL's memory does it."""
    for f, i in zip(features, indices, strict=True):
        bank[i] = MOMENTUM * bank[i] + (1.0 - MOMENTUM) * f
        bank[i] /= bank[i].norm()


def vectorised_update(bank: torch.Tensor, features: torch.Tensor, indices: torch.Tensor) -> None:
    """The project's PyTorch reference: all first occurrences at once, then all second ones."""
    reference = _ops.OPS["momentum_update_"].reference
    reference(bank, features, indices, MOMENTUM, 0.0, None)


def our_update(bank: torch.Tensor, features: torch.Tensor, indices: torch.Tensor) -> None:
    """The op as a user calls it."""
    dhcl_ops.momentum_update_(bank, features, indices, MOMENTUM)


class OnSharedBank:
    """Calls an update on a bank that all variants share, since a million rows exist only once.

    The first call starts from the rows as they were when this was made, whatever other variants did
    since, and returns the rows it changed, for comparison.
    """

    def __init__(
        self, update: Update, bank: torch.Tensor, features: torch.Tensor, indices: torch.Tensor
    ) -> None:
        self.update, self.arguments = update, (bank, features, indices)
        self.touched = indices.unique()
        self.before: torch.Tensor | None = bank[self.touched]

    def __call__(self) -> torch.Tensor | None:
        """Update once; the changed rows after the first call."""
        if self.before is None:
            self.update(*self.arguments)
            return None
        bank = self.arguments[0]
        bank[self.touched] = self.before
        self.before = None
        self.update(*self.arguments)
        return bank[self.touched]


def plain_prototypes(bank: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Class means by index_add_, the usual vectorised PyTorch; sums in no fixed order on CUDA."""
    kept = labels >= 0
    sums = bank.new_zeros(num_classes, bank.shape[1])
    sums.index_add_(0, labels[kept], bank[kept])
    counts = torch.bincount(labels[kept], minlength=num_classes).clamp(min=1)
    return sums / counts.unsqueeze(1)


def unit_rows(n: int, device: torch.device) -> torch.Tensor:
    """Random rows of length one, made in place so that a million of them fit once."""
    rows = torch.empty(n, WIDTH, device=device)
    for block in rows.split(65_536):
        block.normal_()
        block.div_(block.norm(dim=1, keepdim=True))
    return rows


def bench_updates(bench: Bench, bank: torch.Tensor) -> None:
    """momentum_update_ at each batch size."""
    for b in BATCHES:
        params = {"B": b, "N": len(bank), "d": WIDTH, "dtype": "float32"}
        if not bench.wanted("momentum_update_", params):
            continue
        features = unit_rows(b, bench.device)
        indices = torch.randint(0, len(bank), (b,), device=bench.device)
        on_cuda = bench.device.type == "cuda"
        calls = {
            "pytorch loop": loop_update,
            "pytorch vectorised": vectorised_update,
            "dhcl": our_update,
        }
        variants = [
            # The first call copies rows for comparison, so a graph is captured after it.
            Variant(
                name,
                OnSharedBank(update, bank, features, indices),
                cuda_graph=on_cuda and name == "dhcl",
            )
            for name, update in calls.items()
        ]
        row = WIDTH * bank.element_size()
        bench.run_case(
            "momentum_update_",
            params,
            variants,
            baseline="pytorch loop",
            bytes_read=2 * b * row,
            bytes_written=b * row,
        )


def bench_prototypes(bench: Bench, bank: torch.Tensor) -> None:
    """All class means, and the refresh of the classes that a batch touched."""
    n = len(bank)
    k = n // IMAGES_PER_CLASS
    params = {"N": n, "K": k, "d": WIDTH, "dtype": "float32"}
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, k, (n,), generator=generator).to(bench.device)
    reference = _ops.OPS["segment_mean"].reference
    lists = _ops.OPS["class_csr"].reference(labels, k)
    row = WIDTH * bank.element_size()
    variants = [
        Variant("pytorch index_add_", lambda: plain_prototypes(bank, labels, k)),
        Variant("pytorch fixed order", lambda: reference(bank, *lists)),
        Variant("dhcl", lambda: dhcl_ops.prototypes(bank, labels, k)),
    ]
    if bench.compiled:
        compiled = torch.compile(plain_prototypes)
        variants.append(Variant("torch.compile", lambda: compiled(bank, labels, k)))
    bench.run_case(
        "prototypes",
        params,
        variants,
        baseline="pytorch index_add_",
        bytes_read=int((labels >= 0).sum()) * row,
        bytes_written=k * row,
    )


def bench_labels(bench: Bench, n: int) -> None:
    """An epoch's new labels: classes of outliers, members of each class, and all prototypes."""
    k = n // IMAGES_PER_CLASS
    params = {"N": n, "K": k, "d": NARROW, "dtype": "float32"}
    if not bench.wanted("set_labels", params):
        return
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, k, (n,), generator=generator)
    # Clusters are numbered without gaps.
    labels = (labels.unique(return_inverse=True)[1] - 1).to(bench.device)
    bank = dhcl_ops.MemoryBank(n, NARROW, device=bench.device)
    bank.init(torch.randn(n, NARROW, device=bench.device))

    def plain() -> torch.Tensor:
        outlier = labels < 0
        clusters = int(labels.max()) + 1
        of = torch.where(outlier, clusters - 1 + outlier.cumsum(0), labels)
        return plain_prototypes(bank.features, of, clusters + int(outlier.sum()))

    def ours() -> torch.Tensor:
        bank.set_labels(labels)
        return bank.prototypes

    row = NARROW * bank.features.element_size()
    bench.run_case(
        "set_labels",
        params,
        [Variant("pytorch index_add_", plain), Variant("dhcl", ours)],
        baseline="pytorch index_add_",
        bytes_read=n * row,
        bytes_written=(k + int((labels < 0).sum())) * row,
    )


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The update with repeated rows, class means and their gradient."""
    n, d, b = sizes
    bank, labels = identity_rows(n, d, device), labels_of(n, device)
    features, indices = identity_rows(b, d, device), (torch.arange(b) * 7 % n).to(device)
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


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of bank rows N")
    options = parser.parse_args(words)
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    for n in options.sizes or (QUICK_SIZES if bench.quick else SIZES):
        bank = unit_rows(n, bench.device)
        bench_updates(bench, bank)
        bench_prototypes(bench, bank)
        del bank
        bench_labels(bench, n)
    return bench.finish()


if __name__ == "__main__":
    main()
