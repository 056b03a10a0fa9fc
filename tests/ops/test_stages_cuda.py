"""The compiled stages at sizes that only a device runs quickly, against the reference.

On a CPU the same comparisons run with the C++ kernels.
"""

import pytest
import torch

from dhcl_ops import dbscan, jaccard_graph
from dhcl_ops.knn import knn
from tests.checks import call, same_bits
from tests.ops.stages import identities, random_graph


def both(name, device, *args):
    """The op on the device, which must give the bits of the reference on the CPU."""
    expected = call("reference", name, *args)
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    for _ in range(2):
        got = call("compiled", name, *there)
        pairs = [(got, expected)]
        if not isinstance(expected, torch.Tensor):
            pairs = list(zip(got, expected, strict=True))
        for place, (a, b) in enumerate(pairs):
            assert a.device.type == torch.device(device).type
            assert same_bits(a, b), f"{name}: result {place}"
    return expected


@pytest.mark.parametrize(("noise", "copies"), [(0.6, 1), (1.5, 45)])
def test_every_stage(device, noise, copies):
    n, k, half, k2, eps = 200, 30, 16, 6, 0.6
    features = identities(n, 72, noise=noise, copies=copies)
    found = knn(features, k)
    ranks = found.indices.int()
    positions = both("reciprocal_positions", device, ranks)
    lines = both("k_reciprocal", device, ranks, positions, k, half, 0, n)
    both("k_reciprocal", device, ranks, positions, k, half, 17, 123)
    dots = both("pair_dots", device, features, ranks, found.similarities, *lines, 0)
    sets = (*lines, both("softmax_rows", device, lines[0], 2.0 * dots - 2.0))
    rows = both("query_expand", device, ranks, *sets, k2, 0, n)
    index = both("inverted_index", device, *rows, eps)
    upper = both("jaccard_join", device, *rows, *index, eps, 0, n)
    both("jaccard_join", device, *rows, *index, eps, 17, 123)
    graph = both("mirror_csr", device, *upper)
    both("jaccard_rows", device, *rows, index[2], index[4], index[5], 100, 190)
    for limit in (0.3, eps):
        both("dbscan", device, *graph, limit, 4)


def test_sets_that_need_a_wide_table(device):
    n, size = 7000, 1500
    columns = [torch.arange(size) + 700 * i for i in range(8)]
    offsets = torch.full((n + 1,), 8 * size)
    offsets[:9] = size * torch.arange(9)
    values = torch.rand(8 * size, generator=torch.Generator().manual_seed(0)) / size
    ranks = (torch.arange(n)[:, None] + torch.arange(6)).clamp(max=n - 1).int()
    both("query_expand", device, ranks, offsets, torch.cat(columns).int(), values, 6, 0, 20)


def test_candidates_that_need_a_wide_table(device):
    n = 6000
    offsets, columns = torch.arange(n + 1), torch.zeros(n, dtype=torch.int32)
    values = torch.ones(n) - 1e-3 * torch.rand(n, generator=torch.Generator().manual_seed(0))
    index = both("inverted_index", device, offsets, columns, values, 0.5)
    upper = both("jaccard_join", device, offsets, columns, values, *index, 0.5, 0, 3)
    assert len(upper[1]) == 3 * n - 3


def test_mutual_neighbours_that_need_a_wide_table(device):
    n, k = 2600, 2500
    # All rows list the first 2500, so of those each is everyone's neighbour.
    ranks = torch.arange(k, dtype=torch.int32).expand(n, k).contiguous()
    positions = torch.arange(n, dtype=torch.int16).clamp(max=k)[:, None].expand(n, k).clone()
    positions[k:] = -1
    positions[:, :] = torch.where(positions >= k, -1, positions)
    both("k_reciprocal", device, ranks, positions, k, 3, 5, 9)


@pytest.mark.parametrize("seed", range(3))
def test_dbscan_of_random_graphs(device, seed):
    graph = random_graph(3000, 4000, seed)
    for eps, min_samples in [(0.3, 2), (0.6, 3), (1.0, 2)]:
        both("dbscan", device, *graph, eps, min_samples)


def test_graph_and_labels(device):
    features = identities(500, 40, noise=1.0)
    ranks = knn(features, 20)
    expected = jaccard_graph(features, 20, 4, ranks=ranks)
    there = type(ranks)(*(part.to(device) for part in ranks))
    got = jaccard_graph(features.to(device), 20, 4, ranks=there)
    assert same_bits(got.values(), expected.values())
    assert same_bits(got.col_indices(), expected.col_indices())
    assert same_bits(got.crow_indices(), expected.crow_indices())
    labels = dbscan(got, [0.4, 0.6])
    assert torch.equal(labels.cpu(), dbscan(expected, [0.4, 0.6]))
