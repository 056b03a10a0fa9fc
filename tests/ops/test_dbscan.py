import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from dhcl_ops import _csr, dbscan, jaccard_distance, jaccard_graph
from dhcl_ops.knn import knn
from tests import checks
from tests.checks import call
from tests.ops.jaccard_data import REGIMES, features_like
from tests.ops.stages import equals_reference_on_samples

EPS = [0.4, 0.5, 0.55, 0.58, 0.6, 0.7]


def sklearn_labels(dense, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(dense)


def sparse(dense, limit):
    near = dense <= limit
    offsets = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
    return _csr.sparse_tensor(offsets, near.nonzero()[:, 1], dense[near])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_labels_equal_scikit_learn_on_the_dense_matrix(regime, convention):
    x = features_like(regime, 500, seed=6)
    ranks = knn(x, 31)
    dense = jaccard_distance(x, convention=convention, ranks=ranks).numpy()
    graph = jaccard_graph(x, eps=0.7, convention=convention, ranks=ranks)
    for eps, got in zip(EPS, dbscan(graph, EPS), strict=True):
        np.testing.assert_array_equal(got.numpy(), sklearn_labels(dense, eps, 4))
        np.testing.assert_array_equal(dbscan(graph, eps).numpy(), got.numpy())


@pytest.mark.parametrize("min_samples", [1, 2, 4, 10, 1000])
def test_min_samples(implementation, min_samples):
    x = features_like("moderate", 300)
    dense = jaccard_distance(x).numpy()
    graph = jaccard_graph(x)
    parts = (graph.crow_indices(), graph.col_indices(), graph.values())
    got = call(implementation, "dbscan", *parts, 0.6, min_samples)
    np.testing.assert_array_equal(got.numpy(), sklearn_labels(dense, 0.6, min_samples))


@st.composite
def distance_matrices(draw):
    """Random symmetric distances on a coarse grid, so that ties with eps and chains are common."""
    n = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.02, 0.08, 0.2, 0.5]))
    r = np.random.default_rng(seed)
    dense = r.integers(1, 6, (n, n)).astype(np.float32) / 8
    dense[r.random((n, n)) > density] = 1
    dense = np.minimum(dense, dense.T)
    # The diagonal is zero, small, or too large for a row to be its own neighbour.
    np.fill_diagonal(dense, draw(st.sampled_from([0.0, 0.25, 1.0])))
    return dense


@settings(max_examples=150, deadline=None)
@given(dense=distance_matrices(), eps=st.integers(1, 5), min_samples=st.integers(1, 6))
def test_random_graphs(dense, eps, min_samples):
    eps = eps / 8
    expected = sklearn_labels(dense, eps, min_samples)
    graph = sparse(torch.from_numpy(dense), 0.8)
    parts = (graph.crow_indices(), graph.col_indices(), graph.values())
    for implementation in ("compiled", "reference"):
        got = call(implementation, "dbscan", *parts, eps, min_samples)
        np.testing.assert_array_equal(got.numpy(), expected)


def test_a_long_chain_and_a_border_between_two_clusters(implementation):
    n = 300
    dense = torch.ones(n, n)
    row = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for a, b in itertools.pairwise(row):
        dense[a, b] = dense[b, a] = 0.3
    dense.fill_diagonal_(0)
    dense[row[150], :] = dense[:, row[150]] = 1.0
    graph = sparse(dense, 0.5)
    parts = (graph.crow_indices(), graph.col_indices(), graph.values())
    for min_samples in (1, 2, 3):
        got = call(implementation, "dbscan", *parts, 0.5, min_samples)
        np.testing.assert_array_equal(got.numpy(), sklearn_labels(dense, 0.5, min_samples))


def test_dbscan_for_any_thread_count_and_empty_graphs():
    graph = jaccard_graph(features_like("moderate", 3000), ranks=None)
    checks.for_any_thread_count(lambda: dbscan(graph, 0.6))
    empty = sparse(torch.empty(0, 0), 0.5)
    assert dbscan(empty, 0.5).shape == (0,)
    assert dbscan(empty, []).shape == (0, 0)
    alone = sparse(torch.ones(5, 5), 0.5)
    assert dbscan(alone, 0.5, 1).tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("graph", "arguments", "error", "message"),
    [
        (np.ones((3, 3)), (0.5,), TypeError, "graph must be a tensor"),
        (torch.ones(3, 3), (0.5,), TypeError, "graph must be a sparse CSR tensor .got strided"),
        (
            torch.sparse_csr_tensor([0, 1, 1], [2], [0.5], (2, 3), check_invariants=True),
            (0.5,),
            ValueError,
            r"graph must be square .got shape \(2, 3\)",
        ),
        (sparse(torch.ones(3, 3).double(), 2), (0.5,), TypeError, "graph must be float32"),
        (sparse(torch.ones(3, 3), 2), (-0.5,), ValueError, "eps must be finite and >= 0"),
        (sparse(torch.ones(3, 3), 2), (float("nan"),), ValueError, "eps must be finite"),
        (sparse(torch.ones(3, 3), 2), (0.5, 0), ValueError, "min_samples must be >= 1 .got 0"),
    ],
)
def test_dbscan_refuses(graph, arguments, error, message):
    with pytest.raises(error, match="dbscan: .*" + message):
        dbscan(graph, *arguments)


def test_dbscan_refuses_columns_that_do_not_ascend():
    def graph(columns):
        parts = torch.tensor([0, 2, 2, 4]), torch.tensor(columns), torch.zeros(4), (3, 3)
        return torch.sparse_csr_tensor(*parts, check_invariants=False)

    assert dbscan(graph([0, 2, 0, 2]), 0.5, 2).tolist() == [0, -1, 0]
    for columns, row in (([2, 0, 0, 2], 0), ([0, 2, 2, 0], 2), ([0, 2, 0, 0], 2)):
        with pytest.raises(ValueError, match=rf"dbscan: columns must ascend .* in row {row}\)"):
            dbscan(graph(columns), 0.5, 2)


def test_op_equals_its_reference_on_the_sample():
    equals_reference_on_samples("dbscan")
