"""CMC, mAP and mINP against the matrix product they need: ``python -m benchmarks.ranking``.

The size is that of Market-1501's test: 3,368 queries, 15,913 gallery images, ResNet-50's width; on
CUDA that of MSMT17's too, whose rows NumPy would sort for minutes. The plain variants and "dhcl,
distances" start from the distances, "dhcl, features" from the features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import dhcl_ops
from benchmarks.harness import Bench, Variant, add_arguments
from benchmarks.inputs import PER_IDENTITY, Call, Sizes, identity_rows
from benchmarks.results import Ceilings, Results

SIZE = (3368, 15_913, 2048)  # queries, gallery images, width
LARGE_SIZE = (11_659, 82_161, 2048)
QUICK_SIZE = (300, 2000, 256)
PEOPLE, LARGE_PEOPLE, CAMERAS = 751, 3060, 6
BLOCK = 512  # queries that plain PyTorch sorts at once


class Product:
    """Queries times gallery, into memory that is there, and nothing else."""

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor) -> None:
        self.query, self.gallery = query, gallery
        self.out = query.new_empty(len(query), len(gallery))

    def __call__(self) -> None:
        """Multiply once."""
        torch.mm(self.query, self.gallery.t(), out=self.out)


def by_argsort(distance: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> list[float]:
    """MAP, mINP and rank-1 as evaluation scripts compute them: a sorted row per query."""
    query_ids, gallery_ids, query_cameras, gallery_cameras = (t.numpy(force=True) for t in labels)
    precisions, penalties, firsts = [], [], []
    for row, person, camera in zip(
        distance.numpy(force=True), query_ids, query_cameras, strict=True
    ):
        order = np.argsort(row, kind="stable")
        own = (gallery_ids[order] == person) & (gallery_cameras[order] == camera)
        hits = (gallery_ids[order] == person)[~own]
        places = np.flatnonzero(hits) + 1
        if len(places):
            precisions.append((np.arange(1, len(places) + 1) / places).mean())
            penalties.append(len(places) / places[-1])
            firsts.append(places[0] == 1)
    return [float(np.mean(x)) for x in (precisions, penalties, firsts)]


def by_torch(distance: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> list[float]:
    """The same in PyTorch: whole blocks of queries sorted, then sums along the rows."""
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels
    sums, known = distance.new_zeros(3, dtype=torch.float64), 0
    for block in torch.arange(len(distance), device=distance.device).split(BLOCK):
        order = distance[block].argsort(dim=1, stable=True)
        same = gallery_ids[order] == query_ids[block, None]
        kept = ~(same & (gallery_cameras[order] == query_cameras[block, None]))
        hits = same & kept
        place, found = kept.cumsum(1), hits.cumsum(1)
        total = found[:, -1]
        valid = total > 0
        precision = torch.where(hits, found / place.clamp(min=1), 0.0).sum(1) / total
        last = torch.where(hits, place, 0).amax(1)
        first = hits.int().argmax(1, keepdim=True)
        values = torch.stack((precision, total / last, (place.gather(1, first) == 1).squeeze(1)))
        sums += values[:, valid].double().sum(1)
        known += int(valid.sum())
    return [float(value) / known for value in sums]


def bench_ranking(bench: Bench, size: tuple[int, int, int], *, numpy: bool = True) -> None:
    """From features and from a given matrix; NumPy's sort is the truth, or else PyTorch's."""
    queries, gallery_size, width = size
    people = LARGE_PEOPLE if size == LARGE_SIZE else PEOPLE
    params = {"Q": queries, "G": gallery_size, "d": width, "dtype": "float32"}
    if not bench.wanted("evaluate_ranking", params):
        return
    generator = torch.Generator().manual_seed(0)
    # Some gallery images are distractors, which have identity 0.
    gallery_ids = torch.randint(0, people, (gallery_size,), generator=generator)
    query_ids = torch.randint(1, people, (queries,), generator=generator)
    sizes = (queries, gallery_size)
    cameras = [torch.randint(0, CAMERAS, (n,), generator=generator) for n in sizes]
    centres = torch.randn(people, width, generator=generator)
    features = [
        torch.nn.functional.normalize(
            centres[ids] + 9 * torch.randn(len(ids), width, generator=generator)
        ).to(bench.device)
        for ids in (query_ids, gallery_ids)
    ]
    labels = tuple(t.to(bench.device) for t in (query_ids, gallery_ids, *cameras))
    query, gallery = features
    distance = -(query @ gallery.t())

    def summary(result: dhcl_ops.RankingMetrics) -> list[float]:
        return [result.mAP, result.mINP, float(result.cmc[0])]

    expected = (by_argsort if numpy else by_torch)(distance, labels)
    product = Product(query, gallery)

    def product_alone() -> list[float]:
        product()
        return expected

    compiled = torch.compile(by_torch)
    plain = [
        Variant("argsort per query", lambda: by_argsort(distance, labels)),
        Variant("pytorch", lambda: by_torch(distance, labels)),
        Variant("torch.compile", lambda: compiled(distance, labels)),
    ]
    measured = bench.run_case(
        "evaluate_ranking",
        params,
        [
            Variant("product alone", product_alone),
            *plain[0 if numpy else 1 : 3 if bench.compiled else 2],
            Variant(
                "dhcl, distances", lambda: summary(dhcl_ops.evaluate_ranking(distance, *labels))
            ),
            Variant(
                "dhcl, features",
                lambda: summary(dhcl_ops.evaluate_ranking((query, gallery), *labels)),
            ),
        ],
        baseline="product alone",
        flop=2 * queries * gallery_size * width,
        bytes_read=4 * (queries + gallery_size) * width,
        reference=expected,
    )
    seconds = {row.variant: row.seconds for row in measured}
    target = 1.3 * seconds["product alone"] + 1.0
    print(f"from features {seconds['dhcl, features']:.2f} s, 1.3 products + 1 s is {target:.2f} s")


def watched(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Metrics from features."""
    n, d, b = sizes
    gallery, query = identity_rows(n, d, device), identity_rows(b, d, device)
    ids = [(torch.arange(count) // PER_IDENTITY).to(device) for count in (b, n)]
    cameras = [torch.full((count,), camera).to(device) for camera, count in enumerate((b, n))]
    yield "metrics", lambda: dhcl_ops.evaluate_ranking((query, gallery), *ids, *cameras)


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    bench = Bench(parser.parse_args(words), ceilings)
    print(dhcl_ops.status().line)
    bench_ranking(bench, QUICK_SIZE if bench.quick else SIZE)
    if bench.device.type == "cuda" and not bench.quick:
        bench_ranking(bench, LARGE_SIZE, numpy=False)
    return bench.finish()


if __name__ == "__main__":
    main()
