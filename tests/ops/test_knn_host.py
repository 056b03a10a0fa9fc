"""csrc/knn.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from dhcl_ops import _ops, _products
from tests.checks import call, same_bits
from tests.ops.test_knn import assert_is, brute_force, clustered, kept, knn_module

# Each line of the kernels once, for the slow runs under sanitizers and the race detector.
SANITIZED = "hub or for_the_columns or equal_values or test_rank or test_halves or unaligned"


def host_select(host, state, tile, *rest):
    host.knn_select(*(t.numpy() for t in (*state, tile)), *rest)


def host_select_both(host, state, tile, *rest):
    host.knn_select_both(*(t.numpy() for t in (*state, tile)), *rest)


def host_rank(host, *arguments):
    host.knn_rank(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments))


def host_halves(host, rows, scale, height, width):
    operand = torch.full((height, width), 7.0, dtype=torch.float16)
    squares = torch.full((len(rows),), 7.0)
    host.knn_halves(operand.view(torch.uint16).numpy(), squares.numpy(), rows.numpy(), scale)
    return operand, squares


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


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 5), (131, 11), (700, 3)])
def test_select_for_the_columns(kernels, rows, width, padding):
    """Rows of the tile lie further apart than they are long."""
    keep = 6
    ours = knn_module._new_state(width + 1, 13, torch.device("cpu"))
    expected = [t.clone() for t in ours]
    for turn in range(2):
        tile = torch.randn(rows, width + padding, generator=torch.Generator().manual_seed(turn))
        arguments = (tile[:, :width], rows * turn, 1, keep, True, True)
        host_select(kernels, ours, *arguments)
        call("reference", "knn_select_", *expected, *arguments)
        assert kept(ours, keep) == kept(expected, keep)
        assert (ours[3] <= expected[3]).all()


def tile_of(kind, rows, width, turn):
    """Products as they usually are, and as they are worst."""
    tile = torch.randn(rows, width, generator=torch.Generator().manual_seed(turn))
    if kind == "ascending":  # each exceeds all before it, along rows and columns
        tile = torch.arange(rows * width).view(rows, width) + 1e5 * turn
    elif kind == "equal":
        tile = torch.ones(rows, width)
    elif kind == "hub":  # a row and a column that all others are near
        tile[rows // 2] += 9
        tile[:, width // 2] += 9
    elif kind == "descending":
        tile = -torch.arange(rows * width).view(rows, width) - 1e5 * turn
    return tile.float()


@pytest.mark.parametrize("kind", ["random", "ascending", "equal", "hub", "descending"])
@pytest.mark.parametrize(
    ("rows", "width", "keep", "capacity", "padding"),
    [(1, 1, 1, 2, 0), (5, 40, 3, 4, 0), (40, 133, 6, 24, 3), (65, 300, 20, 80, 1)],
)
def test_select_both(kernels, kind, rows, width, keep, capacity, padding):
    """A tile on the diagonal, one beside it, and strips below them, whatever overflows."""
    n = 2 * rows + width
    ours = knn_module._new_state(n, capacity, torch.device("cpu"))
    expected = [t.clone() for t in ours]
    places = [(0, 0), (0, width), (rows, rows), (rows, rows + width)]
    for turn, (row, col) in enumerate(places):
        tile = tile_of(kind, rows, min(width, n - col), turn)
        wide = torch.nn.functional.pad(tile, (0, padding), value=torch.inf)
        host_select_both(kernels, ours, wide[:, : tile.shape[1]], row, col, keep)
        call("reference", "knn_select_both_", *expected, tile, row, col, keep)
        assert (ours[2] <= capacity).all()
        assert torch.equal((ours[1] >= 0).sum(1), ours[2].long())
        values = [[v for v, _ in found] for found in kept(ours, keep)]
        assert values == [[v for v, _ in found] for found in kept(expected, keep)]
        # What a row holds is of that row, and what it dropped is no better than it says.
        for side, first in ((tile, col), (tile.T, row)):
            for r in range(side.shape[0]):
                i = (row if side is tile else col) + r
                if side is not tile and i < row + rows:
                    continue
                held = dict(zip(ours[1][i].tolist(), ours[0][i].tolist(), strict=True))
                assert i not in held
                for c in range(side.shape[1]):
                    value = side[r, c].item()
                    if first + c in held:
                        assert held[first + c] == value
                    else:
                        assert first + c == i or value <= ours[3][i]


def test_select_both_has_the_same_candidates_in_any_order(host):
    """Also where rows overflow: how many pass, not which came first, decides what is done."""
    found = set()
    for order in ("forward", "reverse", "shuffle:1", "shuffle:2"):
        host.set_schedule(order)
        state = knn_module._new_state(200, 12, torch.device("cpu"))
        for turn, (row, col) in enumerate([(0, 0), (70, 70), (140, 140)]):
            host_select_both(host, state, tile_of("random", 60, 200 - col, turn), row, col, 5)
        lists = tuple(
            tuple(sorted(zip(values, indices, strict=True)))
            for values, indices in zip(state[0].tolist(), state[1].tolist(), strict=True)
        )
        found.add((lists, tuple(state[3].tolist())))
    host.set_schedule("")
    assert len(found) == 1


@pytest.mark.parametrize(
    ("d", "k", "keep", "capacity"),
    [(1, 2, 3, 4), (127, 3, 9, 20), (132, 10, 14, 64), (40, 2, 60, 60)],
)
@pytest.mark.parametrize("self_search", [False, True])
def test_rank(kernels, d, k, keep, capacity, self_search):
    features = clustered(70, d, unit=False)
    features[20:30] = features[3]
    queries = features[5:16] if self_search else clustered(11, d, seed=1, unit=False)
    noise = 1e-3 * torch.randn(11, 70, generator=torch.Generator().manual_seed(0))
    products = 4 * (queries @ features.T + noise)
    if self_search:
        products[torch.arange(11), torch.arange(5, 16)] = -torch.inf
    top, indices = products.topk(capacity, dim=1)
    shuffled = torch.randperm(capacity, generator=torch.Generator().manual_seed(1))
    counts = torch.full((11,), capacity, dtype=torch.int32)
    state = (top[:, shuffled].contiguous(), indices[:, shuffled].int(), counts)
    bound = torch.full((11,), 0.02, dtype=torch.float64)
    bound[::3] = 1e5  # nothing can be ruled out, and nothing certified
    got, expected = (
        (torch.zeros(11, k), torch.zeros(11, k, dtype=torch.int64), torch.zeros(11).bool())
        for _ in range(2)
    )
    for complete, floor in ((False, None), (True, None), (False, top[:, k // 2] / 4)):
        rest = (queries, features, *state, bound, floor, 5, keep, 0.25, self_search, complete)
        host_rank(kernels, *got, *rest)
        call("reference", "knn_rank_", *expected, *rest)
        assert same_bits(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2])
        assert got[2].all() if complete else not got[2][::3].any()


def test_rank_reports_a_row_with_too_few_candidates(host):
    out = (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1).bool())
    state = (torch.zeros(1, 8), torch.zeros(1, 8).int(), torch.full((1,), 2).int())
    rest = (torch.ones(1, 4), torch.ones(9, 4), *state, torch.zeros(1).double(), None)
    with pytest.raises(RuntimeError, match=r"a row needs 3 to 8 candidates \(got 2\)"):
        host_rank(host, *out, *rest, 0, 4, 1.0, False, False)


@pytest.mark.parametrize(("d", "offset"), [(0, 0), (1, 0), (64, 0), (130, 0), (260, 0), (64, 1)])
def test_halves(kernels, d, offset):
    storage = clustered(1, 9 * d + 1, unit=False).flatten()
    rows = storage[offset : offset + 9 * d].view(9, d)
    arguments = (rows, 2.0**8, 24, d + -d % 8)
    expected = call("reference", "knn_halves", *arguments)
    got = host_halves(kernels, *arguments)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])


@pytest.mark.parametrize("name", ["knn_select_", "knn_select_both_", "knn_rank_"])
def test_the_sample_has_the_bits_of_the_reference(kernels, name):
    """As the doctor compares them on a GPU; whole states, not only what they keep."""
    ours, expected = (_ops.OPS[name].sample(torch.device("cpu")) for _ in range(2))
    host_ops = {"knn_select_": host_select, "knn_select_both_": host_select_both}
    if name in host_ops:
        host_ops[name](kernels, ours[:4], *ours[4:])
    else:
        host_rank(kernels, *ours)
    call("reference", name, *expected)
    for got, wanted in zip(ours, expected, strict=True):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, wanted)


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
    """knn with fp16 products and all CUDA kernels, up to its answer."""
    original = knn_module.Products
    monkeypatch.setattr(knn_module, "Products", lambda *a, half: original(*a, half=True))
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (16, 40)})
    monkeypatch.setattr(knn_module, "_select", lambda *a: host_select(host, a[:4], *a[4:]))
    monkeypatch.setattr(knn_module, "_rank", lambda *a: host_rank(host, *a))
    monkeypatch.setattr(knn_module, "_scores", lambda *a: host_scores(host, *a))
    features = clustered(90, 20)
    features[50:80] = features[3]
    assert_is(knn_module.knn(features, 7), brute_force(features, 7))
    queries = clustered(11, 20, seed=4)
    found = knn_module.knn(features, 7, queries=queries)
    assert_is(found, brute_force(features, 7, queries))


@pytest.fixture
def by_strips(kernels, monkeypatch):
    """knn as on CUDA: fp16 products, strips, and candidates by these kernels."""
    original = knn_module.Products
    monkeypatch.setattr(knn_module, "Products", lambda *a, half: original(*a, half=True))
    monkeypatch.setattr(knn_module, "_BY_STRIPS", ("cpu",))
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (24, 70)})
    for name, run in (("_select", host_select), ("_select_both", host_select_both)):
        monkeypatch.setattr(knn_module, name, lambda *a, run=run: run(kernels, a[:4], *a[4:]))
    monkeypatch.setattr(_products, "halves", lambda *a: host_halves(kernels, *a))


def features_of(kind, n):
    features = clustered(n, 20)
    if kind == "equal":
        features[:] = features[0]
    elif kind == "runs":  # people one after another, as data sets list them
        features = features[torch.randint(0, n, (n // 12 + 1,))].repeat_interleave(12, dim=0)[:n]
        features += 0.01 * clustered(n, 20, seed=9)
    elif kind == "growing":  # each row is nearer to all rows than those before it
        features = torch.ones(n, 20) * torch.linspace(1, 3, n).unsqueeze(1)
    elif kind == "hub":
        features = features + 4 * features[n // 2]
        features[n // 2] *= 10
    return features


@pytest.mark.parametrize("kind", ["clustered", "equal", "runs", "growing", "hub"])
@pytest.mark.parametrize(("n", "k"), [(2, 2), (79, 3), (131, 2), (131, 7)])
def test_the_search_by_strips(by_strips, kind, n, k):
    features = features_of(kind, n)
    assert_is(knn_module.knn(features, k), brute_force(features, k))


@pytest.mark.parametrize("k", [1, 60, 90])
def test_the_search_by_strips_for_many_neighbours(by_strips, k):
    features = clustered(90, 12)
    assert_is(knn_module.knn(features, k), brute_force(features, k))
    queries = clustered(11, 12, seed=4)
    assert_is(knn_module.knn(features, k, queries=queries), brute_force(features, k, queries))


def test_every_op_here_has_a_host_run():
    assert {n for n, op in _ops.OPS.items() if op.family == "knn"} == {
        *("knn_select_", "knn_select_both_", "knn_rank_", "knn_scores", "knn_halves"),
    }
