import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dhcl_ops import camera_neighbours, cluster, dbscan, jaccard_graph, self_paced_labels
from dhcl_ops.knn import knn
from tests import checks
from tests.checks import same_bits
from tests.ops.jaccard_data import REGIMES, features_like

EPS = [0.4, 0.5, 0.55, 0.58, 0.6, 0.7]


# ---- self-paced choice --------------------------------------------------------------------------


def spcl_choice(labels, tight, loose, threshold=None):
    """The choice of SpCL's training script, with its three N x N matrices."""

    def alone(labels):
        labels, fresh = labels.copy(), labels.max() + 1
        for i in np.nonzero(labels < 0)[0]:
            labels[i] = fresh
            fresh += 1
        return torch.from_numpy(labels)

    own, tight, loose = alone(labels), alone(tight), alone(loose)
    same = [(x[:, None] == x[None, :]).float() for x in (own, tight, loose)]
    comp = 1 - torch.min(same[0], same[1]).sum(-1) / torch.max(same[0], same[1]).sum(-1)
    indep = 1 - torch.min(same[0], same[2]).sum(-1) / torch.max(same[0], same[2]).sum(-1)
    comps, indeps = collections.defaultdict(list), collections.defaultdict(list)
    for c, i, label in zip(comp.tolist(), indep.tolist(), own.tolist(), strict=True):
        comps[label].append(c)
        indeps[label].append(i)
    best_comp = {label: min(values) for label, values in comps.items()}
    best_indep = {label: min(values) for label, values in indeps.items()}
    if threshold is None:
        ordered = np.sort([best_indep[k] for k in sorted(best_indep) if len(indeps[k]) > 1])
        threshold = ordered[min(len(ordered) - 1, int(np.round(len(ordered) * 0.9)))]
    kept = []
    for i, label in enumerate(own.tolist()):
        good = best_indep[label] <= threshold and comp[i].item() <= best_comp[label]
        kept.append(label if good and labels[i] >= 0 else -1)
    return np.array(kept), float(threshold)


def compact(labels):
    out = np.full_like(labels, -1)
    out[labels >= 0] = np.unique(labels[labels >= 0], return_inverse=True)[1]
    return out


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gap", [0.02, 0.1])
def test_self_paced_labels_are_spcl_s(regime, gap):
    x = features_like(regime, 400, seed=8)
    graph = jaccard_graph(x, eps=0.5 + gap)
    tight, labels, loose = (t.numpy() for t in dbscan(graph, (0.5 - gap, 0.5, 0.5 + gap)))
    expected, threshold = spcl_choice(labels, tight, loose)
    got = self_paced_labels(*map(torch.from_numpy, (labels, tight, loose)))
    np.testing.assert_array_equal(got.labels.numpy(), compact(expected))
    assert got.threshold == threshold
    for fixed in (0.0, 0.3, 1.0):
        expected, _ = spcl_choice(labels, tight, loose, fixed)
        again = self_paced_labels(*map(torch.from_numpy, (labels, tight, loose)), fixed)
        np.testing.assert_array_equal(again.labels.numpy(), compact(expected))
        assert again.threshold == fixed


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_self_paced_labels_of_random_partitions(n, seed):
    r = np.random.default_rng(seed)
    labels, tight, loose = (compact(r.integers(-1, 5, n)) for _ in range(3))
    if not (np.bincount(labels[labels >= 0]) > 1).any():
        return
    expected, threshold = spcl_choice(labels, tight, loose)
    got = self_paced_labels(labels, tight, loose)
    np.testing.assert_array_equal(got.labels, compact(expected))
    assert got.threshold == threshold


def test_self_paced_labels_without_a_cluster():
    nothing = torch.full((4,), -1)
    got = self_paced_labels(nothing, nothing, nothing)
    assert got.labels.tolist() == [-1] * 4
    assert got.threshold is None
    assert self_paced_labels(nothing[:0], nothing[:0], nothing[:0], 0.4).threshold == 0.4
    assert got.independence.tolist() == [1.0] * 4


def test_self_paced_labels_refuse():
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tight must have shape \(3,\)"):
        self_paced_labels(labels, labels[:2], labels)
    with pytest.raises(TypeError, match="loose must be int64"):
        self_paced_labels(labels, labels, labels.float())
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        self_paced_labels(labels, labels, labels, 1.5)


# ---- cluster ------------------------------------------------------------------------------------


def test_cluster_is_the_stages_together():
    x = features_like("moderate", 400)
    got = cluster(x)
    graph = jaccard_graph(x)
    labels = dbscan(graph, 0.6)
    assert same_bits(got.labels, labels)
    assert same_bits(got.graph.values(), graph.values())
    assert got.num_clusters == len(set(labels.tolist()) - {-1})
    assert got.num_outliers == (labels == -1).sum()
    assert got.threshold is None
    assert got.loose_labels is None
    assert set(got.seconds) == {
        "neighbours", "sets and weights", "query expansion", "index", "pairs", "clusters",
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in got.seconds.values())
    assert got.sizes["pairs"] == len(graph.values())
    assert got.sizes["longest_column"] ** 2 <= got.sizes["index_work"]
    assert got.sizes["set_entries"] > 0
    assert got.sizes["uncertified_rows"] >= 0
    assert "graph" not in repr(got)


@pytest.mark.parametrize("own", [1, 3, 99])
def test_cluster_by_camera_takes_camera_neighbours(own):
    generator = torch.Generator().manual_seed(3)
    people = torch.randn(12, 1, 8, generator=generator)
    rows = people + 0.5 * torch.randn(12, 4, 8, generator=generator)
    rows = torch.nn.functional.normalize(rows.flatten(0, 1), dim=1)
    cameras = torch.arange(48) % 3
    numbers = {"k1": 8, "k2": 3, "eps": 0.55, "min_samples": 2}
    ranks = camera_neighbours(rows, cameras, 8, min(own, 8))
    expected = cluster(rows, ranks=ranks, **numbers).labels
    assert torch.equal(cluster(rows, cameras=cameras, k1_own=own, **numbers).labels, expected)
    arrays = cluster(rows.numpy(), cameras=cameras.numpy(), k1_own=own, **numbers).labels
    assert np.array_equal(arrays, expected.numpy())
    plain = cluster(rows, cameras=cameras, **numbers).labels
    assert torch.equal(plain, cluster(rows, **numbers).labels)
    for wrong in ({}, {"cameras": cameras, "ranks": ranks}):
        with pytest.raises(ValueError, match="k1_own goes with cameras and without ranks"):
            cluster(rows, k1_own=own, **wrong, **numbers)


@pytest.mark.parametrize(
    ("options", "choice"),
    [({}, 0), ({"convention": "zhong"}, 0), ({"loose": True}, 0), ({"self_paced": True}, 1)],
)
def test_cluster_waits_for_the_device_once_a_list(options, choice):
    """Once for each matrix whose size depends on data, for all counts, and for a choice."""
    x = features_like("moderate", 300)
    found = knn(x, 31)
    reads = checks.host_reads(lambda: cluster(x, eps=0.55, ranks=found, **options))
    lists = ["dhcl::k_reciprocal", "dhcl::query_expand", "dhcl::jaccard_join", "dhcl::mirror_csr"]
    # Features and ranks are looked at before.
    assert reads[reads.index(lists[0]) :] == [*lists, *["tolist"] * (choice + 1)]


def test_self_paced_labels_with_gaps_and_of_any_size():
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randint(-1, high, (60,), generator=generator) for high in (8, 14, 5)]
    sparse = [torch.where(labels < 0, labels, labels * 1_000_003 + 7) for labels in dense]
    expected, got = self_paced_labels(*dense), self_paced_labels(*sparse)
    assert (got.labels >= 0).any()
    assert got.threshold == expected.threshold
    for a, b in ((got.labels, expected.labels), (got.compactness, expected.compactness)):
        assert same_bits(a, b)
    assert checks.host_reads(lambda: self_paced_labels(*sparse, got.threshold)) == []


def test_self_paced_labels_without_clusters():
    alone = torch.full((5,), -1)
    got = self_paced_labels(alone, alone, alone)
    assert got.labels.tolist() == [-1] * 5
    assert got.threshold is None


def test_cluster_with_self_paced_choice():
    x = features_like("hard", 500)
    first = cluster(x, eps=0.5, self_paced=True)
    graph = jaccard_graph(x, eps=0.52)
    tight, labels, loose = dbscan(graph, (0.48, 0.5, 0.52))
    expected = self_paced_labels(labels, tight, loose)
    assert same_bits(first.labels, expected.labels)
    assert not same_bits(first.labels, labels)
    assert first.threshold == expected.threshold
    assert same_bits(first.loose_labels, loose)
    assert same_bits(first.graph.values(), graph.values())
    again = cluster(x, eps=0.5, self_paced=True, threshold=first.threshold)
    assert same_bits(again.labels, first.labels)
    # A limit of another epoch chooses other clusters and does not change.
    strict = cluster(x, eps=0.5, self_paced=True, threshold=0.0)
    assert same_bits(strict.labels, self_paced_labels(labels, tight, loose, 0.0).labels)
    assert not same_bits(strict.labels, first.labels)
    assert strict.threshold == 0.0


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1])
def test_cluster_with_loose_labels(gap):
    x = features_like("hard", 500)
    got = cluster(x, eps=0.5, loose=True, eps_gap=gap)
    labels, loose = dbscan(jaccard_graph(x, eps=0.5 + gap), (0.5, 0.5 + gap))
    assert same_bits(got.labels, labels)
    assert same_bits(got.labels, cluster(x, eps=0.5).labels)
    assert same_bits(got.loose_labels, loose)
    assert same_bits(labels, loose) == (gap == 0.0)
    assert got.threshold is None
    assert got.num_outliers == (labels == -1).sum()
    paced = cluster(x, eps=0.5, self_paced=True, eps_gap=gap)
    assert same_bits(paced.loose_labels, loose)
    for one in (got.labels, got.loose_labels, paced.labels, paced.loose_labels):
        assert one.untyped_storage().nbytes() == one.nbytes


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("self_paced", [False, True])
def test_cluster_of_a_few(n, self_paced):
    got = cluster(features_like("clean", n, d=16), self_paced=self_paced)
    assert got.labels.shape == (n,)
    assert got.num_clusters == (1 if n == 5 else 0)


def test_cluster_of_arrays():
    x = features_like("clean", 100)
    got = cluster(x.numpy(), k1=15)
    assert isinstance(got.labels, np.ndarray)
    np.testing.assert_array_equal(got.labels, cluster(x, k1=15).labels.numpy())
    assert got.loose_labels is None
    got = cluster(x.numpy(), k1=15, self_paced=True)
    assert isinstance(got.loose_labels, np.ndarray)
    expected = cluster(x, k1=15, self_paced=True).loose_labels
    np.testing.assert_array_equal(got.loose_labels, expected.numpy())


def test_cluster_refuses():
    x = features_like("clean", 30)
    with pytest.raises(ValueError, match=r"cluster: eps must be in \(0, 1\)"):
        cluster(x, eps=0.0)
    with pytest.raises(ValueError, match=r"eps -/\+ eps_gap must be in \(0, 1\)"):
        cluster(x, eps=0.99, self_paced=True)
    with pytest.raises(ValueError, match=r"eps \+ eps_gap must be in \(0, 1\) \(got 0.99 \+ 0.02"):
        cluster(x, eps=0.99, loose=True)
    with pytest.raises(ValueError, match=r"eps_gap must be finite and >= 0 \(got -0.1\)"):
        cluster(x, loose=True, eps_gap=-0.1)
    # The tight eps, which is not asked for, may lie below 0.
    assert cluster(x, eps=0.01, loose=True).num_clusters == cluster(x, eps=0.01).num_clusters
    with pytest.raises(ValueError, match="threshold goes with self_paced=True"):
        cluster(x, threshold=0.3)
    with pytest.raises(ValueError, match="cluster: features must have rows of norm 1"):
        cluster(2 * x)
