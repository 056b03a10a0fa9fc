"""csrc/knn.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from dhcl_ops import _ops
from tests.checks import call, same_bits
from tests.ops.test_knn import assert_is, brute_force, clustered, kept, knn_module


def host_select(host, state, tile, row_start, col_start, keep, mirror, self_search):
    """As the CUDA glue calls it: a mirrored tile is transposed first."""
    if mirror:
        tile, row_start, col_start = tile.t().contiguous(), col_start, row_start
    arrays = [t.numpy() for t in (*state, tile.contiguous())]
    host.knn_select(*arrays, row_start, col_start, keep, self_search)


def host_scores(host, queries, features, candidates):
    scores = torch.full(candidates.shape, 7.0)
    arrays = [t.contiguous().numpy() for t in (scores, queries, features, candidates)]
    host.knn_scores(*arrays)
    return scores


@pytest.mark.parametrize("self_search", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "keep", "capacity"),
    [(1, 1, 1, 2), (3, 31, 4, 9), (2, 512, 5, 64), (2, 700, 40, 64), (2, 1500, 600, 1300)],
)
def test_select(kernels, rows, width, keep, capacity, self_search):
    ours = knn_module._new_state(rows + 1, capacity, torch.device("cpu"))
    expected = [t.clone() for t in ours]
    for turn in range(3):
        tile = torch.randn(rows, width, generator=torch.Generator().manual_seed(turn))
        # Ascending values pass every threshold, ties and zeros of both signs meet at one.
        if turn == 1:
            tile = tile.sort(dim=1).values
        if turn == 2:
            tile = (tile * 2).round() / 2
        arguments = (tile, 1, width * turn, keep, False, self_search)
        host_select(kernels, ours, *arguments)
        call("reference", "knn_select_", *expected, *arguments)
        values = [[v for v, _ in row] for row in kept(ours, keep)]
        assert values == [[v for v, _ in row] for row in kept(expected, keep)]
        assert torch.equal(ours[2], expected[2])
        assert torch.equal(ours[3], expected[3])
        assert ((ours[1] >= 0).sum(1) == ours[2]).all()
        # What is kept is found where it is said to be.
        indices = ours[1][1:] - width * turn
        here = indices >= 0
        found = tile.gather(1, indices.clamp(min=0).long())
        assert (found[here] == ours[0][1:][here]).all()
    assert (ours[1][0] == -1).all()


def test_select_of_equal_values_keeps_the_first(kernels):
    state = knn_module._new_state(1, 64, torch.device("cpu"))
    host_select(kernels, state, torch.zeros(1, 1200), 0, 0, 5, False, True)
    assert state[1][0, :6].tolist() == [1, 2, 3, 4, 5, -1]


@pytest.mark.parametrize("d", [0, 1, 3, 127, 128, 132, 517])
def test_scores(kernels, d):
    features, queries = clustered(9, d, unit=False), clustered(3, d, seed=1, unit=False)
    candidates = torch.tensor([[0, 8, -1], [4, 4, 4], [-1, 2, 1]])
    expected = call("reference", "knn_scores", queries, features, candidates)
    assert same_bits(host_scores(kernels, queries, features, candidates), expected)


def test_scores_on_unaligned_rows(kernels):
    storage = clustered(1, 9 * 8 + 1).flatten()
    features = storage[1:].view(9, 8)
    candidates = torch.tensor([[3, 5]])
    expected = call("reference", "knn_scores", features[:1], features, candidates)
    assert same_bits(host_scores(kernels, features[:1], features, candidates), expected)


@pytest.mark.parametrize("bad", [-2, 9, 2**40])
def test_scores_report_a_candidate_out_of_range(host, bad):
    features = clustered(9, 4)
    with pytest.raises(RuntimeError, match=rf"\[-1, 9\) \(got {bad}\)"):
        host_scores(host, features[:1], features, torch.tensor([[bad]]))


def test_empty_launches(host):
    state = knn_module._new_state(2, 9, torch.device("cpu"))
    host_select(host, state, torch.zeros(0, 5), 0, 0, 3, False, False)
    host_select(host, state, torch.zeros(2, 0), 0, 0, 3, False, False)
    assert not state[2].any()
    host_scores(host, torch.ones(0, 3), torch.ones(2, 3), torch.zeros(0, 4, dtype=torch.int64))
    host_scores(host, torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 0, dtype=torch.int64))


def test_the_whole_search_on_these_kernels(host, monkeypatch):
    """knn with fp16 products and both CUDA kernels, up to its answer."""
    original = knn_module.Products
    monkeypatch.setattr(knn_module, "Products", lambda *a, half: original(*a, half=True))
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (16, 40)})
    monkeypatch.setattr(knn_module, "_select", lambda *a: host_select(host, a[:4], *a[4:]))
    monkeypatch.setattr(knn_module, "_scores", lambda *a: host_scores(host, *a))
    features = clustered(90, 20)
    features[50:80] = features[3]
    assert_is(knn_module.knn(features, 7), brute_force(features, 7))
    queries = clustered(11, 20, seed=4)
    found = knn_module.knn(features, 7, queries=queries)
    assert_is(found, brute_force(features, 7, queries))


def test_every_op_here_has_a_host_run():
    assert {n for n, op in _ops.OPS.items() if op.family == "knn"} == {"knn_select_", "knn_scores"}
