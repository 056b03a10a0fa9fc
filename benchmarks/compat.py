"""The memories of SpCL and Cluster Contrast against plain PyTorch: ``python -m benchmarks.compat``.

``pytorch, as theirs`` writes their forward and backward out in eager PyTorch, operation for
operation: one product with the whole bank, sums over the rows of a class, a softmax with its
epsilons, and the bank moved sample by sample. Sizes are those of a script at work on a small data
set (592 images, batches of 32), and of an epoch on Market-1501. The floor is the one product that a
forward can't be done without, of a step two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.results import Ceilings, Results
from dhcl_ops.compat.clustercontrast import ClusterMemory
from dhcl_ops.compat.spcl import HybridMemory

TEMPERATURE, MOMENTUM, EPSILON = 0.05, 0.2, 1e-6
# Rows N, width d, batch B and classes K: few of them, and every row its own as in a cluster memory.
CASES = (
    (592, 256, 32, 60),
    (592, 256, 32, 592),
    (592, 2048, 32, 60),
    (592, 2048, 32, 592),
    (13_000, 2048, 64, 700),
    (13_000, 2048, 64, 13_000),
    (13_000, 256, 16, 13_000),
)


class MovingProduct(torch.autograd.Function):
    """Features times a bank, whose rows backward moves one after another."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        rows: torch.Tensor,
        bank: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """Products (B, N)."""
        ctx.bank, ctx.share = bank, share
        ctx.save_for_backward(features, rows)
        return features.mm(bank.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradient of the features."""
        features, rows = ctx.saved_tensors
        gradient = grad.mm(ctx.bank)
        for feature, row in zip(features, rows, strict=True):
            ctx.bank[row] = ctx.share * ctx.bank[row] + (1.0 - ctx.share) * feature
            ctx.bank[row] /= ctx.bank[row].norm()
        return gradient, None, None, None


class PlainMemory(nn.Module):
    """A bank, and products with it."""

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("features", bank)
        self.register_buffer("labels", labels)

    def logits(self, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Products over the temperature."""
        share = torch.tensor([MOMENTUM]).to(inputs.device)
        products = MovingProduct.apply(inputs, rows, self.features, share)
        products /= TEMPERATURE
        return products  # type: ignore[no-any-return]


class PlainHybrid(PlainMemory):
    """SpCL's: the mean of the logits of each class, and its softmax."""

    def forward(self, inputs: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        """The loss."""
        logits = self.logits(inputs, indexes)
        targets, labels = self.labels[indexes].clone(), self.labels.clone()
        shape = (int(labels.max()) + 1, len(inputs))
        sums = torch.zeros(shape, device=inputs.device)
        sums.index_add_(0, labels, logits.t().contiguous())
        sizes = torch.zeros(shape[0], 1, device=inputs.device)
        sizes.index_add_(0, labels, torch.ones(len(labels), 1, device=inputs.device))
        exists = (sizes > 0).float()
        sums /= (exists * sizes + (1 - exists)).clone().expand_as(sums)
        mask = exists.expand_as(sums).t().contiguous()
        powers = sums.t().contiguous().exp() * mask.float().clone()
        shares = powers / (powers.sum(1, keepdim=True) + EPSILON)
        return functional.nll_loss(torch.log(shares + EPSILON), targets)


class PlainCluster(PlainMemory):
    """Cluster Contrast's: a softmax over the bank."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss."""
        unit = functional.normalize(inputs, dim=1)
        return functional.cross_entropy(self.logits(unit, targets), targets)


class Step:
    """A forward, with or without its backward, of one memory on one batch."""

    def __init__(
        self, memory: nn.Module, inputs: torch.Tensor, rows: torch.Tensor, backward: bool
    ) -> None:
        self.memory, self.rows, self.backward = memory, rows, backward
        self.inputs = inputs.clone().requires_grad_()

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """One call; the loss and, with backward, the gradient."""
        loss = self.memory(self.inputs, self.rows)
        if not self.backward:
            return (loss.detach(),)
        return loss.detach(), *torch.autograd.grad(loss, self.inputs)


def memories(
    kind: str, bank: torch.Tensor, labels: torch.Tensor
) -> dict[str, Callable[[], nn.Module]]:
    """How each variant's memory is made, each with a bank of its own."""
    n, d = bank.shape

    def ours() -> nn.Module:
        memory: Any = HybridMemory(d, n) if kind == "hybrid" else ClusterMemory(d, n)
        memory.features = bank.clone()
        if kind == "hybrid":
            memory.labels = labels
        return memory  # type: ignore[no-any-return]

    plain = PlainHybrid if kind == "hybrid" else PlainCluster
    return {"pytorch, as theirs": lambda: plain(bank.clone(), labels), "dhcl": ours}


def bench_case(bench: Bench, kind: str, case: tuple[int, int, int, int], backward: bool) -> None:
    """One memory, at one size."""
    n, d, batch, classes = case
    op = f"{kind} memory, {'step' if backward else 'forward'}"
    params = {"B": batch, "N": n, "d": d}
    if kind == "hybrid":
        params["K"] = classes
    if not bench.wanted(op, params):
        return
    generator = torch.Generator().manual_seed(0)
    bank = functional.normalize(torch.randn(n, d, generator=generator)).to(bench.device)
    labels = (torch.arange(n) % classes).to(bench.device)
    rows = torch.randint(n, (batch,), generator=generator).to(bench.device)
    noise = functional.normalize(torch.randn(batch, d, generator=generator)).to(bench.device)
    inputs = functional.normalize(0.5 * bank[rows] + noise)
    products = 2 if backward else 1
    bench.run_case(
        op,
        params,
        [
            Variant(name, Step(make(), inputs, rows, backward))
            for name, make in memories(kind, bank, labels).items()
        ],
        baseline="pytorch, as theirs",
        # The hybrid memory's classes are fewer than the rows.
        flop=2 * products * batch * d * (classes if kind == "hybrid" else n),
        bytes_read=products * 4 * n * d,
    )


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    for case in CASES[:2] if bench.quick else CASES:
        for backward in (False, True):
            bench_case(bench, "hybrid", case, backward)
            if case[0] == case[3]:
                bench_case(bench, "cluster", case, backward)
    return bench.finish()


if __name__ == "__main__":
    main()
