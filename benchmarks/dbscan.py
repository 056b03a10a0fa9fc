"""DBSCAN over the sparse graph against scikit-learn's: ``python -m benchmarks.dbscan``.

The graph is that of :mod:`benchmarks.jaccard`. scikit-learn takes it as a sparse matrix too and
gives the same labels; where it is not installed, that variant is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence

import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identities, identity_rows
from benchmarks.reference import reference_ops
from benchmarks.results import Ceilings, Results
from dhcl_ops.defaults import SPCL


def by_scikit_learn(graph: torch.Tensor) -> torch.Tensor:
    """The labels of scikit-learn on the same sparse matrix."""
    from scipy.sparse import csr_matrix
    from sklearn.cluster import DBSCAN

    parts = (graph.values(), graph.col_indices(), graph.crow_indices())
    matrix = csr_matrix(tuple(part.numpy(force=True) for part in parts), shape=tuple(graph.shape))
    made = DBSCAN(eps=SPCL.eps, min_samples=SPCL.min_samples, metric="precomputed")
    return torch.from_numpy(made.fit_predict(matrix)).to(graph.device)


def bench_dbscan(bench: Bench, n: int, d: int, per: float) -> None:
    """Labels from the graph."""
    params = {"N": n, "eps": SPCL.eps, "min_samples": SPCL.min_samples}
    if not bench.wanted("dbscan", params):
        return
    features = identities(n, d, per).to(bench.device)
    graph = dhcl_ops.jaccard_graph(features)

    def labels() -> torch.Tensor:
        return dhcl_ops.dbscan(graph, SPCL.eps)

    variants = [
        Variant("pytorch reference", labels, context=reference_ops),
        Variant("dhcl", labels),
    ]
    if importlib.util.find_spec("sklearn") is not None:
        variants.insert(0, Variant("scikit-learn", lambda: by_scikit_learn(graph)))
    bench.run_case(
        "dbscan",
        params,
        variants,
        baseline=variants[0].name,
        # Of a pair its column and its distance, of a row where its pairs begin and its label.
        bytes_read=12 * len(graph.values()) + 8 * n,
        bytes_written=8 * n,
    )


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Labels from the graph."""
    n, d, _ = sizes
    features = identity_rows(n, d, device)
    graph = dhcl_ops.jaccard_graph(features, min(n, SPCL.k1), min(n, SPCL.k2))
    yield "labels", lambda: dhcl_ops.dbscan(graph, SPCL.eps)


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    if bench.quick:
        bench_dbscan(bench, 1_000, 256, 17.2)
    else:
        bench_dbscan(bench, 12_936, 2048, 17.2)
        bench_dbscan(bench, 100_000, 256, 20.0)
    return bench.finish()


if __name__ == "__main__":
    main()
