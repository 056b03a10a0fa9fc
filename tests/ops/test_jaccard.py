import numpy as np
import pytest
import torch

import dhcl_ops
from dhcl_ops import _checks, _ops, jaccard, jaccard_distance, jaccard_graph, reciprocal
from dhcl_ops._csr import Rows
from dhcl_ops.knn import Neighbours, knn
from tests import checks
from tests.checks import call, same_bits
from tests.ops.jaccard_data import (
    REGIMES,
    dense_distance,
    dense_expansion,
    densified,
    features_like,
    jaccard_by_definition,
)
from tests.ops.stages import equals_reference_on_samples

EPS = [0.4, 0.5, 0.55, 0.58, 0.6, 0.7]


def ranks_of(features, k):
    return knn(features, k)


def weights_of(features, k1, k2, convention="spcl"):
    """The sparse weights before the query expansion, and the neighbour lists."""
    k, half, k2 = reciprocal.list_width("test", len(features), k1, k2, convention)
    found = knn(features, k)
    lists = reciprocal.Lists(found.indices.int(), k, half, k2)
    scale = reciprocal.largest_squares(features, None) if convention == "zhong" else None
    return lists, reciprocal.feature_weights(features, lists, found.similarities, scale, None)


def dense_of(rows):
    n = len(rows.offsets) - 1
    out = torch.zeros(n, n)
    row = torch.arange(n).repeat_interleave(rows.offsets.diff())
    out[row, rows.columns.long()] = rows.values
    return out.numpy()


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_distances_follow_the_definition(regime, convention):
    x = features_like(regime, 300)
    ranks = knn(x, 31)
    got = jaccard_distance(x, 30, 6, convention=convention, ranks=ranks.indices)
    expected = jaccard_by_definition(x, 30, 6, convention, ranks.indices.numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("k1", "k2"), [(25, 6), (15, 3), (20, 6), (10, 1), (1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_distances_for_other_k(k1, k2, convention):
    """k1 = 25 and 15 tell rounding half to even from rounding half up."""
    x = features_like("moderate", 200, seed=3)
    got = jaccard_distance(x, k1, k2, convention=convention)
    expected = jaccard_by_definition(x, k1, k2, convention)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 1)])
def test_bits_equal_a_dense_computation_with_the_same_weights(regime, k1, k2):
    x = features_like(regime, 400, seed=1)
    lists, weights = weights_of(x, k1, k2)
    expansion = dense_expansion(dense_of(weights), lists.ranks.numpy(), k2)
    rows = reciprocal.expanded_weights(lists, weights, None)
    assert same_bits(torch.from_numpy(dense_of(rows)), torch.from_numpy(expansion))
    expected = torch.from_numpy(dense_distance(expansion))
    assert same_bits(jaccard_distance(x, k1, k2), expected)
    for eps in EPS:
        within = torch.where(expected <= np.float32(eps), expected, torch.inf)
        assert same_bits(densified(jaccard_graph(x, k1, k2, eps)), within)


@pytest.mark.parametrize("eps", [1e-6, 0.05, 0.95, 0.999])
def test_bits_at_extreme_eps(eps):
    x = features_like("moderate", 200, seed=5)
    dense = jaccard_distance(x, 20, 6)
    within = torch.where(dense <= np.float32(eps), dense, torch.inf)
    assert same_bits(densified(jaccard_graph(x, 20, 6, eps)), within)


def test_a_distance_equal_to_eps_counts():
    x = features_like("moderate", 120)
    dense = jaccard_distance(x, 15, 3)
    value = dense[(dense > 0.3) & (dense < 0.6)][7].item()
    kept = densified(jaccard_graph(x, 15, 3, value))
    assert same_bits(kept, torch.where(dense <= value, dense, torch.inf))
    assert (kept == value).any()


def test_a_forged_hub_in_every_list():
    """One row in everyone's query expansion makes a column as long as there are rows."""
    x = features_like("moderate", 400, seed=2)
    ranks = knn(x, 30).indices
    hub = 7
    for row in range(len(x)):
        if hub not in ranks[row, :6]:
            without = ranks[row][ranks[row] != hub]
            ranks[row] = torch.cat([without[:5], torch.tensor([hub]), without[5:]])[:30]
    dense = jaccard_distance(x, 30, 6, ranks=ranks)
    expected = jaccard_by_definition(x, 30, 6, "spcl", ranks.numpy())
    np.testing.assert_allclose(dense.numpy(), expected, rtol=0, atol=2e-6)
    for eps in EPS:
        within = torch.where(dense <= np.float32(eps), dense, torch.inf)
        assert same_bits(densified(jaccard_graph(x, 30, 6, eps, ranks=ranks)), within)


def test_more_duplicates_than_neighbours():
    row = features_like("moderate", 1)
    x = torch.cat([row.expand(100, -1), features_like("moderate", 60, seed=4)])
    dense = jaccard_distance(x, 30, 6)
    np.testing.assert_allclose(
        dense.numpy(), jaccard_by_definition(x, 30, 6, "spcl", knn(x, 30).indices), atol=2e-6
    )
    # A row comes first in its own list, so it belongs to its own mutual neighbours.
    assert dense.diagonal().max() < 1e-6
    # Lists that leave the row itself out: then a row can be far from itself, and is left out.
    ranks = torch.arange(30).expand(100, -1)
    ranks = torch.cat([ranks, knn(x, 30).indices[100:]])
    lost = jaccard_distance(x, 30, 1, ranks=ranks)
    assert (lost.diagonal()[30:100] == 1).all()
    within = torch.where(lost <= np.float32(0.6), lost, torch.inf)
    assert same_bits(densified(jaccard_graph(x, 30, 1, 0.6, ranks=ranks)), within)


def exact_features(n, d, seed):
    """Unit rows whose products are exact in float32, so that no order of summation shows."""
    r = np.random.default_rng(seed)
    rows = np.zeros((n, d), dtype=np.float32)
    for row in rows:
        # Sixteen entries of a quarter: norm 1.
        row[r.choice(d, 16, replace=False)] = r.choice([-0.25, 0.25], 16)
    return torch.from_numpy(rows)


@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_permuting_the_rows_permutes_the_result(convention):
    x = exact_features(250, 40, 0)
    # Index decides between equal similarities, so the lists are made once and permuted with them.
    found = knn(x, 16)
    order = torch.from_numpy(np.random.default_rng(1).permutation(250))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(250)
    moved = Neighbours(found.similarities[order], inverse[found.indices[order]], found.uncertified)
    plain = jaccard_distance(x, 15, 4, convention=convention, ranks=found)
    permuted = jaccard_distance(x[order], 15, 4, convention=convention, ranks=moved)
    # Sums go by ascending column, and columns have moved: equal up to rounding.
    torch.testing.assert_close(permuted, plain[order][:, order], rtol=0, atol=1e-6)
    edges = densified(jaccard_graph(x, 15, 4, 0.6, convention=convention, ranks=found))
    again = densified(jaccard_graph(x[order], 15, 4, 0.6, convention=convention, ranks=moved))
    assert torch.equal(again.isfinite(), edges[order][:, order].isfinite())


def test_given_ranks_change_nothing():
    x = features_like("hard", 200)
    found = knn(x, 20)
    plain = jaccard_graph(x, 15, 4)
    for ranks in (found, Neighbours(*found)._replace(uncertified=found.uncertified)):
        assert same_bits(jaccard_graph(x, 15, 4, ranks=ranks).values(), plain.values())
    only = jaccard_distance(x, 15, 4, ranks=found.indices)
    torch.testing.assert_close(only, jaccard_distance(x, 15, 4), rtol=0, atol=1e-6)
    as_int32 = jaccard_distance(x, 15, 4, ranks=found.indices.int())
    assert same_bits(as_int32, only)


# ---- the compiled ops and their references ------------------------------------------------------


def test_op_equals_its_reference_on_the_sample():
    equals_reference_on_samples("jaccard")


def test_join_survives_rows_of_other_weights():
    """Rows need not come from features: empty ones, long ones, sums that are not one."""
    r = np.random.default_rng(0)
    n = 120
    dense = r.random((n, n), dtype=np.float32) * (r.random((n, n)) < 0.2)
    dense[::7] = 0
    dense[3] = r.random(n)
    dense[:, 5] = 0.2  # in every row
    dense /= np.maximum(dense.sum(1, keepdims=True), 0.5)
    dense[11] *= 0.3
    weights = torch.from_numpy(dense)
    row, column = weights.nonzero().T
    offsets = torch.searchsorted(row.contiguous(), torch.arange(n + 1))
    rows = Rows(offsets, column.int(), weights[row, column])
    expected = torch.from_numpy(dense_distance(dense))
    for eps in (0.2, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99):
        index = jaccard.Index(*call("compiled", "inverted_index", *rows, eps))
        graph = jaccard.join(rows, index, eps, None)
        within = torch.where(expected <= np.float32(eps), expected, torch.inf)
        assert same_bits(densified(graph), within)


def test_same_bits_for_any_thread_count(monkeypatch):
    x = features_like("moderate", 2500)
    found = knn(x, 31)
    # What Zhong et al. scale a row with comes from a matrix product: see the next test.
    scale = reciprocal.largest_squares(x, None)
    monkeypatch.setattr(reciprocal, "largest_squares", lambda features, progress: scale)
    for convention in ("spcl", "zhong"):
        checks.for_any_thread_count(
            lambda convention=convention: jaccard_graph(
                x, 30, 6, convention=convention, ranks=found
            ).values()
        )
    checks.for_any_thread_count(lambda: jaccard_distance(x[:600], ranks=knn(x[:600], 30)))


def test_largest_squares_are_those_of_the_device_s_matrix_product():
    """Their bits may depend on the number of threads and the processor, within rounding."""
    x = features_like("moderate", 2500)
    truth = 2.0 - 2.0 * (x.double() @ x.double().T).amin(1)
    before = torch.get_num_threads()
    # A sum of d products of unit rows is off by d units of rounding at most, in any order.
    bound = 2 * x.shape[1] * torch.finfo(torch.float32).eps
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            assert (reciprocal.largest_squares(x, None).double() - truth).abs().max() <= bound
    finally:
        torch.set_num_threads(before)


def test_ranges_of_rows_do_not_show(monkeypatch):
    x = features_like("moderate", 300)
    plain = jaccard_graph(x)
    dense = jaccard_distance(x)
    original = jaccard.slices
    for module in (reciprocal, jaccard):
        monkeypatch.setattr(module, "slices", lambda n, s, p, size=0: original(n, s, p, 37))
    again = jaccard_graph(x)
    assert same_bits(again.values(), plain.values())
    assert same_bits(again.col_indices(), plain.col_indices())
    assert same_bits(again.crow_indices(), plain.crow_indices())
    assert same_bits(jaccard_distance(x), dense)


# ---- form of the result and borderline input ----------------------------------------------------


def test_the_graph_is_a_csr_tensor():
    x = features_like("clean", 100)
    graph = jaccard_graph(x, 15, 4)
    assert graph.layout == torch.sparse_csr
    assert graph.shape == (100, 100)
    assert graph.values().dtype == torch.float32
    assert graph.col_indices().dtype == graph.crow_indices().dtype == torch.int64
    rows = torch.arange(100).repeat_interleave(graph.crow_indices().diff())
    keys = rows * 100 + graph.col_indices()
    assert (keys.diff() > 0).all()
    dense = densified(graph)
    assert same_bits(dense, dense.T.contiguous())
    assert dense.diagonal().max() < 1e-6
    torch.sparse_csr_tensor(
        graph.crow_indices(), graph.col_indices(), graph.values(), (100, 100), check_invariants=True
    )


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_fewer_rows_than_neighbours(n, convention):
    """k1 and k2 count at most the rows there are."""
    x = features_like("moderate", n, d=16)
    dense = jaccard_distance(x, 30, 6, convention=convention)
    assert dense.shape == (n, n)
    if n > 1:
        expected = jaccard_by_definition(x, 30, 6, convention)
        np.testing.assert_allclose(dense.numpy(), expected, rtol=0, atol=2e-6)
    graph = densified(jaccard_graph(x, 30, 6, 0.6, convention=convention))
    assert same_bits(graph, torch.where(dense <= np.float32(0.6), dense, torch.inf))


def test_equal_rows_only():
    x = features_like("clean", 1).expand(12, -1)
    for convention in ("spcl", "zhong"):
        distances = jaccard_distance(x, 5, 2, convention=convention)
        assert distances.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted(dtype):
    x = features_like("clean", 100).to(dtype)
    assert same_bits(jaccard_distance(x, 15, 4), jaccard_distance(x.float(), 15, 4))


def test_strided_features_and_ranks():
    x = features_like("clean", 100)
    wide = torch.stack([x, x], dim=2).flatten(1)[:, ::2]
    ranks = knn(x, 15).indices
    strided = torch.stack([ranks, ranks], dim=2).flatten(1)[:, ::2]
    expected = jaccard_distance(x, 15, 4, ranks=ranks)
    assert same_bits(jaccard_distance(wide, 15, 4, ranks=strided), expected)


def test_arrays():
    x = features_like("clean", 100)
    expected = jaccard_distance(x, 15, 4)
    got = jaccard_distance(x.numpy(), 15, 4)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, expected.numpy())
    found = knn(x, 15)
    as_arrays = Neighbours(*(t.numpy() for t in found))
    for ranks in (as_arrays, as_arrays.indices):
        graph = jaccard_graph(x.numpy(), 15, 4, ranks=ranks)
        assert graph.layout == torch.sparse_csr


def test_no_gradient_flows():
    x = features_like("clean", 60).requires_grad_()
    assert not jaccard_distance(x, 15, 4).requires_grad


GOOD = features_like("clean", 40)


def broken(row, value):
    x = GOOD.clone()
    x[row, 3] = value
    return x


@pytest.mark.parametrize(
    ("features", "arguments", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "features must be a tensor or an array .got list"),
        (GOOD[0], {}, ValueError, r"features must be 2-D .got shape \(64,\)"),
        (GOOD.long(), {}, TypeError, "features must be float32 .*got int64"),
        (broken(4, torch.nan), {}, ValueError, "features must be finite .got nan in row 4"),
        (broken(9, torch.inf), {}, ValueError, "features must be finite .got inf in row 9"),
        (GOOD * 2, {}, ValueError, r"rows of norm 1, .*normalize .got 2 in row 0"),
        (torch.cat([GOOD, 0 * GOOD]), {}, ValueError, "norm 1.*got 0 in row 40"),
        (GOOD, {"k1": 0}, ValueError, "k1 must be >= 1 .got 0"),
        (GOOD, {"k1": 2.5}, TypeError, "k1 must be an integer .got float"),
        (GOOD, {"k2": 0}, ValueError, "k2 must be >= 1 .got 0"),
        (GOOD, {"k1": 5, "k2": 6}, ValueError, "k2 must be at most k1 .got k1=5, k2=6"),
        (GOOD, {"convention": "zheng"}, ValueError, "convention must be 'spcl' or 'zhong'"),
        (
            GOOD,
            {"ranks": torch.zeros(40, 3).long()},
            ValueError,
            r"at least 30 columns .*\(40, 3\)",
        ),
        (GOOD, {"ranks": torch.zeros(39, 30).long()}, ValueError, "ranks must have 40 rows"),
        (GOOD, {"ranks": torch.zeros(40, 30)}, TypeError, "ranks must be int64 or int32"),
        (GOOD, {"ranks": torch.full((40, 30), 40)}, ValueError, r"in \[0, 40\) .got 40"),
        (GOOD, {"ranks": torch.full((40, 30), -1)}, ValueError, r"in \[0, 40\) .got -1"),
    ],
)
def test_bad_arguments(features, arguments, error, message):
    with pytest.raises(error, match="jaccard_graph: .*" + message):
        jaccard_graph(features, **arguments)
    with pytest.raises(error, match="jaccard_distance: .*" + message):
        jaccard_distance(features, **arguments)


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_eps_outside_zero_and_one(eps):
    with pytest.raises(ValueError, match=r"jaccard_graph: eps must be in \(0, 1\) \(got"):
        jaccard_graph(GOOD, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number"):
        jaccard_graph(GOOD, eps="0.6")


def test_a_dense_matrix_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(_checks, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"40 x 40 needs 0.0 GiB and 0.0 GiB .*jaccard_graph"):
        jaccard_distance(GOOD)


def test_ops_check_what_they_index_with():
    """Pointers must not leave their arrays; in PyTorch indexing itself looks."""
    offsets, columns = torch.tensor([0, 1]), torch.tensor([1], dtype=torch.int32)
    if not _ops.OPS["inverted_index"].compiled("cpu"):
        with pytest.raises(IndexError):
            torch.ops.dhcl.inverted_index(offsets, columns, torch.ones(1), 0.5)
        return
    with pytest.raises(RuntimeError, match=r"columns must be in \[0, 1\)"):
        torch.ops.dhcl.inverted_index(offsets, columns, torch.ones(1), 0.5)


# ---- progress and interruption ------------------------------------------------------------------


def test_progress_ends_each_stage_at_its_total():
    seen = {}
    jaccard_graph(
        features_like("clean", 100), 15, 4, convention="zhong",
        progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)),
    )  # fmt: skip
    assert {"mutual neighbours", "largest distances", "weights", "query expansion", "pairs"} <= set(
        seen
    )
    assert all(done == total for done, total in seen.values())


def test_an_exception_in_progress_ends_the_call():
    def stop(stage, done, total):
        if stage == "weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaccard_graph(GOOD, progress=stop)


def test_the_package_offers_it():
    assert dhcl_ops.jaccard_graph is jaccard_graph
    assert dhcl_ops.jaccard_distance is jaccard_distance
