import importlib

import numpy as np
import pytest
import torch

from dhcl_ops import (
    _checks,
    _products,
    compat,
    jaccard_distance,
    knn,
    reciprocal,
    rerank,
    rerank_distances,
    reranking,
)
from tests.ops.jaccard_data import REGIMES, features_like, rerank_by_definition

knn_module = importlib.import_module("dhcl_ops.knn")  # the name in the package is the function


def split(regime, q, g, seed=0):
    x = features_like(regime, q + g, seed=seed)
    return x[:q], x[q:]


def distances_of(query, gallery):
    q, g = query.double(), gallery.double()
    return [torch.cdist(a, b).float() for a, b in ((q, g), (q, q), (g, g))]


@pytest.mark.parametrize("regime", ["clean", "moderate", "hard", "hubs"])
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (15, 1), (25, 3)])
def test_from_features(regime, k1, k2):
    query, gallery = split(regime, 40, 200)
    expected = rerank_by_definition(*map(np.asarray, distances_of(query, gallery)), k1, k2, 0.3)
    got = rerank(query, gallery, k1, k2, 0.3)
    assert got.shape == (40, 200)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("lambda_value", [0.0, 0.3, 1.0])
def test_from_distances(regime, lambda_value):
    matrices = distances_of(*split(regime, 50, 180, seed=2))
    expected = rerank_by_definition(*map(np.asarray, matrices), 20, 6, lambda_value)
    got = rerank_distances(*matrices, 20, 6, lambda_value)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=3e-6)


def test_distances_that_are_not_symmetric():
    """The published code reads columns, normalises them and transposes."""
    q_g, q_q, g_g = distances_of(*split("moderate", 20, 90))
    r = np.random.default_rng(0)
    q_q = q_q + torch.from_numpy(0.01 * r.random((20, 20), dtype=np.float32)).fill_diagonal_(0)
    g_g = g_g + torch.from_numpy(0.01 * r.random((90, 90), dtype=np.float32)).fill_diagonal_(0)
    expected = rerank_by_definition(*map(np.asarray, (q_g, q_q, g_g)), 10, 4, 0.3)
    got = rerank_distances(q_g, q_q, g_g, 10, 4)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=3e-6)


def best(dense, k):
    order = dense.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("topk", [1, 7, 150, 180])
def test_ranked_lists_are_the_best_of_the_matrix(topk, monkeypatch):
    monkeypatch.setattr(reranking, "_QUERIES", 16)
    query, gallery = split("duplicates", 50, 180, seed=3)
    dense = rerank(query, gallery)
    lists = rerank(query, gallery, topk=topk)
    values, indices = best(dense, topk)
    assert torch.equal(lists.indices, indices)
    assert torch.equal(lists.distances, values)
    matrices = distances_of(query, gallery)
    values, indices = best(rerank_distances(*matrices), topk)
    lists = rerank_distances(*matrices, topk=topk)
    assert torch.equal(lists.indices, indices)
    assert torch.equal(lists.distances, values)


def test_smallest_with_ties():
    rows = torch.randint(0, 4, (60, 40), generator=torch.Generator().manual_seed(0)).float()
    for k in (0, 1, 5, 39, 40):
        values, columns = reranking.smallest(rows, k)
        expected = best(rows, k)
        assert torch.equal(values, expected[0])
        assert torch.equal(columns, expected[1])


@pytest.mark.parametrize(("q", "g"), [(0, 5), (5, 0), (0, 0), (1, 1), (2, 3)])
def test_a_few_rows(q, g):
    query, gallery = features_like("clean", q, d=16), features_like("clean", g, d=16, seed=1)
    assert rerank(query, gallery).shape == (q, g)
    matrices = distances_of(query, gallery)
    got = rerank_distances(*matrices)
    assert got.shape == (q, g)
    assert got.isfinite().all()


def test_arrays_and_progress():
    query, gallery = split("clean", 20, 80)
    expected = rerank(query, gallery, topk=5)
    seen = {}
    got = rerank(
        query.numpy(), gallery.numpy(), topk=5,
        progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)),
    )  # fmt: skip
    assert isinstance(got.indices, np.ndarray)
    np.testing.assert_array_equal(got.indices, expected.indices.numpy())
    assert seen["distances"] == (20, 20)


@pytest.mark.parametrize("topk", [None, 5])
def test_lower_precision_of_products_elsewhere_does_not_reach_in(topk):
    query, gallery = split("moderate", 20, 80)
    expected = rerank(query, gallery, topk=topk)
    jaccard = jaccard_distance(gallery, convention="zhong")
    with torch.autocast("cpu", torch.bfloat16):
        got = rerank(query, gallery, topk=topk)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        again = jaccard_distance(gallery, convention="zhong")
    torch.testing.assert_close(again, jaccard, rtol=0, atol=0)


def test_refusals(monkeypatch):
    query, gallery = split("clean", 10, 40)
    q_g, q_q, g_g = distances_of(query, gallery)
    for arguments, error, message in [
        ((2 * query, gallery), ValueError, "rerank: query must have rows of norm 1"),
        ((query, gallery[:, :8]), ValueError, "gallery must have rows of norm 1"),
        ((query, gallery, 0), ValueError, "k1 must be >= 1"),
        ((query, gallery, 20, 30), ValueError, "k2 must be at most k1"),
        ((query, gallery, 20, 6, 1.5), ValueError, r"lambda_value must be in \[0, 1\]"),
    ]:
        with pytest.raises(error, match=message):
            rerank(*arguments)
    narrow = torch.nn.functional.normalize(gallery[:, :8])
    with pytest.raises(ValueError, match=r"one width .got 64 and 8"):
        rerank(query, narrow)
    with pytest.raises(ValueError, match=r"topk must be at most the gallery's 40 .got 41"):
        rerank(query, gallery, topk=41)
    with pytest.raises(ValueError, match=r"rerank_distances: q_q must have shape \(10, 10\)"):
        rerank_distances(q_g, g_g, q_q)
    q_g[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"q_g must be finite .got nan or inf in row 3"):
        rerank_distances(q_g, q_q, g_g)
    monkeypatch.setattr(_checks, "available_bytes", lambda device: 10)
    with pytest.raises(MemoryError, match=r"10 x 40 needs .* GiB .*topk="):
        rerank(query, gallery)


# ---- the names that scripts import today --------------------------------------------------------


def test_compute_jaccard_distance(capsys):
    x = features_like("moderate", 150)
    got = compat.compute_jaccard_distance(x, k1=20, k2=6, search_option=3)
    assert "time cost" in capsys.readouterr().out
    np.testing.assert_array_equal(got, jaccard_distance(x, 20, 6).numpy())
    half = compat.compute_jaccard_distance(x, print_flag=False, use_float16=True)
    assert half.dtype == np.float16
    assert capsys.readouterr().out == ""
    np.testing.assert_allclose(half, got, atol=5e-4)


def test_re_ranking():
    matrices = [m.numpy() for m in distances_of(*split("moderate", 30, 120))]
    got = compat.re_ranking(*matrices, k1=20, k2=6, lambda_value=0.3)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    expected = rerank_by_definition(*matrices, 20, 6, 0.3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)
    np.testing.assert_array_equal(np.argsort(got, kind="stable")[:, 0], expected.argmin(1))


# ---- as on a GPU ---------------------------------------------------------------------------------


def search_in_half(monkeypatch):
    """Give the CPU the search products of CUDA, fp16 operands and their bound; lists those made."""
    original = knn_module.Products
    made = []

    def products(*args, half):
        made.append(original(*args, half=True))
        return made[-1]

    monkeypatch.setattr(knn_module, "Products", products)
    return made


def with_opposites(regime, n, seed):
    """Rows of norm 1, some of them nearly opposite to others, some equally far from several."""
    x = features_like(regime, n, seed=seed)
    x[:20] = -x[20:40]
    x[40:60] = torch.nn.functional.normalize(-x[20:40] + 1e-4 * x[60:80])
    x[5] = x[6]
    return x


@pytest.mark.parametrize("regime", REGIMES)
def test_the_largest_distances_by_a_search_in_fp16_are_exact(regime, monkeypatch):
    half_products = search_in_half(monkeypatch)
    x = with_opposites(regime, 400, 4)
    every = torch.arange(len(x)).expand(len(x), -1)
    scores = torch.ops.dhcl.knn_scores(x, x, every.contiguous())
    found = reciprocal.largest_squares_by_search(x, None)
    assert torch.equal(found, 2.0 - 2.0 * scores.amin(1))
    assert half_products[0].half
    # The products alone would not have told.
    narrow = 2.0 - 2.0 * half_products[0].tile(slice(0, 400), slice(0, 400)).amax(1).neg()
    assert not torch.equal(found, narrow)


def test_the_search_for_the_largest_distances_reports_one_stage(device):
    calls = []
    x = features_like("moderate", 90).to(device)
    reciprocal.largest_squares_by_search(x, lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"largest distances"}
    assert calls[-1][1:] == (90, 90)
    assert len(reciprocal.largest_squares_by_search(x[:0], None)) == 0
    torch.testing.assert_close(
        reciprocal.largest_squares_by_search(x[:1], None).cpu(), torch.zeros(1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("topk", [None, 20])
def test_re_ranking_with_the_products_of_a_gpu(topk, monkeypatch):
    """Largest distances by a search and split products: as near to the truth as without."""
    query, gallery = split("moderate", 40, 200)
    expected = rerank(query, gallery, topk=topk)
    search_in_half(monkeypatch)
    monkeypatch.setattr(
        reranking, "knn_and_least", lambda features, k, progress: (knn(features, k), None)
    )
    monkeypatch.setattr(reranking, "largest_squares", reciprocal.largest_squares_by_search)
    monkeypatch.setattr(_products, "pays_to_split", lambda queries, features: True)
    found = rerank(query, gallery, topk=topk)
    if topk is None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(found.distances, expected.distances, rtol=0, atol=2e-6)
        assert torch.equal(found.indices, expected.indices)
