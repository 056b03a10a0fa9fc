import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dhcl_ops import constrained_dbscan, dbscan, jaccard_graph
from tests.ops.jaccard_data import features_like
from tests.ops.test_dbscan import sparse

NO_PAIRS = torch.empty(0, 2, dtype=torch.int64)


def plain(dense, pairs, eps, min_samples):
    """The rule of the docstring on a dense matrix, by sets, without DBSCAN or a forest."""
    n = len(dense)
    dense = dense.copy()
    foes = {(a, b) for a, b in pairs} | {(b, a) for a, b in pairs}
    for a, b in foes:
        dense[a, b] = np.inf
    near = dense <= np.float32(eps)
    core = [i for i in range(n) if near[i].sum() >= min_samples]
    # What DBSCAN joins without looking at pairs.
    loose = [{i} for i in core]
    for a, b in itertools.combinations(core, 2):
        if near[a, b]:
            one, other = (next(p for p in loose if x in p) for x in (a, b))
            if one is not other:
                one |= other
                loose.remove(other)
    loose.sort(key=min)
    owner = {i: k for k, part in enumerate(loose) for i in part}
    for i in set(range(n)) - set(core):
        touched = [owner[j] for j in core if near[i, j]]
        if touched:
            owner[i] = min(touched)
    broken = {owner[a] for a, b in foes if a in owner and owner[a] == owner.get(b)}
    parts = [{i for i in owner if owner[i] == k} for k in range(len(loose)) if k not in broken]
    grown = [{i} for i in core if owner[i] in broken]
    edges = sorted(
        (dense[a, b], a, b) for a, b in itertools.combinations(core, 2)
        if near[a, b] and owner[a] in broken
    )  # fmt: skip
    for _, a, b in edges:
        one, other = (next(p for p in grown if x in p) for x in (a, b))
        if one is not other and not any((x, y) in foes for x in one for y in other):
            one |= other
            grown.remove(other)
    parts += grown
    borders = sorted(
        (dense[i, j], i, j) for i in owner if owner[i] in broken and i not in core
        for j in core if near[i, j]
    )  # fmt: skip
    for _, i, j in borders:
        part = next(p for p in parts if j in p)
        if not any(i in p for p in parts) and not any((i, x) in foes for x in part):
            part.add(i)
    parts.sort(key=lambda p: min(set(core) & p))
    labels = np.full(n, -1)
    for number, part in enumerate(parts):
        labels[list(part)] = number
    return labels


@st.composite
def cases(draw):
    """Distances on a coarse grid, with ties and chains, and pairs that are apart."""
    n = draw(st.integers(2, 18))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = r.integers(1, 6, (n, n)).astype(np.float32) / 8
    dense[r.random((n, n)) > draw(st.sampled_from([0.1, 0.25, 0.6]))] = 1
    dense = np.minimum(dense, dense.T)
    np.fill_diagonal(dense, 0)
    every = list(itertools.combinations(range(n), 2))
    count = draw(st.integers(0, min(8, len(every))))
    chosen = r.choice(len(every), count, replace=False)
    return (
        dense,
        [every[i] for i in chosen],
        draw(st.sampled_from([0.3, 0.6])),
        draw(st.integers(1, 4)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_labels_are_those_of_the_plain_rule(case):
    dense, pairs, eps, min_samples = case
    graph = sparse(torch.from_numpy(dense), 0.99)
    apart = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    got = constrained_dbscan(graph, apart, eps, min_samples)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), plain(dense, pairs, eps, min_samples))
    one, other = got[apart[:, 0]], got[apart[:, 1]]
    assert not ((one == other) & (one >= 0)).any()
    turned = constrained_dbscan(graph, apart.flip(1).repeat(2, 1).numpy(), eps, min_samples)
    assert torch.equal(turned, got)


def test_without_pairs_or_with_harmless_ones_labels_are_those_of_dbscan():
    graph = jaccard_graph(features_like("moderate", 300))
    expected = dbscan(graph, 0.6)
    assert torch.equal(constrained_dbscan(graph, NO_PAIRS, 0.6), expected)
    first = [int((expected == k).nonzero()[0]) for k in range(int(expected.max()) + 1)]
    apart = torch.tensor(list(itertools.combinations(first, 2)))
    assert torch.equal(constrained_dbscan(graph, apart, 0.6), expected)


def test_a_chain_between_two_is_cut_at_its_longest_edge():
    """0 - 1 - 2 - 3 - 4, and 0 is known not to be 4: the long step from 2 to 3 is given up."""
    dense = torch.ones(5, 5)
    for a, b, distance in ((0, 1, 0.1), (1, 2, 0.2), (2, 3, 0.4), (3, 4, 0.1)):
        dense[a, b] = dense[b, a] = distance
    dense.fill_diagonal_(0)
    graph = sparse(dense, 0.5)
    assert dbscan(graph, 0.5, 2).tolist() == [0, 0, 0, 0, 0]
    assert constrained_dbscan(graph, torch.tensor([[4, 0]]), 0.5, 2).tolist() == [0, 0, 0, 1, 1]


def test_pairs_apart_make_no_core():
    dense = torch.full((3, 3), 0.2).fill_diagonal_(0)
    graph = sparse(dense, 0.5)
    assert dbscan(graph, 0.5, 3).tolist() == [0, 0, 0]
    assert constrained_dbscan(graph, torch.tensor([[0, 1]]), 0.5, 3).tolist() == [0, -1, 0]


@pytest.mark.parametrize(
    ("apart", "error", "message"),
    [
        ([[0, 5]], IndexError, r"apart must be in \[0, 5\) \(got 5\)"),
        ([[-1, 0]], IndexError, r"got -1"),
        ([[2, 2]], ValueError, "row 2 with itself"),
        ([0, 1], ValueError, r"apart must be \(P, 2\)"),
        ([[0.0, 1.0]], TypeError, "apart must be int64"),
    ],
)
def test_pairs_that_are_none_are_refused(apart, error, message):
    graph = sparse(torch.ones(5, 5).fill_diagonal_(0), 0.5)
    with pytest.raises(error, match=message):
        constrained_dbscan(graph, torch.tensor(apart), 0.5)


def test_graphs_of_other_kinds_are_refused_as_by_dbscan():
    for graph in (torch.ones(5, 5), "graph"):
        with pytest.raises(TypeError, match="graph must be"):
            constrained_dbscan(graph, torch.tensor([[0, 1]]), 0.5)
    with pytest.raises(ValueError, match="eps must be"):
        constrained_dbscan(sparse(torch.ones(2, 2), 1.0), NO_PAIRS, float("nan"))
