"""Clustering and re-ranking against dense code: ``python -m benchmarks.jaccard``.

Sizes are those of Market-1501 and MSMT17. Features are synthetic: identities of log-normal size in
a low-rank cloud, with cameras and noise, which gives expanded sets as large as those of a trained
model. Calls of several seconds run once; with ``--seconds 5`` their peak memory is measured too.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.reference import reference_ops
from dhcl_ops.knn import Neighbours, knn

K1, K2, EPS = 30, 6, 0.6
RERANK = (20, 6, 0.3)  # k1, k2 and the share of the original distance, as Zhong et al. 2017


def identities(n: int, d: int, per: float, seed: int = 0, *, crowded: bool = False) -> torch.Tensor:
    """Unit rows (n, d) of about n / per identities, in random order.

    Crowded identities overlap, as those of an untrained model do: expanded sets are longer, and
    many more pairs lie within eps.
    """
    r = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = r.lognormal(np.log(per) - 0.32, 0.8, int(2 * n / per) + 10).astype(int) + 1
    identity = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)[:n])
    identity = identity[torch.randperm(n, generator=generator)]
    rank, within = (16, 0.8) if crowded else (48, 0.45)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres, basis = normal(len(sizes), rank), normal(rank, d) / d**0.5
    mean = torch.nn.functional.normalize(normal(d), dim=0)
    cameras = 0.3 * normal(6, d) / d**0.5
    out = torch.empty(n, d)
    for begin in range(0, n, 8192):
        own = identity[begin : begin + 8192]
        codes = (centres[own] + within * normal(len(own), rank)) / rank**0.5
        rows = codes @ basis + mean + 0.3 * normal(len(own), d) / d**0.5
        rows += cameras[torch.randint(0, 6, (len(own),), generator=generator)]
        out[begin : begin + 8192] = torch.nn.functional.normalize(rows)
    return out


def with_hub(found: Neighbours) -> Neighbours:
    """The lists with one row forged into the head of every one of them."""
    indices = found.indices.clone()
    missing = ~(indices[:, :K2] == 0).any(1)
    indices[missing, K2 - 1] = 0
    return found._replace(indices=indices)


def closeness_of_graph(graph: torch.Tensor) -> torch.Tensor:
    """Per row, the sum of eps - J over the pairs within eps; it changes little where J does."""
    rows = torch.arange(len(graph), device=graph.device)
    rows = rows.repeat_interleave(graph.crow_indices().diff())
    room = (EPS - graph.values()).double()
    return torch.zeros(len(graph), dtype=torch.float64, device=graph.device).index_add(
        0, rows, room
    )


def dense_closeness(features: torch.Tensor, found: Neighbours) -> torch.Tensor:
    """The same from dense NumPy matrices, a row at a time, as published code does it."""
    n, ranks = len(features), found.indices.numpy(force=True)
    half = round(K1 / 2) + 1

    def mutual(i: int, width: int) -> Any:
        forward = ranks[i, :width]
        return forward[(ranks[forward, :width] == i).any(axis=1)]

    full, halves = [mutual(i, K1) for i in range(n)], [mutual(i, half) for i in range(n)]
    weights = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        members = [full[i]]
        for candidate in full[i]:
            near = halves[candidate]
            if len(np.intersect1d(near, full[i])) > 2 / 3 * len(near):
                members.append(near)
        columns = np.unique(np.concatenate(members))
        squares = 2 - 2 * (features[i : i + 1] @ features[columns].T)
        weights[i, columns] = torch.softmax(-squares, dim=1).numpy(force=True)[0]
    expansion = np.zeros_like(weights)
    for i in range(n):
        expansion[i] = weights[ranks[i, :K2]].mean(axis=0)
    rows_of = [np.nonzero(expansion[:, c])[0] for c in range(n)]
    out = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        shared = np.zeros(n, dtype=np.float32)
        for c in np.nonzero(expansion[i])[0]:
            rows = rows_of[c]
            shared[rows] += np.minimum(expansion[i, c], expansion[rows, c])
        distance = np.maximum(1 - shared / (2 - shared), 0)
        out[i] = float((EPS - distance[distance <= np.float32(EPS)].astype(np.float64)).sum())
    return out.to(features.device)


def ours(features: torch.Tensor, found: Neighbours, sizes: dict[str, int]) -> torch.Tensor:
    """Everything after the neighbour search, DBSCAN included."""
    result = dhcl_ops.cluster(features, k1=K1, k2=K2, eps=EPS, ranks=found)
    sizes.update(result.sizes, clusters=result.num_clusters, outliers=result.num_outliers)
    return closeness_of_graph(result.graph)


def bench_clustering(
    bench: Bench, name: str, n: int, d: int, per: float, *, dense: bool, hub: bool = False
) -> None:
    """All stages after the neighbour search."""
    params = {"N": n, "d": d, "k1": K1, "k2": K2, "data": name}
    if not bench.wanted("cluster", params):
        return
    features = identities(n, d, per).to(bench.device)
    found = knn(features, K1)
    if hub:
        # Stored similarities would belong to other rows.
        found = with_hub(found)
        found = found._replace(similarities=similarities(features, found.indices))
    sizes: dict[str, int] = {}
    variants = [Variant("dhcl", lambda: ours(features, found, sizes))]
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


def similarities(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Similarity of each row to the rows in its list, (N, k)."""
    blocks = zip(features.split(1024), indices.split(1024), strict=True)
    return torch.cat([torch.einsum("nd,nkd->nk", x, features[i]) for x, i in blocks])


def dense_rerank(query: torch.Tensor, gallery: torch.Tensor, topk: int) -> torch.Tensor:
    """The smallest re-ranked distances from dense NumPy matrices, as published code gets them."""
    k1, k2, share = RERANK
    features = torch.cat([query, gallery])
    n, q = len(features), len(query)
    squares = (2 - 2 * features @ features.T).clamp(min=0).numpy(force=True)
    squares /= squares.max(axis=1, keepdims=True)
    ranks = np.argsort(squares, axis=1, kind="stable")[:, : k1 + 1]
    half = round(k1 / 2) + 1

    def mutual(i: int, width: int) -> Any:
        forward = ranks[i, :width]
        return forward[(ranks[forward, :width] == i).any(axis=1)]

    weights = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        own = mutual(i, k1 + 1)
        members = [own]
        for candidate in own:
            near = mutual(candidate, half)
            if len(np.intersect1d(near, own)) > 2 / 3 * len(near):
                members.append(near)
        columns = np.unique(np.concatenate(members))
        weight = np.exp(-squares[i, columns])
        weights[i, columns] = weight / weight.sum()
    expansion = np.stack([weights[ranks[i, :k2]].mean(axis=0) for i in range(n)])
    rows_of = [np.nonzero(expansion[:, c])[0] for c in range(n)]
    out = np.empty((q, topk), dtype=np.float32)
    for i in range(q):
        shared = np.zeros(n, dtype=np.float32)
        for c in np.nonzero(expansion[i])[0]:
            rows = rows_of[c]
            shared[rows] += np.minimum(expansion[i, c], expansion[rows, c])
        distance = (1 - share) * (1 - shared / (2 - shared)) + share * squares[i]
        out[i] = np.sort(distance[q:])[:topk]
    return torch.from_numpy(out).to(query.device)


def bench_rerank(bench: Bench, q: int, g: int, d: int, topk: int, *, dense: bool = False) -> None:
    """Ranked lists from features, neighbour search included."""
    params = {"Q": q, "G": g, "d": d, "topk": topk}
    if not bench.wanted("rerank", params):
        return
    features = identities(q + g, d, 30.0).to(bench.device)
    query, gallery = features[:q], features[q:]
    k1, k2, share = RERANK

    def call() -> torch.Tensor:
        lists: dhcl_ops.RankedLists = dhcl_ops.rerank(query, gallery, k1, k2, share, topk=topk)
        return lists.distances

    variants = [Variant("dhcl", call)]
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


def main() -> None:
    """Run the cases the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args())
    print(dhcl_ops.status().line)
    if bench.quick:
        bench_clustering(bench, "identities", 1_000, 256, 17.2, dense=True)
        bench_clustering(bench, "a hub in every list", 1_000, 256, 17.2, dense=False, hub=True)
        bench_rerank(bench, 100, 900, 256, 50, dense=True)
    else:
        bench_clustering(bench, "identities", 3_000, 2048, 17.2, dense=True)
        bench_clustering(bench, "Market-1501", 12_936, 2048, 17.2, dense=True)
        bench_clustering(bench, "MSMT17", 32_621, 768, 31.3, dense=False)
        bench_clustering(bench, "identities", 20_000, 256, 20.0, dense=False)
        bench_clustering(bench, "a hub in every list", 20_000, 256, 20.0, dense=False, hub=True)
        bench_clustering(bench, "identities", 100_000, 256, 20.0, dense=False)
        bench_rerank(bench, 500, 4_500, 256, 50, dense=True)
        bench_rerank(bench, 11_659, 82_161, 256, 50)
    bench.finish()


if __name__ == "__main__":
    main()
