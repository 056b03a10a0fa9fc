"""The debiased contrastive loss against plain PyTorch: ``python -m benchmarks.contrastive``.

d = 2048, K from a Market-1501 epoch's clusters (700) over its training images (13,000) to a bank of
a million. The floor is the matrix products alone: one for the loss, two with the gradient of the
features. Speedups in the JSON are over plain PyTorch, eager.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch._functorch import config as functorch_config
from torch.nn import functional

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identity_rows
from benchmarks.memory import unit_rows
from benchmarks.results import Ceilings, Results

WIDTH = 2048
BATCHES = (64, 256, 1024, 4096)
SIZES = (700, 13_000, 100_000, 1_000_000)
QUICK_BATCHES, QUICK_SIZES = (16, 64), (700, 2_000)
TEMPERATURE, KAPPA, BETA = 0.05, 0.25, 0.1
# On the CPU: more operations than this take minutes a call; on CUDA nothing is left out.
CPU_OPERATIONS = 4e12
# Tensors of B x K that eager PyTorch holds at once, measured as its peak over one of them.
EAGER_TENSORS = 8

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain_loss(features: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same loss over whole logits, hardness weights held."""
    s = features @ proxies.t() / TEMPERATURE
    r = s.gather(1, labels[:, None]).squeeze(1)
    n = s.scatter(1, labels[:, None], -math.inf)
    m = proxies.shape[0] - 1
    weights = (BETA * n.detach()).log_softmax(1)
    mass = math.log(m) + (n + weights).logsumexp(1)
    gap = math.log(KAPPA) + r - mass
    keep = math.log1p(-KAPPA / m)
    debiased = torch.where(gap < 0, mass + torch.log(-torch.expm1(gap.clamp(max=-1e-7))), -math.inf)
    floor = math.log(m) - 1 / TEMPERATURE
    return functional.softplus((debiased - keep).clamp(min=floor) - r).mean()


def our_loss(precision: str) -> Loss:
    """debiased_contrastive_loss at the benchmark's settings."""

    def loss(features: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = dhcl_ops.debiased_contrastive_loss(
            features,
            proxies,
            labels,
            temperature=TEMPERATURE,
            kappa=KAPPA,
            beta=BETA,
            precision=precision,
        )
        return value

    return loss


class Step:
    """Forward, backward or both of a loss with respect to the features; returns what it made."""

    def __init__(self, loss: Loss, parts: str, *tensors: torch.Tensor, tf32: bool = False) -> None:
        self.loss = loss
        self.parts = parts
        self.features = tensors[0].clone().requires_grad_()
        self.rest = tensors[1:]
        self.tf32 = tf32
        self.kept = self.forward() if parts == "backward" else None

    def forward(self) -> torch.Tensor:
        """The loss, in the precision asked for."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            return self.loss(self.features, *self.rest)
        finally:
            torch.set_float32_matmul_precision(before)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """One call."""
        if self.parts == "forward":
            with torch.no_grad():
                return (self.forward(),)
        loss = self.kept if self.kept is not None else self.forward()
        kept = self.kept is not None
        return (loss.detach(), *torch.autograd.grad(loss, self.features, retain_graph=kept))


class Products:
    """The products that a loss can't do without, into buffers that are there already."""

    def __init__(self, parts: str, features: torch.Tensor, proxies: torch.Tensor) -> None:
        self.parts = parts
        self.features, self.proxies = features, proxies
        # Chunks, so that the floor itself fits where B x K does not.
        self.columns = max((256 << 20) // (4 * len(features)), 256)
        self.logits = features.new_empty(len(features) * min(self.columns, len(proxies)))
        self.out = torch.zeros_like(features)

    def __call__(self) -> None:
        """Multiply once."""
        for chunk in self.proxies.split(self.columns):
            shape = (len(self.features), len(chunk))
            logits = self.logits[: shape[0] * shape[1]].view(shape)
            if self.parts != "backward":
                torch.mm(self.features, chunk.t(), out=logits)
            if self.parts != "forward":
                self.out.addmm_(logits, chunk)


def bench_case(bench: Bench, proxies: torch.Tensor, batch: int, parts: str) -> None:
    """One batch size, and forward, backward or both."""
    count = len(proxies)
    params = {"B": batch, "K": count, "d": WIDTH, "dtype": "float32"}
    products = {"forward": 1, "backward": 1, "both": 2}[parts]
    operations = 2 * products * batch * count * WIDTH
    cuda = bench.device.type == "cuda"
    if not bench.wanted(f"loss {parts}", params) or (not cuda and operations > CPU_OPERATIONS):
        return
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(count, (batch,), generator=generator).to(bench.device)
    # Similarity 0.35 to the positive: among this many proxies the loss is of order one, unclamped.
    noise = unit_rows(batch, bench.device)
    features = functional.normalize(0.374 * proxies[labels] + noise)
    tensors = (features, proxies, labels)
    variants = [
        Variant("products alone", Products(parts, features, proxies), note="no result"),
    ]
    available = torch.cuda.mem_get_info()[0] if cuda else 12 << 30
    if EAGER_TENSORS * 4 * batch * count < available:
        variants.append(Variant("pytorch", Step(plain_loss, parts, *tensors)))
        if bench.compiled:
            compiled = torch.compile(plain_loss)
            variants.append(Variant("torch.compile", Step(compiled, parts, *tensors)))
        if cuda:
            variants.append(Variant("pytorch TF32", Step(plain_loss, parts, *tensors, tf32=True)))
    else:
        print(f"B={batch} K={count}: plain PyTorch would not fit into memory, left out")
    variants.append(Variant("dhcl", Step(our_loss("exact"), parts, *tensors)))
    if cuda:
        variants.append(Variant("dhcl fast", Step(our_loss("fast"), parts, *tensors)))
    names = {v.name for v in variants}
    measured = bench.run_case(
        f"loss {parts}",
        params,
        variants,
        baseline="pytorch" if "pytorch" in names else "products alone",
        flop=operations,
        bytes_read=products * 4 * count * WIDTH,
    )
    seconds = {row.variant: row.seconds for row in measured}
    ratio = seconds["dhcl"] / seconds["products alone"]
    print(f"B={batch} K={count} {parts}: dhcl takes {ratio:.2f} times the products alone")


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The loss in one pass and in two."""
    n, d, b = sizes
    proxies, features = identity_rows(n, d, device), identity_rows(b, d, device)
    labels = (torch.arange(b) % n).to(device)
    for name, parts in (("loss", "forward"), ("loss and gradient", "both")):
        yield name, Step(our_loss("exact"), parts, features, proxies, labels)

    # Every other proxy counts less.
    offsets = torch.arange(b + 1, device=device) * (n // 2)
    entries = torch.arange(n // 2, device=device).repeat(b) * 2
    weights = dhcl_ops.NegativeWeights(
        torch.arange(b, device=device), offsets, entries, torch.full_like(entries, -1).float()
    )
    yield (
        "loss with weights",
        lambda: dhcl_ops.debiased_contrastive_loss(features, proxies, labels, weights=weights),
    )

    def both_gradients() -> object:
        x, c = (t.detach().requires_grad_() for t in (features, proxies))
        loss = dhcl_ops.debiased_contrastive_loss(
            x, c, labels, kappa=0.25, beta=0.1, hardness_gradient="through"
        )
        return torch.autograd.grad(loss, (x, c))

    yield "all gradients", both_gradients


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of proxies K")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes B")
    options = parser.parse_args(words)
    # Backward alone runs again on one graph, which a compiled function refuses by default.
    functorch_config.donated_buffer = False
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    default = SIZES if bench.device.type == "cuda" else SIZES[:3]
    sizes = options.sizes or (QUICK_SIZES if bench.quick else default)
    for count in sizes:
        proxies = unit_rows(count, bench.device)
        for batch in options.batches or (QUICK_BATCHES if bench.quick else BATCHES):
            for parts in ("forward", "both", "backward"):
                bench_case(bench, proxies, batch, parts)
        del proxies
    return bench.finish()


if __name__ == "__main__":
    main()
