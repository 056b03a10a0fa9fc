"""Where an epoch's time goes, and how much of it is not the backbone.

``python -m benchmarks.end_to_end`` measures the parts of one training epoch at the sizes of
Market-1501 and MSMT17, with this library's kernels and with its PyTorch references in the same
loop. Images are random tensors that are on the device already, so nothing is decoded or copied.
They would give features without neighbours, so the clustering, the loss and the bank get generated
identities of the network's width instead.

On CUDA the network is ResNet-50 on 256 x 128 images under bfloat16 autocast, on the CPU the small
one on 64 x 32 in float32. Neighbours, Jaccard, DBSCAN and the bank's new labels are measured whole.
The rest is measured for some batches and multiplied by the batches of an epoch; each row says so.
Times in the rows are those of an epoch. On CUDA this library's loss and update are replayed from
graphs, as in the trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dhcl.models import ReIDModel, build_model

import dhcl_ops
from benchmarks.harness import Bench, Row, Variant, add_arguments
from benchmarks.inputs import identities
from benchmarks.reference import reference_ops
from benchmarks.results import Ceilings, Results
from dhcl_ops.defaults import SPCL

SIZES = {"Market-1501": (12_936, 17.2), "MSMT17": (32_621, 31.3)}  # images, images per identity
QUICK_SIZES = {"identities": (1_000, 17.2)}
BATCHES = (64, 256)
STEPS = 400  # batches of an epoch, the trainer's default
EXTRACT_BATCH = 128
MOMENTUM, KAPPA, BETA = 0.2, 0.25, 0.1
BACKBONE = ("extract", "forward-backward")
PARTS = (
    "extract", "neighbours", "jaccard", "dbscan", "bank labels", "forward-backward", "loss",
    "bank update",
)  # fmt: skip


def both(make: Callable[[], Callable[[], Any]]) -> list[Variant]:
    """The same call on the references and on the kernels, each with state of its own."""
    return [Variant("pytorch reference", make(), context=reference_ops), Variant("dhcl", make())]


def method() -> dhcl_ops.DHCLLoss:
    """The loss of both terms, with the benchmark's settings."""
    return dhcl_ops.DHCLLoss(kappa=KAPPA, beta=BETA)


class Update:
    """Moves a batch's rows of a bank of its own; the first call returns them, for comparison."""

    def __init__(
        self,
        bank: dhcl_ops.MemoryBank,
        features: torch.Tensor,
        indices: torch.Tensor,
        replayed: bool = False,
    ) -> None:
        self.bank, self.indices = bank, indices
        self.move: Callable[[], None] = lambda: bank.update_(features, indices)
        if replayed:
            step = dhcl_ops.GraphedStep(method(), bank, features, indices)
            step(features, indices)
            self.move = step.update_
        self.first = True

    def __call__(self) -> torch.Tensor | None:
        """Update once."""
        self.move()
        if not self.first:
            return None
        self.first = False
        return self.bank.features[self.indices]


class Epoch:
    """The parts of one epoch at one size: measured once, then counted for each batch size."""

    def __init__(
        self, bench: Bench, model: ReIDModel, image: tuple[int, int], data: str, n: int, per: float
    ) -> None:
        self.bench, self.model, self.image = bench, model, image
        self.cuda = bench.device.type == "cuda"
        self.params = {
            "data": data,
            "N": n,
            "d": model.dim,
            "backbone": model.description.split(",")[0],
            "image": f"{image[0]}x{image[1]}",
            "precision": "bf16 autocast" if self.cuda else "fp32",
        }
        self.features = identities(n, model.dim, per).to(bench.device)
        self.labels = torch.empty(0)
        self.parts: dict[str, dict[str, Row]] = {}

    def measure(
        self, part: str, variants: Sequence[Variant], times: float = 1.0, **params: Any
    ) -> None:
        """One part, its times multiplied by how often an epoch calls it."""
        baseline = variants[0].name
        params = {**self.params, **params}
        rows = self.bench.run_case(f"epoch: {part}", params, variants, baseline=baseline)
        scaled = []
        for row in rows:
            note = f"{row.calls} batches measured, times {times:.0f}" if times != 1.0 else ""
            iqr = None if row.iqr_seconds is None else row.iqr_seconds * times
            scaled.append(
                dataclasses.replace(
                    row,
                    seconds=row.seconds * times,
                    iqr_seconds=iqr,
                    note="; ".join(filter(None, (note, row.note))),
                )
            )
        if rows:
            self.bench.results.rows[-len(rows) :] = scaled
        self.parts[part] = {row.variant: row for row in scaled}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Of the network; memory, clustering and loss stay in float32."""
        return torch.autocast(self.bench.device.type, dtype=torch.bfloat16, enabled=self.cuda)

    def images(self, count: int) -> torch.Tensor:
        """Random images."""
        return torch.randn(count, 3, *self.image, device=self.bench.device)

    def once(self) -> None:
        """What an epoch does before its batches."""
        rows = self.features
        count = min(EXTRACT_BATCH, len(rows))
        images = self.images(count)
        self.model.eval()

        def extract() -> None:
            with torch.no_grad(), self.autocast():
                self.model(images)

        self.measure("extract", [Variant("backbone", extract)], times=len(rows) / count)
        self.measure("neighbours", both(lambda: lambda: tuple(dhcl_ops.knn(rows, SPCL.k1))))
        found = dhcl_ops.knn(rows, SPCL.k1)

        def graph() -> torch.Tensor:
            return dhcl_ops.jaccard_graph(rows, k1=SPCL.k1, k2=SPCL.k2, eps=SPCL.eps, ranks=found)

        def pairs() -> tuple[torch.Tensor, ...]:
            made = graph()
            return made.crow_indices(), made.col_indices(), made.values()

        self.measure("jaccard", both(lambda: pairs))
        kept = graph()
        self.measure("dbscan", both(lambda: lambda: dhcl_ops.dbscan(kept, SPCL.eps)))
        self.labels = dhcl_ops.dbscan(kept, SPCL.eps)

        def relabel() -> Callable[[], torch.Tensor]:
            bank = self.bank()

            def call() -> torch.Tensor:
                bank.set_labels(self.labels)
                return bank.prototypes

            return call

        self.measure("bank labels", both(relabel))

    def bank(self) -> dhcl_ops.MemoryBank:
        """A bank of the features, with labels once there are any."""
        n, d = self.features.shape
        bank = dhcl_ops.MemoryBank(n, d, momentum=MOMENTUM, device=self.bench.device)
        bank.init(self.features)
        if len(self.labels):
            bank.set_labels(self.labels)
        return bank

    def batches(self, size: int, steps: int) -> None:
        """What each batch of ``size`` images does."""
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(len(self.features), (size,), generator=generator)
        indices = indices.to(self.bench.device)
        features = self.features[indices]
        noise = torch.randn_like(features) / self.model.dim**0.5
        features = torch.nn.functional.normalize(features + 0.5 * noise)
        images = self.images(size)
        gradient = torch.randn_like(features)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(learned)
        self.model.train()

        def forward_backward() -> None:
            with self.autocast():
                out = self.model(images)
            out.backward(gradient)
            adam.step()
            adam.zero_grad()

        bank = self.bank()
        leaf = features.clone().requires_grad_()

        def loss() -> tuple[torch.Tensor, ...]:
            value, _ = method()(leaf, bank, indices, return_stats=True)
            return value.detach(), *torch.autograd.grad(value, leaf)

        def replayed_loss() -> Callable[[], tuple[torch.Tensor, ...]]:
            step = dhcl_ops.GraphedStep(method(), bank, features, indices)

            def call() -> tuple[torch.Tensor, ...]:
                value = step(leaf, indices)
                return value.detach(), *torch.autograd.grad(value, leaf)

            return call

        more = {"B": size, "steps": steps}
        network = [Variant("backbone", forward_backward)]
        self.measure("forward-backward", network, times=steps, **more)
        losses = both(lambda: loss)
        updates = both(lambda: Update(self.bank(), features, indices))
        if self.cuda:
            losses[1] = Variant("dhcl", replayed_loss())
            updates[1] = Variant("dhcl", Update(self.bank(), features, indices, replayed=True))
        self.measure("loss", losses, times=steps, **more)
        self.measure("bank update", updates, times=steps, **more)
        self.total(more)

    def total(self, more: dict[str, Any]) -> None:
        """Rows of the whole epoch, and a line about each."""
        made: list[Row] = []
        for variant in ("pytorch reference", "dhcl"):
            rows = {part: self.parts.get(part, {}) for part in PARTS}
            found = {part: row.get(variant, row.get("backbone")) for part, row in rows.items()}
            if missing := [part for part, row in found.items() if row is None]:
                print(f"no total of {variant}: {', '.join(missing)} not measured")
                continue
            parts = {part: row for part, row in found.items() if row is not None}
            seconds = sum(row.seconds for row in parts.values())
            rest = sum(row.seconds for part, row in parts.items() if part not in BACKBONE)
            made.append(
                dataclasses.replace(
                    parts["loss"],
                    op="epoch: total",
                    params={**self.params, **more},
                    seconds=seconds,
                    iqr_seconds=sum(row.iqr_seconds or 0.0 for row in parts.values()),
                    runs=min(row.runs for row in parts.values()),
                    calls=0,
                    peak_extra_bytes=None,
                    max_difference=None,
                    speedup=made[0].seconds / seconds if made else 1.0,
                    note=f"sum of the parts; {100 * rest / seconds:.2f} % is not the backbone",
                )
            )
            shares = (f"{part} {100 * row.seconds / seconds:.2g} %" for part, row in parts.items())
            where = f"{self.params['data']}, B={more['B']}, {variant}"
            print(f"{where}: {seconds:.3g} s an epoch; {', '.join(shares)}")
            print(f"{where}: everything but the backbone {100 * rest / seconds:.2f} %")
        self.bench.results.rows += made


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of an epoch")
    parser.add_argument("--batches", type=int, nargs="+", help="images of a batch")
    options = parser.parse_args(words)
    if options.steps < 1 or any(b < 2 for b in options.batches or ()):
        parser.error("--steps must be at least 1 and --batches at least 2")
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    on_cuda = bench.device.type == "cuda"
    image = (256, 128) if on_cuda else (64, 32)
    name = "resnet50" if on_cuda else "small"
    model = build_model(name, pretrained=False, image_size=image, seed=0).to(bench.device)
    for data, (n, per) in (QUICK_SIZES if bench.quick else SIZES).items():
        epoch = Epoch(bench, model, image, data, n, per)
        epoch.once()
        for size in options.batches or ((16,) if bench.quick else BATCHES):
            epoch.batches(size, options.steps)
    return bench.finish()


if __name__ == "__main__":
    main()
