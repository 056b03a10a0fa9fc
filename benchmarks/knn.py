"""Nearest neighbours against the matrix product they need: ``python -m benchmarks.knn``.

Sizes are those of Market-1501 (12,936 training images, ResNet-50's width of 2048) and MSMT17
(32,621, a ViT's 768), and 100,000 rows of 256; on a GPU also 32,621 and a million rows of 2048, the
latter by themselves. Speedups are over one symmetric product alone, which is N^2 d operations: 0.77
and above is within 1.3 times its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identity_rows
from benchmarks.results import Ceilings, Results
from dhcl_ops.defaults import SPCL

SIZES = ((12_936, 2048), (32_621, 768), (100_000, 256))
CUDA_SIZES = ((12_936, 2048), (32_621, 768), (32_621, 2048), (100_000, 256), (1_000_000, 2048))
QUICK_SIZES = ((3_000, 256),)
K = SPCL.k1
IMAGES_PER_PERSON = 20
# From here on a plain product takes a minute on a GPU, and the rows are drawn there.
ALONE = 500_000
ROWS = 1024  # of a block of products


def clustered_rows(n: int, d: int, device: torch.device) -> torch.Tensor:
    """Unit rows around one centre per person, ordered by person as training lists are."""
    where = device if n >= ALONE else torch.device("cpu")
    generator = torch.Generator(where).manual_seed(0)
    centres = torch.randn(n // IMAGES_PER_PERSON + 1, d, generator=generator, device=where)
    rows = torch.randn(n, d, generator=generator, device=where).mul_(1.2)
    persons = torch.arange(n, device=where) // IMAGES_PER_PERSON
    for block, person in zip(rows.split(4096), persons.split(4096), strict=True):
        block += centres[person]
        block.div_(block.norm(dim=1, keepdim=True))
    return rows.to(device)


class Product:
    """Half of the rows times all of them, block by block, and nothing else."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.out = rows.new_empty(ROWS, len(rows))

    def __call__(self) -> None:
        """Multiply once."""
        half = self.rows[: len(self.rows) // 2]
        for block in half.split(ROWS):
            torch.mm(block, self.rows.t(), out=self.out[: len(block)])


def plain(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of all products, and torch.topk of each."""
    found = [torch.mm(block, rows.t()).topk(K, dim=1) for block in rows.split(ROWS)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def without_result(_: object) -> None:
    """The product has no result to compare with; the neighbours are compared beforehand."""


def bench_knn(bench: Bench, n: int, d: int) -> None:
    """One size: the product alone, knn, and the plain way."""
    params = {"N": n, "d": d, "k": K, "dtype": "float32"}
    if not bench.wanted("knn", params):
        return
    rows = clustered_rows(n, d, bench.device)
    if n >= ALONE:
        alone = Variant("dhcl", lambda: without_result(dhcl_ops.knn(rows, K)))
        flop, size = n * n * d, 4 * n * d
        bench.run_case("knn", params, [alone], baseline="dhcl", flop=flop, bytes_read=size)
        return
    found = dhcl_ops.knn(rows, K)
    # Self is first in one and the most similar in the other: the similarities are the same.
    difference = float((found.similarities - plain(rows)[0]).abs().max())
    if difference > 1e-5:
        raise SystemExit(f"knn differs from torch.topk by {difference}")
    note = f"{int(found.uncertified)} rows uncertified"
    variants = [
        Variant("one symmetric product", Product(rows)),
        Variant("mm and topk", lambda: without_result(plain(rows))),
        Variant("dhcl", lambda: without_result(dhcl_ops.knn(rows, K)), note=note),
    ]
    if bench.compiled:
        compiled = torch.compile(plain)
        variants.append(Variant("torch.compile", lambda: without_result(compiled(rows))))
    measured = bench.run_case(
        "knn",
        params,
        variants,
        baseline="one symmetric product",
        flop=n * n * d,
        bytes_read=4 * n * d,
    )
    seconds = {row.variant: row.seconds for row in measured}
    ratio = seconds["dhcl"] / seconds["one symmetric product"]
    print(f"N={n} d={d}: knn takes {ratio:.2f} times one symmetric product")


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Neighbours of every row."""
    n, d, _ = sizes
    features = identity_rows(n, d, device)
    yield "neighbours", lambda: dhcl_ops.knn(features, min(n, SPCL.k1))


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(words)
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    full = CUDA_SIZES if bench.device.type == "cuda" else SIZES
    for n, d in QUICK_SIZES if bench.quick else full:
        bench_knn(bench, n, d)
    return bench.finish()


if __name__ == "__main__":
    main()
