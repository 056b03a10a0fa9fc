"""ReIDMetric from TorchMetrics' side, and its numbers against evaluate_ranking."""

import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("torchmetrics", reason="the extra torchmetrics is not installed")
from dhcl import ReIDMetric
from dhcl.metrics import cameras_apart
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric

from dhcl_ops import evaluate_ranking

NAMES = ("mAP", "rank1", "rank5", "rank10", "mINP")


def images(count, seed, people=12, width=16):
    """Features (N, d), identities with junk among them, cameras with unknown ones among them."""
    random = torch.Generator().manual_seed(seed)
    people_rows = torch.randn(people, width, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, people, (count,), generator=random)
    features = people_rows[ids] + 1.5 * torch.randn(count, width, generator=random)
    cameras = torch.randint(-1, 4, (count,), generator=random)
    return features, torch.where(torch.arange(count) % 11 == 3, -1, ids), cameras


QUERY, GALLERY = images(30, 1), images(75, 2)


def expected(query=QUERY, gallery=GALLERY, **options):
    found = evaluate_ranking(
        (query[0], gallery[0]),
        query[1],
        gallery[1],
        *cameras_apart(query[2], gallery[2]),
        **{"metric": "cosine", **options},
    )
    ranks = {f"rank{k}": float(found.cmc[k - 1]) for k in (1, 5, 10)}
    return {"mAP": found.mAP, **ranks, "mINP": found.mINP}


def values(metrics):
    return {name: value.item() for name, value in metrics.items()}


def fill(metric, query=QUERY, gallery=GALLERY, size=13):
    """Batches of gallery and queries in turn."""
    for is_query, side in ((False, gallery), (True, query)):
        for batch in zip(*(column.split(size) for column in side), strict=True):
            metric.update(*batch, is_query=is_query)
    return metric


def test_the_numbers_are_those_of_evaluate_ranking():
    found = fill(ReIDMetric()).compute()
    assert tuple(found) == NAMES
    assert values(found) == expected()
    assert 0.1 < found["mAP"] < 0.9
    for options in ({"metric": "euclidean"}, {"ap": "trapezoid"}, {"junk_id": None}):
        other = values(fill(ReIDMetric(**options)).compute())
        assert other == expected(**options)
        assert other != expected()
    ranks = fill(ReIDMetric(ranks=(3, 20))).compute()
    assert tuple(ranks) == ("mAP", "rank3", "rank20", "mINP")
    assert ranks["rank3"] <= found["rank5"] <= ranks["rank20"]


def test_queries_and_gallery_may_come_in_one_batch_and_cameras_may_be_unknown():
    features = torch.cat([QUERY[0], GALLERY[0]])
    ids = torch.cat([QUERY[1], GALLERY[1]])
    is_query = torch.arange(len(ids)) < len(QUERY[1])
    metric = ReIDMetric()
    metric.update(features, ids, is_query=is_query)
    unknown = [(f, i, torch.full_like(c, -1)) for f, i, c in (QUERY, GALLERY)]
    assert values(metric.compute()) == expected(*unknown)
    assert values(metric.compute()) != expected()


def test_indices_count_an_image_once_and_give_it_its_place():
    # Equal features, so that places decide; the last batch brings back images, as samplers do.
    gallery = [column.repeat_interleave(2, dim=0) for column in GALLERY]
    gallery[1] = gallery[1].roll(1)
    backwards = torch.arange(150).flip(0)
    metric = ReIDMetric()
    for rows in (*backwards.split(40), torch.tensor([3, 4, 149])):
        metric.update(*(column[rows] for column in gallery), indices=rows)
    metric.update(*QUERY, is_query=True, indices=torch.arange(30))
    assert values(metric.compute()) == expected(gallery=gallery)
    metric.update(*GALLERY)
    with pytest.raises(ValueError, match="indices must be given of all images or of none"):
        metric.compute()


# TorchMetrics' own, of a metric that is computed before any update.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_and_forward_gives_the_batch():
    for options in ({}, {"sync_on_compute": False}):
        metric = fill(ReIDMetric(**options))
        metric.reset()
        with pytest.warns(UserWarning, match="got 0 queries, 0 gallery entries.*are NaN"):
            assert all(math.isnan(value) for value in metric.compute().values())
    features, ids, cameras = (torch.cat(pair) for pair in zip(QUERY, GALLERY, strict=True))
    is_query = torch.arange(len(ids)) < 30
    first = metric(features, ids, cameras, is_query)
    assert values(first) == expected()
    more = images(20, 5)
    with pytest.warns(UserWarning, match="no query has a right match"):
        assert math.isnan(metric(*more)["mAP"]), "a batch of the gallery alone"
    both = [torch.cat(pair) for pair in zip(GALLERY, more, strict=True)]
    assert values(metric.compute()) == expected(gallery=both)


def test_states_travel_in_state_dict_and_pickle():
    metric = fill(ReIDMetric())
    assert not metric.state_dict(), "as all metrics of TorchMetrics, unless it is asked for"
    metric.persistent(True)
    other = ReIDMetric()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1  # TorchMetrics does not restore it, and warns without it
    assert values(other.compute()) == expected()
    assert values(pickle.loads(pickle.dumps(metric)).compute()) == expected()


def test_in_a_collection():
    collection = MetricCollection({"hits": ReIDMetric(), "area": ReIDMetric(ap="trapezoid")})
    for is_query, side in ((True, QUERY), (False, GALLERY)):
        features, identities, cameras = side
        collection.update(
            features=features, identities=identities, cameras=cameras, is_query=is_query
        )
    found = values(collection.compute())
    by_name = {"hits": expected(), "area": expected(ap="trapezoid")}
    assert found == {f"{k}_{name}": v for k, row in by_name.items() for name, v in row.items()}
    mixed = MetricCollection({"reid": ReIDMetric(), "loss": MeanMetric()}, prefix="val/")
    assert {*mixed} == {"val/reid", "val/loss"}


def test_features_carry_no_graph_and_other_kinds_of_numbers_are_taken():
    metric = ReIDMetric()
    for is_query, (features, ids, cameras) in ((True, QUERY), (False, GALLERY)):
        metric.update(features.double().requires_grad_(), ids.int(), cameras.short(), is_query)
    assert not metric.features[0].requires_grad
    assert values(metric.compute()) == expected()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 3, 2), torch.ones(4).long()), r"features must be \(B, d\) floating"),
        ((torch.ones(4, 3).long(), torch.ones(4).long()), r"features must be \(B, d\) floating"),
        ((torch.ones(4, 3), torch.ones(5).long()), "identities must be 4 whole numbers"),
        ((torch.ones(4, 3), torch.ones(4)), "identities must be 4 whole numbers"),
        ((torch.ones(4, 3), torch.ones(4).long(), torch.ones(4)), "cameras must be 4 whole"),
        ((torch.ones(4, 9), torch.ones(4).long()), r"one width \(got 9 after 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_kept(arguments, message):
    metric = ReIDMetric()
    metric.update(torch.ones(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match=f"ReIDMetric: .*{message}"):
        metric.update(*arguments)
    assert len(metric.features) == len(metric.about) == 1


def test_wrong_ranks_are_refused():
    for ranks in ((), (0, 5)):
        with pytest.raises(ValueError, match="ranks must be numbers from 1"):
            ReIDMetric(ranks=ranks)


def shared(rank, store, case):
    """Metrics of one of two processes, by TorchMetrics' own synchronisation."""
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        metric = ReIDMetric()
        if case == "one has nothing":
            if rank == 1:
                fill(metric)
        else:
            # Every second image, padded with the first ones as DistributedSampler pads.
            for is_query, side in ((True, QUERY), (False, GALLERY)):
                count = len(side[0])
                rows = torch.arange(rank, count + count % 2, 2) % count
                metric.update(*(c[rows] for c in side), is_query=is_query, indices=rows)
        before = len(metric.about)
        found = values(metric.compute())
        assert len(metric.about) >= before, "its own images are its own again"
        metric.reset()
        assert metric.about == []
    finally:
        torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize("case", ["each has half", "one has nothing"])
def test_two_processes_find_what_one_finds(case, tmp_path):
    store, other = f"file://{tmp_path}/store", tmp_path / "other.pt"
    source = (
        "import sys, torch; from tests.dhcl.inference.test_metric import shared; "
        "torch.save(shared(1, *sys.argv[1:3]), sys.argv[3])"
    )
    child = subprocess.Popen([sys.executable, "-c", source, store, case, str(other)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method")  # before any update, here
        found = shared(0, store, case)
    assert child.wait() == 0
    assert found == torch.load(other) == expected()
