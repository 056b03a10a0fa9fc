"""Distances that pairs of rows have by structure, and the warning of an eps that is one."""

import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest

from dhcl_ops import _ties, cluster, jaccard_distance, jaccard_graph
from tests.ops.jaccard_data import dense_ranks, dense_weights, features_like


@pytest.fixture(autouse=True)
def nothing_said_yet():
    _ties.warn_of_tie.cache_clear()


@pytest.mark.parametrize("k2", [1, 2, 3, 6, 9])
def test_values_are_those_of_sets_written_out(k2):
    """Rows as the mean of k2 one-hot rows, of which m are the same."""
    expected = {}
    for m in range(1, k2):
        one = {n: Fraction(1, k2) for n in range(k2)}
        other = {n if n < m else k2 + n: Fraction(1, k2) for n in range(k2)}
        least = sum(min(one.get(n, 0), other.get(n, 0)) for n in range(2 * k2))
        most = sum(max(one.get(n, 0), other.get(n, 0)) for n in range(2 * k2))
        expected[m] = float(1 - least / most)
    assert _ties.tied_distances(k2) == pytest.approx(expected)


def test_pairs_of_rows_lie_at_these_values():
    """All pairs that share m neighbours of the expansion and nothing else, found one by one."""
    k1, k2, x = 8, 6, features_like("hubs", 240, per=6, seed=1)
    squares = 2 - 2 * (x.double() @ x.double().T).numpy()
    ranks = dense_ranks(squares)
    members = dense_weights(ranks, squares, k1, "spcl") > 0
    near = [set(row[:k2].tolist()) for row in ranks]
    distances = jaccard_distance(x, k1, k2).numpy()
    ties, seen = _ties.tied_distances(k2), set()
    for i, j in itertools.combinations(range(len(x)), 2):
        shared = near[i] & near[j]
        own, other = (members[list(near[n] - shared)].any(0) for n in (i, j))
        if 0 < len(shared) < k2 and not (own & other).any():
            assert abs(distances[i, j] - ties[len(shared)]) < 5e-7
            seen.add(len(shared))
    assert seen == set(ties)
    # So many pairs lie there, and none as close to a value beside it.
    assert (np.abs(distances - 0.5) < 1e-6).sum() > 10
    assert not (np.abs(distances - 0.49) < 1e-6).any()


X = features_like("clean", 60)
TIES = [(6, 0.5), (6, 2 / 3), (6, 0.8), (7, 0.6), (3, 0.5), (4, 0.4)]


@pytest.mark.parametrize(("k2", "eps"), TIES)
def test_an_eps_that_is_a_tie_is_warned_of_once(k2, eps):
    text = f"jaccard_graph: eps={eps:g} is exactly .*; take {eps - 0.01:.2f} or {eps + 0.01:.2f}"
    with pytest.warns(UserWarning, match=text) as caught:
        jaccard_graph(X, k1=12, k2=k2, eps=eps)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaccard_graph(X, k1=12, k2=k2, eps=eps)


def test_cluster_looks_at_each_eps_it_uses():
    with pytest.warns(UserWarning, match="cluster: eps=0.5 is exactly .* share 4 of the k2=6"):
        cluster(X, k1=12, eps=0.5)
    _ties.warn_of_tie.cache_clear()
    with pytest.warns(UserWarning, match=r"cluster: eps=0.5 is exactly .* take 0.49 or 0.51"):
        cluster(X, k1=12, eps=0.52, eps_gap=0.02, self_paced=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster(X, k1=12, eps=0.52, eps_gap=0.02)  # 0.5 is not used


@pytest.mark.parametrize(("k2", "eps"), [(6, 0.49), (6, 0.51), (6, 0.6), (1, 0.5), (7, 0.5)])
def test_other_values_say_nothing(k2, eps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaccard_graph(X, k1=12, k2=k2, eps=eps)
        cluster(X, k1=12, k2=k2, eps=eps)
