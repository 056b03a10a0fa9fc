"""k-reciprocal encoding against dense code: ``python -m benchmarks.reciprocal``.

From given neighbour lists to weighted sets, query expansion included, on the features of
:mod:`benchmarks.jaccard`, whose cases go on from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identities, identity_rows
from benchmarks.reference import reference_ops
from benchmarks.results import Ceilings, Results
from dhcl_ops._csr import Rows, row_ids
from dhcl_ops.defaults import SPCL
from dhcl_ops.knn import Neighbours, knn
from dhcl_ops.reciprocal import encode


def encoding(features: torch.Tensor, found: Neighbours) -> Rows:
    """Weighted sets from neighbour lists."""
    n = len(features)
    return encode("encode", features, min(n, SPCL.k1), min(n, SPCL.k2), "spcl", found, None).rows


def dense_weights(ranks: Any, k1: int, half: int, k2: int, weigh: Callable[[int, Any], Any]) -> Any:
    """The same as a dense NumPy matrix, a row at a time, as published code makes it.

    ``weigh(i, columns)`` gives the weights of row i's expanded set; k1 counts the row itself.
    """
    n = len(ranks)

    def mutual(i: int, width: int) -> Any:
        forward = ranks[i, :width]
        return forward[(ranks[forward, :width] == i).any(axis=1)]

    full, halves = [mutual(i, k1) for i in range(n)], [mutual(i, half) for i in range(n)]
    weights = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        members = [full[i]]
        for candidate in full[i]:
            near = halves[candidate]
            if len(np.intersect1d(near, full[i])) > 2 / 3 * len(near):
                members.append(near)
        columns = np.unique(np.concatenate(members))
        weights[i, columns] = weigh(i, columns)
    expansion = np.zeros_like(weights)
    for i in range(n):
        expansion[i] = weights[ranks[i, :k2]].mean(axis=0)
    return expansion


def dense_encoding(features: torch.Tensor, found: Neighbours) -> Any:
    """Dense weights with SpCL's numbers."""

    def weigh(i: int, columns: Any) -> Any:
        squares = 2 - 2 * (features[i : i + 1] @ features[columns].T)
        return torch.softmax(-squares, dim=1).numpy(force=True)[0]

    ranks = found.indices.numpy(force=True)
    return dense_weights(ranks, SPCL.k1, round(SPCL.k1 / 2) + 1, SPCL.k2, weigh)


def squares_of(rows: Rows) -> torch.Tensor:
    """Per row, the sum of the squares of its weights: what the variants are compared by."""
    squares = rows.values.double().square()
    return squares.new_zeros(len(rows.offsets) - 1).index_add(0, row_ids(rows.offsets), squares)


def bench_encoding(bench: Bench, n: int, d: int, per: float, *, dense: bool) -> None:
    """From neighbour lists to weighted sets."""
    params = {"N": n, "d": d, "k1": SPCL.k1, "k2": SPCL.k2}
    if not bench.wanted("encode", params):
        return
    features = identities(n, d, per).to(bench.device)
    found = knn(features, SPCL.k1)
    rows = encoding(features, found)
    variants = [Variant("dhcl", lambda: squares_of(encoding(features, found)))]
    dense &= bench.dense
    if dense:
        variants.append(
            Variant(
                "dense NumPy",
                lambda: torch.from_numpy(np.square(dense_encoding(features, found)).sum(axis=1)),
            )
        )
        reference = lambda: squares_of(encoding(features, found))  # noqa: E731
        variants.append(Variant("pytorch reference", reference, context=reference_ops))
    bench.run_case(
        "encode",
        params,
        variants,
        baseline="dense NumPy" if dense else "dhcl",
        bytes_read=sum(t.nbytes for t in (found.indices, found.similarities)),
        bytes_written=sum(t.nbytes for t in rows),
    )


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """From neighbour lists to weighted sets."""
    n, d, _ = sizes
    features = identity_rows(n, d, device)
    found = knn(features, min(n, SPCL.k1))
    yield "encoding", lambda: encoding(features, found)


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    if bench.quick:
        bench_encoding(bench, 1_000, 256, 17.2, dense=True)
    else:
        bench_encoding(bench, 3_000, 2048, 17.2, dense=True)
        bench_encoding(bench, 12_936, 2048, 17.2, dense=True)
        bench_encoding(bench, 100_000, 256, 20.0, dense=False)
    return bench.finish()


if __name__ == "__main__":
    main()
