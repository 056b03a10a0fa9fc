"""Clustering and re-ranking against dense code: ``python -m benchmarks.jaccard``.

Sizes are those of Market-1501 and MSMT17. Features are synthetic: identities of log-normal size in
a low-rank cloud, with cameras and noise, which gives expanded sets as large as those of a trained
model. Calls of several seconds run once; with ``--seconds 5`` their peak memory is measured too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import Call, Sizes, identities, identity_rows, similarities, with_hub
from benchmarks.reciprocal import dense_encoding, dense_weights, encoding
from benchmarks.reference import reference_ops
from benchmarks.results import Ceilings, Results
from dhcl_ops.defaults import SPCL, ZHONG
from dhcl_ops.jaccard import dense_rows, inverted_index, join
from dhcl_ops.knn import Neighbours, knn

# The eps of the graph that false negatives are told from; the trainer's default.
LOOSER = 0.85


def closeness_of_graph(graph: torch.Tensor) -> torch.Tensor:
    """Per row, the sum of eps - J over the pairs within eps; it changes little where J does."""
    rows = torch.arange(len(graph), device=graph.device)
    rows = rows.repeat_interleave(graph.crow_indices().diff())
    room = (SPCL.eps - graph.values()).double()
    return torch.zeros(len(graph), dtype=torch.float64, device=graph.device).index_add(
        0, rows, room
    )


def dense_distances(expansion: Any, count: int) -> Iterator[tuple[int, Any]]:
    """The first rows of the Jaccard distance from a dense matrix of weights, one at a time."""
    n = len(expansion)
    rows_of = [np.nonzero(expansion[:, c])[0] for c in range(n)]
    for i in range(count):
        shared = np.zeros(n, dtype=np.float32)
        for c in np.nonzero(expansion[i])[0]:
            rows = rows_of[c]
            shared[rows] += np.minimum(expansion[i, c], expansion[rows, c])
        yield i, np.maximum(1 - shared / (2 - shared), 0)


def dense_closeness(features: torch.Tensor, found: Neighbours) -> torch.Tensor:
    """The same as :func:`closeness_of_graph`, from dense matrices."""
    out = torch.zeros(len(features), dtype=torch.float64)
    for i, distance in dense_distances(dense_encoding(features, found), len(features)):
        near = distance[distance <= np.float32(SPCL.eps)]
        out[i] = float((SPCL.eps - near.astype(np.float64)).sum())
    return out.to(features.device)


def ours(features: torch.Tensor, found: Neighbours, sizes: dict[str, int]) -> torch.Tensor:
    """Everything after the neighbour search, DBSCAN included."""
    result = dhcl_ops.cluster(features, k1=SPCL.k1, k2=SPCL.k2, eps=SPCL.eps, ranks=found)
    sizes.update(result.sizes, clusters=result.num_clusters, outliers=result.num_outliers)
    return closeness_of_graph(result.graph)


def bench_clustering(
    bench: Bench, name: str, n: int, d: int, per: float, *, dense: bool, hub: bool = False
) -> None:
    """All stages after the neighbour search."""
    params = {"N": n, "d": d, "k1": SPCL.k1, "k2": SPCL.k2, "data": name}
    if not bench.wanted("cluster", params):
        return
    features = identities(n, d, per).to(bench.device)
    found = knn(features, SPCL.k1)
    if hub:
        # Stored similarities would belong to other rows.
        found = with_hub(found)
        found = found._replace(similarities=similarities(features, found.indices))
    sizes: dict[str, int] = {}
    variants = [Variant("dhcl", lambda: ours(features, found, sizes))]
    dense &= bench.dense
    if dense:
        variants.append(Variant("dense NumPy", lambda: dense_closeness(features, found)))
        reference = Variant(
            "pytorch reference", lambda: ours(features, found, sizes), context=reference_ops
        )
        variants.append(reference)
    ours(features, found, sizes)
    bench.run_case(
        "cluster",
        params,
        variants,
        baseline="dense NumPy" if dense else "dhcl",
        bytes_read=sum(t.nbytes for t in (found.indices, found.similarities)),
        # Of a pair its column and its distance, of a row where its pairs begin and its label.
        bytes_written=sizes["pairs"] * 12 + n * 16,
    )
    print(f"{name}: {sizes}", file=sys.stderr)


def bench_false_negatives(bench: Bench, n: int, d: int, per: float) -> None:
    """A clustering, and what it takes more to tell false negatives from a looser graph."""
    params = {"N": n, "d": d, "k1": SPCL.k1, "k2": SPCL.k2, "eps": SPCL.eps, "graph_eps": LOOSER}
    if not bench.wanted("graph_false_negatives", params):
        return
    features = identities(n, d, per).to(bench.device)
    found = knn(features, SPCL.k1)

    def labels(graph_eps: float | None) -> dhcl_ops.Clustering:
        return dhcl_ops.cluster(features, ranks=found, graph_eps=graph_eps)

    def told() -> torch.Tensor:
        result = labels(LOOSER)
        dhcl_ops.graph_false_negatives(result.labels, result.graph)
        found_labels: torch.Tensor = result.labels
        return found_labels

    variants = [
        Variant("cluster", lambda: labels(None).labels),
        Variant("cluster, looser graph", lambda: labels(LOOSER).labels),
        Variant("dhcl", told),
    ]
    pairs = len(labels(LOOSER).graph.values())
    bench.run_case(
        "graph_false_negatives",
        params,
        variants,
        baseline="cluster",
        bytes_read=sum(t.nbytes for t in (found.indices, found.similarities)),
        bytes_written=12 * pairs + n * 16,
    )
    print(f"{pairs} pairs within {LOOSER}, {len(labels(None).graph.values())} within {SPCL.eps}")


def dense_rerank(query: torch.Tensor, gallery: torch.Tensor, topk: int) -> torch.Tensor:
    """The smallest re-ranked distances from dense matrices."""
    k1, k2, share = ZHONG
    features, q = torch.cat([query, gallery]), len(query)
    squares = (2 - 2 * features @ features.T).clamp(min=0).numpy(force=True)
    squares /= squares.max(axis=1, keepdims=True)
    ranks = np.argsort(squares, axis=1, kind="stable")[:, : k1 + 1]

    def weigh(i: int, columns: Any) -> Any:
        weight = np.exp(-squares[i, columns])
        return weight / weight.sum()

    out = np.empty((q, topk), dtype=np.float32)
    expansion = dense_weights(ranks, k1 + 1, round(k1 / 2) + 1, k2, weigh)
    for i, distance in dense_distances(expansion, q):
        out[i] = np.sort(((1 - share) * distance + share * squares[i])[q:])[:topk]
    return torch.from_numpy(out).to(query.device)


def bench_rerank(bench: Bench, q: int, g: int, d: int, topk: int, *, dense: bool = False) -> None:
    """Ranked lists from features, neighbour search included."""
    params = {"Q": q, "G": g, "d": d, "topk": topk}
    if not bench.wanted("rerank", params):
        return
    features = identities(q + g, d, 30.0).to(bench.device)
    query, gallery = features[:q], features[q:]
    k1, k2, share = ZHONG

    def call() -> torch.Tensor:
        lists: dhcl_ops.RankedLists = dhcl_ops.rerank(query, gallery, k1, k2, share, topk=topk)
        return lists.distances

    variants = [Variant("dhcl", call)]
    dense &= bench.dense
    if dense:
        variants.append(Variant("dense NumPy", lambda: dense_rerank(query, gallery, topk)))
        variants.append(Variant("pytorch reference", call, context=reference_ops))
    bench.run_case(
        "rerank",
        params,
        variants,
        baseline="dense NumPy" if dense else "dhcl",
        flop=(q + g) ** 2 * d,
        bytes_read=features.nbytes,
        bytes_written=12 * q * topk,
    )


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """From weighted sets to the graph, and dense rows."""
    n, d, _ = sizes
    features = identity_rows(n, d, device)
    weights = encoding(features, knn(features, min(n, SPCL.k1)))
    index = inverted_index(weights, SPCL.eps)
    yield "index", lambda: inverted_index(weights, SPCL.eps)
    yield "graph", lambda: join(weights, index, SPCL.eps, None)
    yield "dense rows", lambda: list(dense_rows(weights, None, stop=min(n, 256)))


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    if bench.quick:
        bench_clustering(bench, "identities", 1_000, 256, 17.2, dense=True)
        bench_clustering(bench, "a hub in every list", 1_000, 256, 17.2, dense=False, hub=True)
        bench_false_negatives(bench, 1_000, 256, 17.2)
        bench_rerank(bench, 100, 900, 256, 50, dense=True)
    else:
        bench_clustering(bench, "identities", 3_000, 2048, 17.2, dense=True)
        bench_clustering(bench, "Market-1501", 12_936, 2048, 17.2, dense=True)
        bench_clustering(bench, "MSMT17", 32_621, 768, 31.3, dense=False)
        bench_clustering(bench, "identities", 20_000, 256, 20.0, dense=False)
        bench_clustering(bench, "a hub in every list", 20_000, 256, 20.0, dense=False, hub=True)
        bench_clustering(bench, "identities", 100_000, 256, 20.0, dense=False)
        bench_false_negatives(bench, 12_936, 2048, 17.2)
        bench_rerank(bench, 500, 4_500, 256, 50, dense=True)
        bench_rerank(bench, 11_659, 82_161, 256, 50)
        if bench.device.type == "cuda":
            bench_rerank(bench, 11_659, 82_161, 2048, 50)
    return bench.finish()


if __name__ == "__main__":
    main()
