import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dhcl_ops import compat, evaluate_ranking
from dhcl_ops import ranking as ranking_module
from tests import checks
from tests.checks import call
from tests.conftest import needs_cuda


def case(q, g, *, people=5, cameras=3, seed=0, junk=True, levels=0):
    """Distances (with few distinct values if ``levels``), identities and cameras."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, n):
        return torch.randint(low, high, (n,), generator=generator)

    distance = torch.rand(q, g, generator=generator)
    if levels:
        distance = (distance * levels).floor()
    ids = integers(1, people + 1, q), integers(-1 if junk else 0, people + 1, g)
    return distance, *ids, integers(0, cameras, q), integers(0, cameras, g)


def loop(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, *, ap="hits", junk=-1):
    """CMC, AP, INP and first match of each valid query, written out place by place."""
    out = {}
    for q, row in enumerate(np.asarray(distance)):
        good, wrong_before, places = 0, 0, []
        rank = 0
        total = 0
        area, old_recall, old_precision = 0.0, 0.0, 1.0
        relevant = [
            g
            for g in range(len(row))
            if gallery_ids[g] == query_ids[q]
            and gallery_ids[g] != junk
            and (query_cameras is None or gallery_cameras[g] != query_cameras[q])
        ]
        total = len(relevant)
        if total == 0:
            continue
        for g in np.argsort(row, kind="stable"):
            same = gallery_ids[g] == query_ids[q]
            if gallery_ids[g] == junk:
                continue
            if same and query_cameras is not None and gallery_cameras[g] == query_cameras[q]:
                continue
            rank += 1
            if same:
                good += 1
                places.append(rank)
            else:
                wrong_before += good == 0
            # The Matlab code's walk along the precision-recall curve.
            recall, precision = good / total, good / rank
            area += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
        average = area
        if ap == "hits":
            average = sum((i + 1) / r for i, r in enumerate(places)) / total
        assert places[0] == wrong_before + 1
        out[q] = (average, total / places[-1], places[0])
    return out


def assert_is(result, expected, max_rank, num_queries):
    assert result.num_valid == len(expected)
    average, penalty, first = (np.array(x) for x in zip(*expected.values(), strict=True))
    cmc = [(first <= k).mean() for k in range(1, max_rank + 1)]
    np.testing.assert_allclose(np.asarray(torch.as_tensor(result.cmc).cpu()), cmc, rtol=1e-12)
    assert result.mAP == pytest.approx(average.mean(), rel=1e-12)
    assert result.mINP == pytest.approx(penalty.mean(), rel=1e-12)
    if result.first_match is None:
        return
    assert len(result.first_match) == num_queries
    for q in range(num_queries):
        if q in expected:
            assert result.average_precision[q].item() == pytest.approx(expected[q][0], rel=1e-12)
            penalty_of_q = result.inverse_negative_penalty[q].item()
            assert penalty_of_q == pytest.approx(expected[q][1], rel=1e-12)
            assert result.first_match[q].item() == expected[q][2]
        else:
            assert np.isnan(result.average_precision[q].item())
            assert np.isnan(result.inverse_negative_penalty[q].item())
            assert result.first_match[q].item() == 0


# ---- values --------------------------------------------------------------------------------------

SHAPES = [(1, 3), (3, 1), (7, 40), (30, 65), (20, 300)]


@pytest.mark.parametrize(("q", "g"), SHAPES)
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("ap", ["hits", "trapezoid"])
def test_metrics_are_the_definition(device, q, g, levels, ap):
    for seed in range(20):
        data = case(q, g, levels=levels, seed=seed)
        expected = loop(*data, ap=ap)
        if expected:
            break
    data_there = [t.to(device) for t in data]
    result = evaluate_ranking(*data_there, ap=ap, max_rank=9, per_query=True)
    assert_is(result, expected, 9, q)
    assert result.cmc.dtype == torch.float64
    assert result.cmc.device.type == device.type


def test_without_cameras_nothing_of_the_query_is_removed(device):
    distance, qi, gi, _, _ = case(12, 50)
    result = evaluate_ranking(distance.to(device), qi, gi, per_query=True, max_rank=5)
    assert_is(result, loop(distance, qi, gi, None, None), 5, 12)


def test_junk_is_what_one_says(device):
    distance, qi, gi, qc, gc = case(10, 60)
    for junk in (-1, 2, None):
        expected = loop(distance, qi, gi, qc, gc, junk=junk)
        result = evaluate_ranking(distance.to(device), qi, gi, qc, gc, junk_id=junk, per_query=True)
        assert_is(result, expected, 50, 10)


def test_distractors_count_as_wrong():
    ids = torch.tensor([3]), torch.tensor([0, 3, -1])
    cameras = torch.tensor([1]), torch.tensor([2, 2, 1])
    result = evaluate_ranking(torch.tensor([[0.1, 0.2, 0.0]]), *ids, *cameras, max_rank=3)
    assert result.cmc.tolist() == [0.0, 1.0, 1.0]
    assert result.mAP == 0.5
    assert result.mINP == 0.5


def test_worked_example_of_both_kinds_of_average_precision():
    """Hits at ranks 1 and 3: by hand 1/2 (1 + 2/3) and 1/2 (1 + (1/2 + 2/3)/2)."""
    distance = torch.tensor([[0.1, 0.2, 0.3]])
    ids = torch.tensor([1]), torch.tensor([1, 2, 1])
    assert evaluate_ranking(distance, *ids).mAP == pytest.approx(5 / 6)
    trapezoid = evaluate_ranking(distance, *ids, ap="trapezoid").mAP
    assert trapezoid == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)


def test_ties_go_by_index(device):
    """The rank is that of a stable argsort, also among removed entries and for signed zeros."""
    distance = torch.zeros(1, 6, device=device)
    distance[0, 1] = -0.0
    ids = torch.tensor([1]), torch.tensor([2, 1, 1, 3, 1, 1])
    cameras = torch.tensor([0]), torch.tensor([1, 0, 1, 1, 0, 1])
    result = evaluate_ranking(distance, *ids, *cameras, max_rank=6, per_query=True)
    # Left: 0 wrong, 2 right, 3 wrong, 5 right.
    assert result.first_match.tolist() == [2]
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_infinite_distances_come_last(device):
    distance = torch.tensor([[torch.inf, 1.0, -torch.inf, torch.inf]], device=device)
    ids = torch.tensor([1]), torch.tensor([1, 2, 3, 1])
    result = evaluate_ranking(distance, *ids, per_query=True)
    assert result.first_match.tolist() == [3]


def test_cmc_stays_past_the_gallery():
    result = evaluate_ranking(
        torch.rand(4, 3), torch.ones(4).long(), torch.tensor([1, 0, 0]), max_rank=7
    )
    assert result.cmc.shape == (7,)
    assert result.cmc[2:].tolist() == [1.0] * 5


@pytest.mark.parametrize("matches", [5, 127, 128, 129, 700])
@pytest.mark.parametrize("levels", [0, 4])
def test_a_person_seen_often(implementation, device, matches, levels):
    """Few matches are counted one by one, many by a search: the ranks are the same."""
    distance, _, _, qc, gc = case(3, 900, levels=levels, seed=matches)
    gi = (torch.arange(900) < matches).long()[
        torch.randperm(900, generator=torch.Generator().manual_seed(0))
    ]
    qi = torch.tensor([1, 7, 1])
    members, begin, offsets = ranking_module.matches(qi, gi)
    total = int(offsets[-1])
    arguments = [t.to(device) for t in (distance, members, begin, offsets)]
    cameras = [t.to(device) for t in (qc, gc)]
    ranks = call(implementation, "match_ranks", *arguments, total, *cameras).cpu()
    assert total == 2 * matches
    for k, q in enumerate((0, 2)):
        order = np.argsort(distance[q].numpy(), kind="stable")
        gone = ((gi == 1) & (gc == qc[q])).numpy()
        rank_of = dict(zip(order[~gone[order]].tolist(), itertools.count(1)))
        expected = [rank_of.get(g, 0) for g in gi.nonzero().squeeze(1).tolist()]
        assert ranks[k * matches : (k + 1) * matches].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_of_distances(device, dtype):
    distance, *rest = case(15, 80)
    distance = distance.to(dtype)
    result = evaluate_ranking(distance.to(device), *rest, per_query=True)
    assert_is(result, loop(distance.double(), *rest), 50, 15)


# ---- from features -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_rank_like_their_distances(device, monkeypatch, metric, dtype):
    monkeypatch.setattr(ranking_module, "_BLOCK_ENTRIES", 6400)
    generator = torch.Generator().manual_seed(0)
    _, qi, gi, qc, gc = case(150, 200, people=20)
    query = torch.randn(150, 40, generator=generator, dtype=dtype)
    gallery = torch.randn(200, 40, generator=generator, dtype=dtype) + 2 * torch.rand(200, 1)
    gallery = gallery.to(dtype)
    if metric == "euclidean":
        distance = torch.cdist(query.double(), gallery.double())
    else:
        distance = -torch.nn.functional.cosine_similarity(
            query.double().unsqueeze(1), gallery.double(), dim=2
        )
    features = query.to(device), gallery.to(device)
    result = evaluate_ranking(features, qi, gi, qc, gc, metric=metric, per_query=True)
    assert_is(result, loop(distance, qi, gi, qc, gc), 50, 150)


def test_zero_rows_have_cosine_zero():
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    result = evaluate_ranking(
        (query, gallery),
        torch.tensor([4]),
        torch.tensor([4, 1, 2]),
        metric="cosine",
        per_query=True,
    )
    assert result.first_match.tolist() == [2]


def test_blocks_do_not_show(monkeypatch):
    data = case(200, 90)
    features = torch.randn(200, 8), torch.randn(90, 8)
    for distances in (data[0], features):
        whole = evaluate_ranking(distances, *data[1:], per_query=True)
        with monkeypatch.context() as patch:
            patch.setattr(ranking_module, "_BLOCK_ENTRIES", 1)
            calls = []

            def record(*args, calls=calls):
                calls.append(args)

            blocks = evaluate_ranking(distances, *data[1:], per_query=True, progress=record)
        assert calls == [("queries", n, 200) for n in (64, 128, 192, 200)]
        assert torch.equal(whole.cmc, blocks.cmc)
        assert whole[1:4] == blocks[1:4]
        assert torch.equal(whole.first_match, blocks.first_match)


# ---- CUHK03 --------------------------------------------------------------------------------------


def cuhk03_loop(distance, qi, gi, qc, gc, max_rank, repeats):
    """The protocol as torchreid has it: draws by np.random.choice, places in the ranked list."""
    cmcs = []
    for q, row in enumerate(np.asarray(distance)):
        order = np.argsort(row, kind="stable")
        kept = [g for g in order if not (gi[g] == qi[q] and gc[g] == qc[q])]
        hits = np.array([int(gi[g] == qi[q]) for g in kept])
        if not hits.any():
            continue
        places = defaultdict(list)
        for place, g in enumerate(kept):
            places[int(gi[g])].append(place)
        cmc = np.zeros(max_rank)
        for _ in range(repeats):
            mask = np.zeros(len(hits), bool)
            for of_person in places.values():
                mask[np.random.choice(of_person)] = True
            found = np.minimum(hits[mask].cumsum(), 1)
            found = np.concatenate([found, np.full(max_rank, found[-1])])
            cmc += found[:max_rank]
        cmcs.append(cmc / repeats)
    return np.mean(cmcs, axis=0)


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("repeats", [1, 10])
def test_cuhk03_draws_like_torchreid(device, levels, repeats):
    distance, qi, gi, qc, gc = case(30, 70, people=12, junk=False, levels=levels)
    np.random.seed(5)
    expected = cuhk03_loop(distance, qi, gi, qc, gc, 8, repeats)
    arguments = (distance.to(device), qi, gi, qc, gc)
    result = evaluate_ranking(
        *arguments, protocol="cuhk03", repeats=repeats, seed=5, max_rank=8, per_query=True
    )
    np.testing.assert_allclose(result.cmc.cpu().numpy(), expected, rtol=1e-12)
    # All else is that of the standard protocol.
    standard = evaluate_ranking(*arguments, max_rank=8)
    assert result[1:4] == standard[1:4]
    again = evaluate_ranking(*arguments, protocol="cuhk03", repeats=repeats, seed=5, max_rank=8)
    assert torch.equal(again.cmc, result.cmc)


def test_cuhk03_without_cameras_and_with_features():
    _, qi, gi, _, _ = case(10, 40, junk=True)
    features = torch.randn(10, 6), torch.randn(40, 6)
    result = evaluate_ranking(features, qi, gi, protocol="cuhk03", max_rank=10)
    assert result.cmc[-1] == 1.0
    assert (result.cmc.diff() >= 0).all()


# ---- torchreid's name and signature --------------------------------------------------------------


def torchreid_market(distmat, q_pids, g_pids, q_camids, g_camids, max_rank):
    """eval_market1501 of torchreid, written down from its definition."""
    cmcs, averages = [], []
    for q in range(len(q_pids)):
        order = np.argsort(distmat[q], kind="stable")
        kept = order[~((g_pids[order] == q_pids[q]) & (g_camids[order] == q_camids[q]))]
        hits = (g_pids[kept] == q_pids[q]).astype(np.int32)
        if not hits.any():
            continue
        cmcs.append(np.minimum(hits.cumsum(), 1)[:max_rank])
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        averages.append((precision * hits).sum() / hits.sum())
    return np.asarray(cmcs).astype(np.float32).sum(0) / len(averages), np.mean(averages)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_evaluate_rank_gives_torchreids_numbers(dtype):
    distance, *rest = (t.numpy() for t in case(40, 90, people=9))
    distance = distance.astype(dtype)
    cmc, mean = compat.evaluate_rank(distance, *rest, max_rank=20)
    expected_cmc, expected_mean = torchreid_market(distance, *rest, 20)
    assert cmc.dtype == np.float32
    assert np.array_equal(cmc, expected_cmc)
    assert mean == pytest.approx(expected_mean, rel=1e-12)


def test_evaluate_rank_of_cuhk03_uses_numpys_random_state():
    distance, qi, gi, qc, gc = case(15, 60, people=9, junk=False)
    np.random.seed(3)
    expected = cuhk03_loop(distance, qi, gi, qc, gc, 20, 10)
    np.random.seed(3)
    arguments = [t.numpy() for t in (distance, qi, gi, qc, gc)]
    cmc, _ = compat.evaluate_rank(*arguments, max_rank=20, use_metric_cuhk03=True)
    assert len(cmc) == len(np.unique(gi))  # a list of nine identities has nine ranks
    np.testing.assert_allclose(cmc, expected[: len(cmc)], rtol=1e-6)


def test_evaluate_rank_with_a_small_gallery(capsys):
    distance, *rest = (t.numpy() for t in case(8, 20, people=2, junk=False))
    cmc, _ = compat.evaluate_rank(distance, *rest)
    assert cmc.shape == (20,)
    assert "number of gallery samples is quite small, got 20" in capsys.readouterr().out


# ---- the checklist -------------------------------------------------------------------------------


def test_reference_and_kernel_have_the_same_ranks(device):
    for seed, levels in itertools.product(range(3), (0, 2)):
        distance, qi, gi, qc, gc = case(300, 150, seed=seed, levels=levels)
        members, begin, offsets = ranking_module.matches(qi, gi)
        tensors = [t.to(device) for t in (distance, members, begin, offsets)]
        for cameras in ((qc.to(device), gc.to(device)), (None, None)):
            arguments = (*tensors, int(offsets[-1]), *cameras)
            ours = call("compiled", "match_ranks", *arguments)
            assert torch.equal(ours, call("reference", "match_ranks", *arguments))


def test_same_bits_twice_and_for_any_thread_count():
    data = case(500, 400, people=30)

    def run():
        result = evaluate_ranking(*data, per_query=True)
        return torch.cat(
            [
                result.cmc,
                torch.tensor([result.mAP, result.mINP], dtype=torch.float64),
                result.average_precision,
                result.inverse_negative_penalty,
            ]
        )

    checks.same_bits_twice(run)
    checks.for_any_thread_count(run)


def test_permuting_gallery_and_queries(device):
    distance, qi, gi, qc, gc = case(30, 200)
    generator = torch.Generator().manual_seed(1)
    rows, cols = torch.randperm(30, generator=generator), torch.randperm(200, generator=generator)
    there = distance.to(device)
    plain = evaluate_ranking(there, qi, gi, qc, gc, per_query=True)
    mixed = evaluate_ranking(
        there[rows][:, cols], qi[rows], gi[cols], qc[rows], gc[cols], per_query=True
    )
    assert torch.equal(plain.cmc, mixed.cmc)
    assert plain[1:4] == mixed[1:4]
    assert torch.equal(plain.first_match[rows], mixed.first_match)


def test_strided_distances_and_narrow_integers(device):
    wide = torch.rand(10, 80, device=device).requires_grad_()
    _, qi, gi, qc, gc = case(10, 40)
    dense = evaluate_ranking(wide.detach()[:, ::2].contiguous(), qi, gi, qc, gc)
    got = evaluate_ranking(wide[:, ::2], qi.int(), gi.int(), qc.short(), gc.to(torch.uint8))
    assert got.mAP == dense.mAP


def test_under_autocast(device):
    _, qi, gi, qc, gc = case(40, 90)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(40, 64, generator=generator).to(device)
    gallery = torch.randn(90, 64, generator=generator).to(device)
    expected = evaluate_ranking((query, gallery), qi, gi, qc, gc)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert evaluate_ranking((query, gallery), qi, gi, qc, gc).mAP == expected.mAP


def test_match_ranks_compiles_as_one_graph(device):
    _, qi, gi, qc, gc = case(6, 30)
    members, begin, offsets = (t.to(device) for t in ranking_module.matches(qi, gi))
    total = int(offsets[-1])
    cameras = qc.to(device), gc.to(device)

    def function(distance):
        return (
            torch.ops.dhcl.match_ranks(distance * 2, members, begin, offsets, total, *cameras) + 1
        )

    distances = [torch.rand(6, 30, device=device) for _ in range(3)]
    checks.compiles_fullgraph(function, *[(d,) for d in distances], backend="aot_eager")


def test_arrays_in_arrays_out():
    data = case(20, 50)
    expected = evaluate_ranking(*data, per_query=True)
    arrays = [t.numpy() for t in data]
    result = evaluate_ranking(*arrays, per_query=True)
    assert isinstance(result.cmc, np.ndarray)
    assert isinstance(result.first_match, np.ndarray)
    assert result[1:4] == expected[1:4]
    assert np.array_equal(result.cmc, expected.cmc.numpy())
    features = torch.randn(20, 5), torch.randn(50, 5)
    from_features = evaluate_ranking(tuple(f.numpy() for f in features), *arrays[1:])
    assert isinstance(from_features.cmc, np.ndarray)
    assert from_features.mAP == evaluate_ranking(features, *data[1:]).mAP


def test_can_be_interrupted():
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_ranking(*case(20, 50), progress=interrupt)


D, QI, GI = torch.rand(2, 3), torch.tensor([1, 2]), torch.tensor([1, 2, 3])
PAIR = (torch.rand(2, 4), torch.rand(3, 4))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (("x", QI, GI), {}, TypeError, "distance must be a tensor or an array .got str"),
        ((D[0], QI, GI), {}, ValueError, r"distance must be 2-D .got shape \(3,\)"),
        ((D.long(), QI, GI), {}, TypeError, "distance must be float32 or .*got int64"),
        ((D, GI, GI), {}, ValueError, r"query_ids must have shape \(2,\), one per query"),
        ((D, QI, QI), {}, ValueError, r"gallery_ids must have shape \(3,\), one per gallery"),
        ((D, QI.float(), GI), {}, TypeError, "query_ids must be int64 or .*got float32"),
        ((D, QI, GI, QI), {}, ValueError, "cameras for both query and gallery or for neither"),
        ((D, QI, GI, QI, QI), {}, ValueError, r"gallery_cameras must have shape \(3,\)"),
        ((D, QI, GI), {"protocol": "viper"}, ValueError, "protocol must be 'market' or 'cuhk03'"),
        ((D, QI, GI), {"ap": "area"}, ValueError, "ap must be 'hits' or 'trapezoid'"),
        ((D, QI, GI), {"metric": "l1"}, ValueError, "metric must be 'euclidean' or 'cosine'"),
        ((D, QI, GI), {"max_rank": 0}, ValueError, "max_rank must be >= 1 .got 0"),
        ((D, QI, GI), {"repeats": 2.0}, TypeError, "repeats must be an integer"),
        ((D * torch.nan, QI, GI), {}, ValueError, "distance must not be NaN .got one in row 0"),
        (((D, D, D), QI, GI), {}, ValueError, "a pair, query and gallery .got 3"),
        (((PAIR[0], PAIR[1][:, :2]), QI, GI), {}, ValueError, "one width .got 4 and 2"),
        (
            ((PAIR[0], PAIR[1] * torch.inf), QI, GI),
            {},
            ValueError,
            "gallery must be finite .*in row 0",
        ),
        ((D, QI + 9, GI), {}, ValueError, "no query has a right match .*2 queries, 3 gallery"),
        ((D[:0], QI[:0], GI), {}, ValueError, "no query has a right match .*0 queries"),
        ((D[:, :0], QI, GI[:0]), {}, ValueError, "no query has a right match .*0 gallery"),
    ],
)
def test_evaluate_ranking_refuses(arguments, keywords, error, message):
    with pytest.raises(error, match="evaluate_ranking: .*" + message):
        evaluate_ranking(*arguments, **keywords)


@given(
    data=st.data(),
    q=st.integers(1, 6),
    g=st.integers(1, 25),
    ap=st.sampled_from(["hits", "trapezoid"]),
)
@settings(max_examples=120, deadline=None)
def test_small_cases_full_of_ties(data, q, g, ap):
    def integers(low, high, n):
        values = st.lists(st.integers(low, high), min_size=n, max_size=n)
        return torch.tensor(data.draw(values))

    distance = integers(0, 3, q * g).view(q, g).float()
    labels = integers(0, 3, q), integers(-1, 3, g), integers(0, 2, q), integers(0, 2, g)
    expected = loop(distance, *labels, ap=ap)
    if not expected:
        with pytest.raises(ValueError, match="no query has a right match"):
            evaluate_ranking(distance, *labels, ap=ap)
        return
    assert_is(evaluate_ranking(distance, *labels, ap=ap, per_query=True), expected, 50, q)


# ---- CUDA ----------------------------------------------------------------------------------------


@needs_cuda
def test_cuda_has_the_ranks_of_the_cpu_on_any_stream():
    data = case(700, 3000, people=40)
    expected = evaluate_ranking(*data, per_query=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = evaluate_ranking(data[0].cuda(), *data[1:], per_query=True)
    stream.synchronize()
    assert torch.equal(found.first_match.cpu(), expected.first_match)
    assert found[1:4] == expected[1:4]
