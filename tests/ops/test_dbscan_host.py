"""csrc/dbscan.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import itertools

import pytest
import torch

from tests.ops.stages import check, graph_of, random_graph, run

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "paths"


@pytest.mark.parametrize("seed", range(6))
def test_dbscan_of_random_graphs(kernels, seed):
    found = set()
    for n, edges, min_samples in [(60, 70, 2), (60, 110, 3), (45, 200, 4), (7, 9, 1)]:
        graph = random_graph(n, edges, seed)
        for eps in (0.0, 0.3, 0.6, 1.0):
            found |= set(check(kernels, "dbscan", *graph, eps, min_samples).tolist())
    assert {-1, 0, 1, 2} <= found


@pytest.mark.parametrize("touched", [(7, 9), (3, 5), (6, 0)])
def test_a_border_row_of_two_clusters_takes_the_lower(kernels, touched):
    # The cluster of row 0 holds the lowest and the highest rows, so it comes last in row 8's line.
    dense = torch.full((10, 10), 2.0).fill_diagonal_(0.0)
    for members in ([0, 1, 2, 9], [4, 5, 6, 7], [8, touched[0]], [8, touched[1]]):
        for a, b in itertools.permutations(members, 2):
            dense[a, b] = 0.1
    labels = check(kernels, "dbscan", *graph_of(dense), 0.5, 4)
    expected = {(7, 9): 0, (3, 5): 1, (6, 0): 0}[touched]
    assert labels.tolist() == [0, 0, 0, -1, 1, 1, 1, 1, expected, 0]


def test_a_border_row_with_more_neighbours_than_lanes(kernels):
    # Two of cluster 0, then 36 of cluster 1, so that the lanes which see 0 see 1 after it.
    dense = torch.full((81, 81), 2.0)
    for members in (range(40), range(40, 80), [0, 1, *range(40, 76), 80]):
        rows = torch.tensor(list(members))
        dense[rows[:, None], rows] = 0.1
    dense[:2, 40:76] = dense[40:76, :2] = 2.0
    labels = check(kernels, "dbscan", *graph_of(dense), 0.5, 40)
    assert labels.tolist() == [0] * 40 + [1] * 40 + [0]


def path_graph(order):
    """A path through the rows in the given order."""
    n = len(order)
    dense = torch.full((n, n), 2.0).fill_diagonal_(0.0)
    for a, b in itertools.pairwise(order):
        dense[a, b] = dense[b, a] = 0.1
    return graph_of(dense)


def test_dbscan_of_long_paths(kernels):
    for order in (list(range(60)), [(i * 37) % 60 for i in range(60)]):
        graph = path_graph(order)
        assert (check(kernels, "dbscan", *graph, 0.5, 2) == 0).all()
        # Ends are not core: they take their neighbour's cluster.
        assert (check(kernels, "dbscan", *graph, 0.5, 3) == 0).all()


def test_what_is_out_of_range_is_reported(host):
    offsets, columns = torch.tensor([0, 1, 2]), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"dbscan: columns .* \(got 2 in row 1\)"):
        run(host, "dbscan", offsets, columns, torch.ones(2), 0.5, 1)
