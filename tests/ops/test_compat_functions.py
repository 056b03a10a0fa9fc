"""The functions of other projects: their values against plain loops, and their return values."""

import re

import numpy as np
import pytest
import torch

from dhcl_ops import compat
from dhcl_ops.compat import (
    cap,
    clustercontrast,
    fastreid,
    ice,
    ise,
    openreid,
    openunreid,
    pplr,
    spcl,
    torchreid,
    transreid,
)
from tests.ops.jaccard_data import (
    dense_distance,
    dense_expansion,
    dense_ranks,
    dense_weights,
    features_like,
    jaccard_by_definition,
    rerank_by_definition,
)

# ---- ranking -------------------------------------------------------------------------------------


def case(q=20, g=60, people=9, cameras=3, seed=0):
    """Distances without ties, identities and cameras, as NumPy arrays."""
    r = np.random.default_rng(seed)
    distance = r.permutation(q * g).reshape(q, g) / (q * g)
    ids = r.integers(0, people, q), r.integers(0, people, g)
    return distance.astype(np.float32), *ids, r.integers(0, cameras, q), r.integers(0, cameras, g)


def ranked_lists(data, *, separate=False):
    """Of each query with a right match: which entries of its list are right, and their identities.

    Entries of its identity and camera are left out, with ``separate`` all of its camera.
    """
    distance, q_pids, g_pids, q_camids, g_camids = data
    for row, pid, camera in zip(distance, q_pids, q_camids, strict=True):
        same = g_camids == camera
        left_out = same if separate else same & (g_pids == pid)
        order = [g for g in np.argsort(row) if not left_out[g]]
        right = g_pids[order] == pid
        if right.any():
            yield right, g_pids[order]


def precisions(data):
    """Average precision and inverse negative penalty of each query with a right match."""
    out = []
    for right, _ in ranked_lists(data):
        ranks = np.flatnonzero(right) + 1
        each = [(n + 1) / rank for n, rank in enumerate(ranks)]
        out.append((np.mean(each), len(ranks) / ranks[-1]))
    return np.array(out).T


def one_image_each(ids, randint):
    """Places of one entry per identity, drawn in the order in which identities appear."""
    places = {}
    for place, identity in enumerate(ids):
        places.setdefault(identity, []).append(place)
    return np.sort([p[randint(0, len(p))] for p in places.values()])


def first_match_cmc(data, ranks):
    cmcs = [np.arange(ranks) >= np.argmax(right) for right, _ in ranked_lists(data)]
    return np.mean(cmcs, axis=0)


def test_fast_reid_gives_the_scores_of_each_query():
    data = case()
    data[1][4] = 99  # has no right match, and is in no list
    cmc, all_ap, all_inp = fastreid.evaluate_rank(*data, max_rank=15)
    expected = precisions(data)
    np.testing.assert_allclose(all_ap, expected[0], rtol=1e-12)
    np.testing.assert_allclose(all_inp, expected[1], rtol=1e-12)
    assert cmc.dtype == np.float32
    np.testing.assert_allclose(cmc, first_match_cmc(data, 15), rtol=1e-6)
    assert len(all_ap) == 19
    single = fastreid.evaluate_rank(*data, use_metric_cuhk03=True)
    assert len(single) == 2
    assert single[1] == pytest.approx(np.mean(expected[0]))


def test_torchreid_openunreid_and_transreid_give_two_values(capsys):
    data = case()
    expected = np.mean(precisions(data)[0])
    for result in (
        torchreid.evaluate_rank(*data, 15),
        openunreid.evaluate_rank(*data, 15, verbose=False),
        transreid.eval_func(*data, max_rank=15),
    ):
        cmc, mean_ap = result
        np.testing.assert_allclose(cmc, first_match_cmc(data, 15), rtol=1e-6)
        assert mean_ap == pytest.approx(expected)
    assert capsys.readouterr().out == ""
    openunreid.evaluate_rank(*data, 15, cmc_topk=[1, 5, 20])
    said = capsys.readouterr().out
    assert f"Mean AP: {expected:4.1%}" in said
    assert re.search(rf"top-5 +{first_match_cmc(data, 15)[4]:.1%}", said)
    assert "top-20" not in said  # past the end


@pytest.mark.parametrize("evaluate", [torchreid.evaluate_rank, fastreid.evaluate_rank])
def test_the_cmc_is_as_long_as_torchreids(evaluate):
    """Rows of ranks are cut at the end of the list they come from, and then averaged."""
    # CUHK03: a list has one entry per identity.
    few = case(people=9)
    assert len(evaluate(*few, max_rank=20, use_metric_cuhk03=True)[0]) == 9
    assert len(evaluate(*few, max_rank=5, use_metric_cuhk03=True)[0]) == 5
    # The standard: each query's own image is in the gallery and removed.
    distance, pids, _, _, _ = case(12, 12, people=3)
    own = np.arange(12)
    assert len(evaluate(distance, pids, pids, own, own, max_rank=12)[0]) == 11
    # Lists of several lengths, where torchreid fails; the last ranks are all found.
    cameras = np.r_[own[:6], [0] * 6]
    cmc = evaluate(distance, pids, pids, cameras, cameras, max_rank=12)[0]
    assert len(cmc) == 12
    assert cmc[-1] == 1.0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["first", "every", "single"])
def test_open_reids_cmc(separate, kind):
    data = case()
    total, count = np.zeros(12), 0
    np.random.seed(4)
    for right, ids in ranked_lists(data, separate=separate):
        count += 1
        for _ in range(10 if kind == "single" else 1):
            kept = right
            if kind == "single":
                kept = right[one_image_each(ids, np.random.randint)]
            places = np.flatnonzero(kept)
            places = places[:1] if kind == "first" else places
            for n, place in enumerate(places):
                share = 1 / len(places) / (10 if kind == "single" else 1)
                total[place - n :] += share  # counted at the number of wrong ones before it
    np.random.seed(4)
    got = openreid.cmc(
        *data, topk=12, separate_camera_set=separate,
        single_gallery_shot=kind == "single", first_match_break=kind == "first",
    )  # fmt: skip
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, total / count, rtol=1e-9)


def test_open_reids_arguments_as_evaluators_give_them():
    distance, *rest = case()
    lists = [values.tolist() for values in rest]
    expected = np.mean(precisions((distance, *rest))[0])
    for module in (openreid, spcl, clustercontrast, ice, pplr):
        assert module.mean_ap(torch.from_numpy(distance), *lists) == pytest.approx(expected)
    names = [np.array([f"p{v}" for v in values]) for values in rest]
    assert openreid.mean_ap(distance, *names) == pytest.approx(expected)
    np.testing.assert_allclose(openreid.cmc(distance, *names), openreid.cmc(distance, *lists))
    # Without identities the i-th query is the i-th image, seen by another camera.
    square = case(8, 8)[0]
    ranks = 1 + (square < np.diag(square)[:, None]).sum(1)
    assert openreid.mean_ap(square) == pytest.approx(np.mean(1 / ranks))
    assert openreid.cmc(square, topk=3)[0] == np.mean(ranks == 1)


def test_ise_gives_the_average_precision_of_each_query_for_its_images():
    data = case()
    data[1][4] = 99
    assert ise.mean_ap(*data) == openreid.mean_ap(*data)
    each = ise.mean_ap(*data, draw_image=True)
    assert isinstance(each, list)
    np.testing.assert_allclose(each, precisions(data)[0], rtol=1e-12)


def test_cap_takes_the_area_under_the_curve():
    data = case()
    areas = []
    for right, _ in ranked_lists(data):
        hits, places = np.cumsum(right), np.arange(1, len(right) + 1)
        recall = np.r_[0, hits / hits[-1]]
        areas.append(np.trapezoid(np.r_[1, hits / places], recall))
    assert cap.mean_ap(*data) == pytest.approx(np.mean(areas))
    assert cap.cmc is openreid.cmc


# ---- re-ranking ----------------------------------------------------------------------------------


def matrices(scale=None):
    x = features_like("moderate", 130).double()
    x = x if scale is None else x * scale[:, None]
    q, g = x[:30], x[30:]
    parts = [torch.cdist(a, b).float().numpy() for a, b in ((q, g), (q, q), (g, g))]
    return (q.float(), g.float()), parts


def lengths(n):
    return 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(1)).double()


def test_openunreid_re_ranking_cpu():
    _, parts = matrices()
    expected = rerank_by_definition(*parts, 20, 6, 0.3)
    got = openunreid.re_ranking_cpu(*parts)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("unit", [True, False])
def test_transreid_re_ranking_takes_features(unit):
    """Squared distances over their largest, not squared again: as of plain distances squared."""
    features, parts = matrices(None if unit else lengths(130))
    got = transreid.re_ranking(*features, k1=20, k2=6, lambda_value=0.3)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, rerank_by_definition(*parts, 20, 6, 0.3), rtol=0, atol=1e-5)


def test_transreid_local_distances():
    features, parts = matrices()
    r = np.random.default_rng(0)
    local = r.random((130, 130)).astype(np.float32)
    local += local.T
    np.fill_diagonal(local, 0)

    def blocks(whole):
        return whole[:30, 30:], whole[:30, :30], whole[30:, 30:]

    def rooted(squares):
        return [np.sqrt(part) for part in squares]

    both = [part**2 + own for part, own in zip(parts, blocks(local), strict=True)]
    got = transreid.re_ranking(*features, 20, 6, 0.3, local_distmat=local)
    expected = rerank_by_definition(*rooted(both), 20, 6, 0.3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    alone = transreid.re_ranking(*features, 20, 6, 0.3, torch.from_numpy(local), only_local=True)
    expected = rerank_by_definition(*rooted(blocks(local)), 20, 6, 0.3)
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


def test_arrays_of_any_strides():
    """Reversed, transposed, read-only and of float64, as NumPy code of the projects takes them."""
    _, parts = matrices()
    expected = torchreid.re_ranking(*parts)
    backwards = parts[0][::-1], parts[1][::-1, ::-1], parts[2].T
    backwards[0].flags.writeable = False
    got = torchreid.re_ranking(*backwards)
    np.testing.assert_allclose(got, expected[::-1], rtol=0, atol=2e-6)
    wide = [np.asarray(part, dtype=np.float64) for part in parts]
    np.testing.assert_array_equal(torchreid.re_ranking(*wide), expected)
    distance, *rest = case()
    turned = distance[::-1], rest[0][::-1], rest[1], rest[2][::-1], rest[3]
    assert torchreid.evaluate_rank(*turned)[1] == torchreid.evaluate_rank(distance, *rest)[1]


# ---- Jaccard distance and lists ------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
def test_jaccard_distance_of_rows_of_any_length(unit, capsys):
    x = features_like("moderate", 120, seed=2)
    x = x if unit else x * lengths(120)[:, None].float()
    wide = x.double()
    squares = torch.cdist(wide, wide).square().numpy()
    ranks = dense_ranks(squares)
    weights = dense_weights(ranks, squares, 15, "spcl")
    expected = dense_distance(dense_expansion(weights, ranks, 4))
    got = fastreid.compute_jaccard_distance(features=x, k1=15, k2=4, search_option=3)
    assert capsys.readouterr().out == ""
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    same = openunreid.compute_jaccard_distance(x.numpy()[::-1][::-1], 15, 4, verbose=True)
    np.testing.assert_array_equal(same, got)
    assert "Jaccard distance computing time cost" in capsys.readouterr().out
    half = openunreid.compute_jaccard_distance(x, k1=15, k2=4, fp16=True, verbose=False)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, got, atol=1e-3)


def test_the_same_distance_under_the_names_of_spcl_and_cap(capsys):
    x = features_like("moderate", 120)
    expected = jaccard_by_definition(x, 20, 6, "spcl")
    for function in (spcl.compute_jaccard_distance, cap.faiss_compute_jaccard_dist):
        got = function(x, print_flag=False)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    assert capsys.readouterr().out == ""
    for module in (compat, clustercontrast, ice, pplr):
        assert module.compute_jaccard_distance is spcl.compute_jaccard_distance


@pytest.mark.parametrize("unit", [True, False])
def test_pplrs_ranked_lists(unit):
    x = features_like("moderate", 90)
    x = x if unit else x * lengths(90)[:, None].float()
    got = pplr.compute_ranked_list(x, k=7, verbose=False)
    wide = x.double()
    expected = dense_ranks(torch.cdist(wide, wide).numpy())[:, 1:8]
    assert got.shape == (90, 7)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected)
    few = pplr.compute_ranked_list(x[:4], k=20, verbose=False)
    assert few.shape == (4, 3)


# ---- errors --------------------------------------------------------------------------------------


def refusals():
    """Calls with wrong arguments, and what the error begins with."""
    data, x = case(), features_like("clean", 40)
    _, parts = matrices()
    nan = data[0].copy()
    nan[3, 2] = np.nan
    yield lambda: torchreid.evaluate_rank(nan, *data[1:]), "evaluate_rank: distmat must not be NaN"
    yield (
        lambda: fastreid.evaluate_rank(data[0], data[1][:5], *data[2:]),
        r"evaluate_rank: q_pids must have shape \(20,\), one per query",
    )
    yield (
        lambda: transreid.eval_func(*data[:4], data[4][:5]),
        r"eval_func: g_camids must have shape \(60,\)",
    )
    yield (
        lambda: openunreid.evaluate_rank(data[0][0], *data[1:]),
        "evaluate_rank: distmat must be 2-D",
    )
    yield lambda: openreid.mean_ap(data[0], data[1][:5]), r"mean_ap: query_ids must have shape"
    yield lambda: openreid.cmc(*data, topk=0), "cmc: topk must be >= 1"
    yield lambda: cap.mean_ap(data[0] > 2, *data[1:]), "mean_ap: distmat must be float"
    yield (
        lambda: torchreid.evaluate_rank(data[0], data[1] + 100, *data[2:]),
        "evaluate_rank: no query has a right match",
    )
    yield (
        lambda: torchreid.re_ranking(parts[0], parts[2], parts[1]),
        r"re_ranking: q_q_dist must have shape \(30, 30\)",
    )
    yield lambda: openunreid.re_ranking_cpu(*parts, k1=0), "re_ranking_cpu: k1 must be >= 1"
    yield (
        lambda: transreid.re_ranking(x, x[:, :5], 20, 6, 0.3),
        "re_ranking: galFea must have shape",
    )
    yield lambda: transreid.re_ranking(x, x, 20, 6, 1.3), "re_ranking: lambda_value must be in"
    yield (
        lambda: spcl.compute_jaccard_distance(2 * x, print_flag=False),
        "compute_jaccard_distance: target_features must have rows of norm 1",
    )
    yield (
        lambda: fastreid.compute_jaccard_distance(x / x[:, :1] * torch.nan),
        "compute_jaccard_distance: features must be finite",
    )
    yield (
        lambda: openunreid.compute_jaccard_distance(2 * x, k2=30, verbose=False),
        "compute_jaccard_distance: k2 must be at most k1",
    )
    yield lambda: pplr.compute_ranked_list(x[0]), "compute_ranked_list: features must be 2-D"


def test_errors_name_the_function_that_was_called_and_its_arguments():
    for number, (call, message) in enumerate(refusals()):
        with pytest.raises((TypeError, ValueError), match=f"^{message}") as caught:
            call()
        assert "evaluate_ranking" not in str(caught.value), number
