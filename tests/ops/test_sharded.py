"""Clustering over several processes: the bits of one process, and what is said when one is lost."""

import itertools
import os
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import dhcl_ops
from dhcl_ops import sharded
from dhcl_ops.sharded import ranking as ranking_module
from dhcl_ops.sharded import shards as shards_module
from tests.ops.jaccard_data import features_like
from tests.ops.ranks import on_ranks, own_slice
from tests.ops.sharded_bytes import compared, query_bytes

WORLDS = (2, 3, 4)
# Name: regime, rows, shares, options of cluster.
CASES = {
    "defaults": ("clean", 700, "even", {}),
    "hard": ("hard", 603, "uneven", {}),
    "hubs, self-paced": ("hubs", 500, "uneven", {"self_paced": True}),
    "self-paced, threshold": ("moderate", 500, "even", {"self_paced": True, "threshold": 0.3}),
    "loose": ("moderate", 400, "even", {"loose": True, "eps_gap": 0.1}),
    "wide graph": ("hard", 300, "uneven", {"graph_eps": 0.9}),
    "wide graph by camera, self-paced": (
        "moderate", 150, "one", {"k1": 14, "k1_own": 5, "self_paced": True, "graph_eps": 0.85},
    ),
    "wide graph, zhong, loose": (
        "moderate", 200, "uneven",
        {"convention": "zhong", "k1": 20, "loose": True, "graph_eps": 0.8},
    ),
    "wide graph of fewer rows than ranks": (
        "clean", 2, "even", {"min_samples": 1, "graph_eps": 0.95},
    ),
    "duplicates": ("duplicates", 300, "even", {}),
    "no query expansion": ("moderate", 300, "uneven", {"k1": 12, "k2": 1}),
    "zhong": ("moderate", 400, "even", {"convention": "zhong", "k1": 20}),
    "fewer rows than k1": ("clean", 21, "uneven", {"min_samples": 2}),
    "by camera": ("moderate", 300, "uneven", {"k1": 14, "k1_own": 5}),
    "one rank has all, by camera": ("hard", 120, "one", {"k1": 9, "k2": 3, "k1_own": 8}),
    "one rank has all": ("clean", 90, "one", {"k1": 10, "eps": 0.55}),
    "fewer rows than ranks": ("clean", 2, "even", {"min_samples": 1}),
    "no rows": ("clean", 0, "even", {}),
}  # fmt: skip


RANKING_CASES = [("uneven", True, "hits"), ("one", True, "trapezoid"), ("even", False, "hits")]


def rows_of(regime, n):
    return features_like(regime, max(n, 1), 40)[:n]


def cameras_of(n):
    """Cameras of unlike sizes, the last with two rows, which are too few for most lists."""
    cameras = (torch.arange(n) * 7 % 19) // 7 * 3 - 1
    cameras[: 2 * (n > 2)] = 10**9
    return cameras


def differences(rank, world, kind, x, options):
    """What is not as in one process, for the rows of this rank."""
    own = own_slice(kind, len(x), rank, world)
    k = min(options.get("k1", 30), len(x))
    near, one_near = sharded.knn(x[own], k), dhcl_ops.knn(x, k)
    options, mine, given = dict(options), {}, {}
    cameras = cameras_of(len(x))
    if "k1_own" in options:
        shares = {"k": min(options["k1"], len(x)), "own": options.pop("k1_own")}
        mine = {"k1_own": shares["own"], "cameras": cameras[own]}
        one_lists = dhcl_ops.camera_neighbours(x, cameras, **shares)
        lists = sharded.camera_neighbours(x[own], cameras[own], **shares)
        near, one_near = lists, one_lists
        given = mine | {"cameras": cameras}
    else:
        lists = sharded.knn(x[own], min(31, len(x)))
    found, one = sharded.cluster(x[own], **options, **mine), dhcl_ops.cluster(x, **options, **given)
    again = sharded.cluster(x[own], ranks=lists, **options)
    lines = one.graph.crow_indices()[own.start : own.stop + 1]
    part = slice(int(lines[0]), int(lines[-1]))
    pairs = {
        "similarities": (near.similarities, one_near.similarities[own]),
        "indices": (near.indices, one_near.indices[own]),
        "labels": (found.labels, one.labels[own]),
        "labels of given lists": (again.labels, one.labels[own]),
        "lines": (found.graph.crow_indices(), lines - lines[0]),
        "columns": (found.graph.col_indices(), one.graph.col_indices()[part]),
        "distances": (found.graph.values(), one.graph.values()[part]),
    }
    if one.loose_labels is not None:
        pairs["loose labels"] = (found.loose_labels, one.loose_labels[own])
    wrong = [name for name, (got, wanted) in pairs.items() if not torch.equal(got, wanted)]
    if options.get("convention") == "zhong" and wrong == ["distances"]:
        # The largest distances, which scale these, are as exact as a matrix product.
        wrong = [] if torch.allclose(*pairs["distances"], rtol=0, atol=1e-6) else wrong
    for name in ("num_clusters", "num_outliers", "threshold"):
        if getattr(found, name) != getattr(one, name):
            wrong.append(name)
    # A row can be uncertified with one block and not with another, so these counts may differ.
    sizes = found.sizes.keys() - {"uncertified_rows"}
    return wrong + [key for key in sizes if found.sizes[key] != one.sizes[key]]


def ranking_differences(rank, world, kind, cameras, ap):
    """What of the metrics over own gallery rows is not as over all of them in one process."""
    draw = torch.Generator().manual_seed(len(kind))
    # Whole numbers, whose products are exact and often equal.
    query, gallery = (torch.randint(-2, 3, (n, 6), generator=draw).float() for n in (37, 160))
    ids = [torch.randint(-1, 9, (n,), generator=draw) for n in (37, 160)]
    seen = [torch.randint(0, 3, (n,), generator=draw) for n in (37, 160)] if cameras else [None] * 2
    own = own_slice(kind, 160, rank, world)
    options = {"ap": ap, "max_rank": 20, "per_query": True}
    one = dhcl_ops.evaluate_ranking((query, gallery), *ids, *seen, **options)
    found = sharded.evaluate_ranking(
        (query, gallery[own]), ids[0], ids[1][own], seen[0], seen[1][own] if cameras else None,
        **options,
    )  # fmt: skip
    pairs = zip(one._fields, one, found, strict=True)
    return [
        name
        for name, a, b in pairs
        if not torch.equal(torch.as_tensor(a).nan_to_num(7), torch.as_tensor(b).nan_to_num(7))
    ]


def reranked_differences(rank, world, kind):
    """What is not as in one process: re-ranked distances of own columns, and their metrics."""
    x = rows_of("hard", 150)
    query, gallery = x[:31], x[31:]
    own = own_slice(kind, len(gallery), rank, world)
    one = dhcl_ops.rerank(query, gallery, k1=12, k2=4)
    sent = {}
    found = sharded.rerank(query, gallery[own], k1=12, k2=4, traffic=sent)
    wrong = [] if torch.allclose(found, one[:, own], rtol=0, atol=1e-6) else ["distances"]
    # Whole numbers, many of which are equal.
    one, ids = (one * 8).round(), torch.arange(150) % 7
    options = {"max_rank": 20, "per_query": True}
    whole = dhcl_ops.evaluate_ranking(one, ids[:31], ids[31:], **options)
    parts = sharded.evaluate_ranking(one[:, own], ids[:31], ids[31:][own], **options)
    pairs = zip(whole._fields, whole, parts, strict=True)
    wrong += [
        name
        for name, a, b in pairs
        if not torch.equal(torch.as_tensor(a).nan_to_num(7), torch.as_tensor(b).nan_to_num(7))
    ]
    return wrong, sent["queries"]


def all_cases(rank, world):
    outcome = {
        name: differences(rank, world, kind, rows_of(regime, n), options)
        for name, (regime, n, kind, options) in CASES.items()
    }
    x = rows_of("moderate", 600)
    own = x[own_slice("even", 600, rank, world)]
    traffic = {}
    found = sharded.cluster(own, traffic=traffic)
    outcome["traffic"] = traffic, found.sizes
    wide = {}
    sharded.cluster(own, graph_eps=0.85, traffic=wide)
    outcome["traffic of a wide graph"] = wide
    outcome["reranked"] = {
        kind: reranked_differences(rank, world, kind) for kind in ("uneven", "one")
    }
    # A few rows a block, so that there are several.
    ranking_module._BLOCK_ENTRIES = 160 * 5
    outcome["ranking"] = {case: ranking_differences(rank, world, *case) for case in RANKING_CASES}
    return outcome


@pytest.fixture(scope="module", params=WORLDS)
def outcomes(request, tmp_path_factory):
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"), all_cases)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_one_process(outcomes, case):
    for rank, outcome in enumerate(outcomes):
        assert not isinstance(outcome, Exception), outcome
        assert outcome[case] == [], f"rank {rank}"


@pytest.mark.parametrize("case", RANKING_CASES)
def test_metrics_are_those_of_a_gallery_in_one_piece(outcomes, case):
    for outcome in outcomes:
        assert outcome["ranking"][case] == []


def test_reranked_distances_are_those_of_one_process(outcomes):
    stated = query_bytes(rows_of("hard", 150), 31, 12, 4, len(outcomes))
    for kind in ("uneven", "one"):
        assert [outcome["reranked"][kind][0] for outcome in outcomes] == [[]] * len(outcomes)
        sent = sum(outcome["reranked"][kind][1] for outcome in outcomes)
        assert sent == pytest.approx(stated, rel=0.05)


def test_bytes_are_those_of_the_formula(outcomes):
    world, rows, d, k = len(outcomes), 600, 40, 30
    visits = (world - 1) / 2 if world % 2 else world / 2 - 1 / 4
    sent = {
        stage: sum(outcome["traffic"][0][stage] for outcome in outcomes)
        for stage in ("neighbours", "pairs")
    }
    assert sent["neighbours"] == pytest.approx(rows * visits * (4 * d + 4 + 8 * (k - 1)), rel=0.05)
    # Each pair between ranks is found once, and both its rows have it in the graph.
    whole = dhcl_ops.cluster(rows_of("moderate", rows))
    one = whole.graph
    rank_of = torch.arange(rows) // -(-rows // world)
    ends = torch.arange(rows).repeat_interleave(one.crow_indices().diff()), one.col_indices()
    between = int((rank_of[ends[0]] != rank_of[ends[1]]).sum()) // 2
    visiting = visits * (4 * rows + 8 * whole.sizes["set_entries"])
    assert sent["pairs"] == pytest.approx(visiting + 12 * between, rel=0.05)


def test_every_stage_sends_the_bytes_that_are_stated(outcomes):
    x = rows_of("moderate", 600)
    plain = compared(x, [outcome["traffic"][0] for outcome in outcomes])
    wide = compared(x, [outcome["traffic of a wide graph"] for outcome in outcomes], 0.85)
    for stage, (bytes_sent, stated) in (*plain.items(), *wide.items()):
        assert bytes_sent == pytest.approx(stated, rel=0.05), stage
    # More pairs go home, and nothing else is sent.
    assert wide["pairs"][0] > plain["pairs"][0]
    assert wide["clusters"][0] == plain["clusters"][0]


def test_the_cases_have_clusters_and_outliers():
    regime, n, _, options = CASES["hard"]
    one = dhcl_ops.cluster(rows_of(regime, n), **options)
    assert one.num_clusters > 5
    assert one.num_outliers > 30


# ---- pieces -------------------------------------------------------------------------------------


def in_small_pieces(rank, world, x):
    shards_module.PIECE_BYTES = 40 * 4 * 7  # seven rows
    import dhcl_ops.sharded.clustering as clustering
    import dhcl_ops.sharded.graph as graph
    import dhcl_ops.sharded.neighbours as neighbours

    for module in (clustering, graph, neighbours):
        module.PIECE_BYTES = shards_module.PIECE_BYTES
    graph._FETCHED_BYTES = 40 * 4 * 11
    wrong = [
        differences(rank, world, kind, x, options)
        for kind in ("even", "uneven")
        for options in ({"k1": 12}, {"k1": 12, "convention": "zhong"})
    ]
    return wrong, under_way(x[own_slice("even", len(x), rank, world)])


def under_way(x):
    """Of each visit of a search, how many transfers were begun and not waited for at its product.

    Nothing else tells on CPUs whether transfers and products are made at the same time.
    """
    import dhcl_ops.sharded.neighbours as neighbours

    begun, waiting, seen = itertools.count(), set(), []
    post, meet = dist.batch_isend_irecv, neighbours.meet

    class Watched(NamedTuple):
        work: Any
        number: int

        def wait(self):
            waiting.discard(self.number)
            return self.work.wait()

    def posted(ops):
        waiting.add(number := next(begun))
        return [Watched(work, number) for work in post(ops)]

    def met(*args):
        seen.append(frozenset(waiting))
        return meet(*args)

    dist.batch_isend_irecv, neighbours.meet = posted, met
    sharded.knn(x, 5)
    assert not waiting
    # Own rows meet a visitor in several products.
    return [len(transfers) for transfers, _ in itertools.groupby(seen)]


@pytest.fixture(scope="module", params=[1, 3])
def pieces(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return on_ranks(request.param, folder, in_small_pieces, rows_of("hard", 203))


def test_pieces_of_the_ring_change_no_bit(pieces):
    for wrong, _ in pieces:
        assert wrong == [[]] * 4


def test_transfers_are_under_way_during_products(pieces):
    """The next piece, the lengths of what the last visit found, and what the one before found."""
    wanted = [1, 2, *[3] * 7, 2] if len(pieces) > 1 else []
    for _, transfers in pieces:
        assert transfers == wanted


# ---- errors -------------------------------------------------------------------------------------


def refusals(rank, world, x):
    """The message of each wrong call on this rank."""
    own = x[own_slice("even", len(x), rank, world)]
    broken = own.clone()
    broken[3, 2] = torch.nan
    calls = {
        "a rank's rows": lambda: sharded.cluster(broken if rank == 1 else own),
        "a rank's rows for a search": lambda: sharded.knn(broken if rank == 1 else own, 3),
        "a rank's option": lambda: sharded.cluster(own, eps=0.6 if rank else 0.55),
        "a wrong option": lambda: sharded.cluster(own, eps=1.5 if rank == 0 else 0.5),
        "a rank's width": lambda: sharded.knn(own if rank else own[:, :7], 3),
        "too many neighbours": lambda: sharded.knn(own, len(x) + 1),
        "a rank's gallery": lambda: sharded.rerank(own[:4], broken if rank == 1 else own),
        "other queries": lambda: sharded.rerank(own[: 4 + rank], own),
        "a distance": lambda: sharded.evaluate_ranking(
            broken.T[:3], torch.zeros(3, dtype=torch.int64), torch.zeros(len(own)).long()
        ),
        "a rank's lists": lambda: sharded.cluster(
            own, k1=5, k2=2, ranks=torch.full((len(own), 5), len(x) - 1 + (rank == 1))
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_is_wrong_on_one_rank_is_refused_on_all(tmp_path):
    for rank, messages in enumerate(on_ranks(2, tmp_path, refusals, rows_of("clean", 60))):
        assert "must be finite (got nan in row 3)" in messages["a rank's rows"]
        assert "on rank 1" in messages["a rank's rows"] or rank == 1
        assert (
            "eps must be equal on all ranks (got 0.55 on rank 0 and 0.6 on rank 1)"
            in (messages["a rank's option"])
        )
        assert "eps must be in (0, 1) (got 1.5)" in messages["a wrong option"]
        assert "the features' width must be equal" in messages["a rank's width"]
        assert "gallery must be finite (got nan in row 3)" in messages["a rank's gallery"]
        assert "the shape of queries must be equal" in messages["other queries"]
        assert "distance must not be NaN (got one in row 2)" in messages["a distance"]
        assert "(got k=61, N=60)" in messages["too many neighbours"]
        assert "ranks must be in [0, 60)" in messages["a rank's lists"]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"sharded.knn: .*init_process_group"):
        sharded.knn(torch.eye(3), 2)


# ---- lost ranks ---------------------------------------------------------------------------------


def loses_a_rank(rank, world, x, stage, how):
    whole = shards_module.Shards.stage

    def until(self, name):
        if rank == 1 and name == stage:
            if how == "killed":
                os._exit(9)
            time.sleep(8)
        return whole(self, name)

    shards_module.Shards.stage = until
    started = time.monotonic()
    try:
        sharded.cluster(x[own_slice("even", len(x), rank, world)])
    except sharded.PeerError as error:
        return str(error), time.monotonic() - started
    return None


@pytest.mark.parametrize("stage", ["neighbours", "query expansion", "clusters"])
def test_a_killed_rank_is_said_with_the_stage(stage, tmp_path):
    first, killed = on_ranks(2, tmp_path, loses_a_rank, rows_of("clean", 200), stage, "killed")
    assert killed is None
    message, seconds = first
    assert f'sharded.cluster: rank 0 of 2 lost another rank in the stage "{stage}"' in message
    assert seconds < 30


def test_a_stopped_rank_is_waited_for_no_longer_than_the_groups_time(tmp_path):
    x = rows_of("clean", 200)
    message, seconds = on_ranks(2, tmp_path, loses_a_rank, x, "pairs", "stopped", seconds=2)[0]
    assert 'rank 0 of 2 lost another rank in the stage "pairs"' in message
    assert seconds < 8
