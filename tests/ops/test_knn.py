import gc
import importlib
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dhcl_ops
from dhcl_ops import camera_neighbours, knn
from dhcl_ops._products import fp32_sums
from tests import checks
from tests.checks import call, same_bits
from tests.conftest import needs_cuda
from tests.unread import UnreadDevice

# The name of the module is that of its function.
knn_module = importlib.import_module("dhcl_ops.knn")


def clustered(n, d, *, seed=0, spread=1.0, unit=True):
    """Rows around n/8 centres, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n // 8 + 1, d, generator=generator)
    rows = centres[torch.randint(0, len(centres), (n,), generator=generator)]
    rows = rows + spread * torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(rows) if unit else rows


def fixed_order_products(queries, features):
    """All products with the order of summation written out, element by element."""
    q, f = queries.numpy(force=True), features.numpy(force=True)
    columns = np.zeros((len(q), len(f), 128), np.float32)
    for j in range(q.shape[1]):
        columns[:, :, j % 128] += np.outer(q[:, j], f[:, j])
    while columns.shape[2] > 1:
        half = columns.shape[2] // 2
        columns = columns[:, :, :half] + columns[:, :, half:]
    return columns[:, :, 0]


def brute_force(features, k, queries=None):
    """The definition: self first, then similarity descending, then index ascending."""
    products = fixed_order_products(features if queries is None else queries, features)
    similarities = np.zeros((len(products), k), np.float32)
    indices = np.zeros((len(products), k), np.int64)
    for i, row in enumerate(products):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        if queries is None:
            order.remove(i)
            order.insert(0, i)
        indices[i] = order[:k]
        similarities[i] = row[order[:k]]
    return torch.from_numpy(similarities), torch.from_numpy(indices)


def assert_is(found, expected):
    assert torch.equal(found.indices.cpu(), expected[1])
    assert same_bits(found.similarities, expected[0])


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few rows make many, of uneven sizes."""
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (12, 70), "cuda": (12, 70)})


@pytest.fixture(params=["fp32", "half"])
def products(request, monkeypatch):
    """The CPU with the products of CUDA: fp16 operands and their bound."""
    if request.param == "half":
        original = knn_module.Products

        def half_products(*args, half):
            return original(*args, half=True)

        monkeypatch.setattr(knn_module, "Products", half_products)
    return request.param


# ---- values ----------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),
    (2, 1, 2),
    (2, 5, 1),
    (7, 3, 7),
    (40, 127, 5),
    (40, 128, 31),
    (150, 130, 10),
    (200, 300, 30),
]


@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_self_search_is_the_definition(device, products, small_tiles, n, d, k):
    features = clustered(n, d)
    assert_is(knn(features.to(device), k), brute_force(features, k))


@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
@pytest.mark.parametrize("q", [1, 30])
def test_queries_are_the_definition(device, products, small_tiles, n, d, k, q):
    features, queries = clustered(n, d), clustered(q, d, seed=1)
    found = knn(features.to(device), k, queries=queries.to(device))
    assert_is(found, brute_force(features, k, queries))


@pytest.mark.parametrize(("n", "k"), [(2, 2), (23, 5), (150, 30)])
def test_the_smallest_products_come_with_the_search(device, small_tiles, n, k):
    features = clustered(n, 16).to(device)
    found, least = knn_module.knn_and_least(features, k, None)
    assert_is(found, brute_force(features, k))
    if device.type == "cuda":
        assert least is None
    else:
        expected = (features.double() @ features.double().T).amin(1).float()
        torch.testing.assert_close(least, expected, rtol=0, atol=1e-6)
    assert knn_module.knn_and_least(features[:1], 1, None)[1] is None


def test_many_rows_against_float64(device):
    """Tiles of their usual size; similarities this far apart leave no doubt about the ranks."""
    features = clustered(3000, 64)
    truth = features.double() @ features.double().T
    truth.fill_diagonal_(2.0)
    expected = truth.topk(31, dim=1)
    found = knn(features.to(device), 31)
    gaps = expected.values.diff(dim=1).abs().min(dim=1).values > 1e-6
    assert gaps.float().mean() > 0.5
    assert torch.equal(found.indices.cpu()[gaps], expected.indices[gaps])
    torch.testing.assert_close(
        found.similarities.cpu()[:, 1:].double(), expected.values[:, 1:], rtol=0, atol=1e-6
    )
    # The symmetric search and the plain one are the same.
    plain = knn(features.to(device), 31, queries=features.to(device))
    same = plain.indices[:, 0] == found.indices[:, 0]
    assert same_bits(plain.similarities[same], found.similarities[same])
    assert torch.equal(plain.indices[same], found.indices[same])


def test_rows_of_any_length(device, products, small_tiles):
    """Ranks are by inner product as it is; a row leads its own list all the same."""
    features = clustered(60, 40, unit=False) * torch.logspace(-3, 3, 60).unsqueeze(1)
    found = knn(features.to(device), 8)
    assert_is(found, brute_force(features, 8))
    assert torch.equal(found.indices[:, 0].cpu(), torch.arange(60))
    for scale in (1e-30, 1e-18, 1e13):
        scaled = features * scale
        assert_is(knn(scaled.to(device), 8), brute_force(scaled, 8))


def test_exact_duplicates(device, products, small_tiles):
    """More of them than are kept as candidates: ties go by index, and self stays first."""
    features = clustered(6, 33).repeat_interleave(30, dim=0)
    features = features[torch.randperm(180, generator=torch.Generator().manual_seed(1))]
    found = knn(features.to(device), 5)
    assert_is(found, brute_force(features, 5))
    assert torch.equal(found.indices[:, 0].cpu(), torch.arange(180))
    assert int(found.uncertified) > 0


def test_near_duplicates(device, products, small_tiles):
    generator = torch.Generator().manual_seed(0)
    features = clustered(4, 50).repeat_interleave(40, dim=0)
    features = features + 1e-6 * torch.randn(160, 50, generator=generator)
    assert_is(knn(features.to(device), 9), brute_force(features, 9))


def test_zero_rows(device, products, small_tiles):
    features = clustered(80, 20)
    features[::3] = 0.0
    found = knn(features.to(device), 40)
    assert_is(found, brute_force(features, 40))
    assert not found.similarities[0].any()
    assert found.indices[0].tolist() == list(range(40))
    zeros = torch.zeros(50, 4, device=device)
    assert knn(zeros, 3).indices[10].tolist() == [10, 0, 1]
    assert knn(zeros, 3, queries=zeros[:1]).indices[0].tolist() == [0, 1, 2]


def test_negative_similarities_and_minus_zero(device, products):
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.0, -1.0], [0.0, 1.0], [-2.0, 0.0]])
    found = knn(features.to(device), 5)
    assert_is(found, brute_force(features, 5))
    assert found.indices[0].tolist() == [0, 2, 3, 1, 4]
    assert not torch.signbit(found.similarities[0, 1:3]).any()


def test_sizes_at_the_border(device):
    for n in (0, 1, 2):
        features = clustered(n, 6).to(device) if n else torch.zeros(0, 6, device=device)
        for k in range(n + 1):
            found = knn(features, k)
            assert found.similarities.shape == found.indices.shape == (n, k)
            assert int(found.uncertified) == 0
            if k:
                assert found.indices[:, 0].tolist() == list(range(n))
            empty = knn(features, k, queries=features[:0])
            assert empty.indices.shape == (0, k)
    assert knn(torch.zeros(5, 0, device=device), 2).indices[3].tolist() == [3, 0]
    assert knn(torch.zeros(0, 6, device=device), 0, queries=torch.zeros(3, 6, device=device))[
        0
    ].shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_searched_in_float32(device, dtype):
    features = clustered(50, 70).to(dtype)
    found = knn(features.to(device), 6)
    assert found.similarities.dtype == torch.float32
    assert_is(found, brute_force(features.float(), 6))


def test_a_large_k_crosses_every_buffer(device, products):
    features = clustered(1500, 16)
    for k in (700, 1500):
        found = knn(features.to(device), k)
        products_of_row = fixed_order_products(features[77:78], features)[0]
        order = sorted((j for j in range(1500) if j != 77), key=lambda j: (-products_of_row[j], j))
        assert found.indices[77].tolist() == [77, *order][:k]


# ---- the bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 300.0, 1e12])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_bound_holds(device, half, scale, mixed):
    features, queries = clustered(90, 260) * scale, clustered(40, 260, seed=3) * scale
    if mixed:
        features = features * torch.logspace(-4, 2, 90).unsqueeze(1)
    features, queries = features.to(device), queries.to(device)
    norms = [knn_module.upper_norms("knn", "rows", rows) for rows in (queries, features)]
    p = knn_module.Products(queries, features, *norms, half=half)
    tile = p.tile(slice(0, 40), slice(0, 90)).double() / p.scale**2
    every = torch.arange(90, device=device).expand(40, 90)
    scores = call("compiled", "knn_scores", queries, features, every).double()
    assert ((tile - scores).abs() <= p.bound.unsqueeze(1)).all()
    if half and not mixed and scale == 1.0:
        assert p.scale == 2.0**8
        assert p.bound.max() < 6e-4


def test_fast_leaves_the_certificate_out(device):
    features = clustered(300, 64).to(device)
    exact, fast = knn(features, 10), knn(features, 10, precision="fast")
    assert int(fast.uncertified) == -1
    assert int(exact.uncertified) >= 0
    assert torch.equal(exact.indices, fast.indices)
    assert same_bits(exact.similarities, fast.similarities)


def test_uncertified_rows_are_counted(device, products):
    features = clustered(400, 30)
    assert int(knn(features.to(device), 5).uncertified) == 0
    features[100:150] = features[3]
    assert 51 <= int(knn(features.to(device), 5).uncertified) < 120


# ---- tiles and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [(12, 70), (24, 24), (64, 256)])
@pytest.mark.parametrize(("n", "keep"), [(1, 1), (5, 2), (40, 17), (79, 3), (200, 20), (301, 8)])
def test_strips_show_each_row_every_other_once(tiles, n, keep):
    seen = torch.zeros(n, n, dtype=torch.int64)
    for rows, cols, both in knn_module._strips(n, keep, *tiles):
        assert rows.stop <= n
        assert cols.stop <= n
        assert (rows.stop - rows.start) * (cols.stop - cols.start) <= max(np.prod(tiles), n)
        seen[rows, cols] += 1
        if both:
            beyond = slice(max(cols.start, rows.stop), cols.stop)
            # No more new features than a column has seen, or its list would overflow.
            assert rows.stop - rows.start <= rows.start
            assert (seen[beyond].sum(1) >= rows.start).all()
            seen[beyond, rows] += 1
    assert (seen == 1).all()


def test_strips_of_real_sizes_waste_little():
    """Products beyond the N^2 / 2 of a symmetric search, and launches, at the sizes that count."""
    for n, waste, most in ((12_936, 1.25, 24), (32_621, 1.11, 40), (1_000_000, 1.01, 8000)):
        tiles = list(knn_module._strips(n, 45, *knn_module._TILES["cuda"]))
        area = sum((r.stop - r.start) * (c.stop - c.start) for r, c, _ in tiles)
        assert area < waste * n * n / 2
        assert len(tiles) < most
        assert all((r.stop - r.start) * (c.stop - c.start) <= 1 << 26 for r, c, _ in tiles)


@pytest.fixture
def by_strips(monkeypatch, products, small_tiles):
    """The CPU with the tiles of CUDA."""
    monkeypatch.setattr(knn_module, "_BY_STRIPS", ("cpu", "cuda"))


@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_self_search_by_strips_is_the_definition(device, by_strips, n, d, k):
    features = clustered(n, d)
    assert_is(knn(features.to(device), k), brute_force(features, k))


def test_self_search_by_strips_of_duplicates(device, by_strips):
    features = clustered(6, 33).repeat_interleave(30, dim=0)
    found = knn(features.to(device), 5)
    assert_is(found, brute_force(features, 5))
    assert int(found.uncertified) > 0
    stages = []
    knn(features.to(device), 5, progress=lambda *args: stages.append(args))
    done = [d for s, d, _ in stages if s == "products"]
    assert done == sorted(done)
    assert done[-1] == 180


def test_products_begin_every_row_at_16_bytes(device):
    features = clustered(29, 13).to(device)
    norms = knn_module.upper_norms("knn", "rows", features)
    p = knn_module.Products(features, features, norms, norms, half=True)
    assert p.features.stride(0) % 8 == 0
    for cols in (slice(0, 29), slice(3, 29), slice(28, 29), slice(0, 5)):
        for out in (None, torch.full((2000,), 7.0, device=device)):
            tile = p.tile(slice(2, 20), cols, out)
            assert tile.shape == (18, cols.stop - cols.start)
            assert tile.stride(0) % 8 == 0
            exact = features[2:20] @ features[cols].T
            torch.testing.assert_close(tile / p.scale**2, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_one_tile_at_a_time_and_none_left(monkeypatch, strips, queries):
    """What the call allocates at its most, and what of it remains."""
    from torch.profiler import ProfilerActivity, profile

    if dhcl_ops.status().how == "reference":
        pytest.skip("the reference copies its candidates with each tile")
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (256, 1024)})
    monkeypatch.setattr(knn_module, "_BY_STRIPS", ("cpu",) if strips else ())
    features = clustered(3000, 8)
    others = features[:600] if queries else None
    knn(features, 4, queries=others)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = knn(features, 4, queries=others)
    events = seen.profiler.kineto_results.events()
    steps = [event.nbytes() for event in events if event.name() == "[memory]"]
    held = np.cumsum(steps)
    results = sum(t.numel() * t.element_size() for t in found)
    rows = 600 if queries else 3000
    capacity = 128 if strips and not queries else 70
    # A tile, padded; candidates with 8 bytes each; some numbers for each row and feature.
    limit = 4 * 256 * (1024 + 8) + 8 * capacity * rows + 200 * (rows + 3000)
    assert limit / 3 < held.max() < limit
    assert held[-1] <= results + 4096


def test_products_on_cuda_are_made_where_they_are_asked_for():
    there = UnreadDevice()
    left, right = there.of(torch.ones(4, 8).half()), there.of(torch.ones(8, 6).half())
    out = there.of(torch.ones(4, 6))
    with there.unread():
        assert fp32_sums(left, right, out).untyped_storage()._cdata == out.untyped_storage()._cdata
        assert fp32_sums(left, right).dtype == torch.float32


@pytest.mark.parametrize("queries", [False, True])
def test_nothing_of_a_search_outlives_it(device, products, small_tiles, monkeypatch, queries):
    """Without a run of the garbage collector: operands and tiles are gigabytes."""
    kept_alive = []
    original = knn_module.Products

    def recorded(*args, **keywords):
        made = original(*args, **keywords)
        kept_alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(knn_module, "Products", recorded)
    features = clustered(90, 20).to(device)
    enabled = gc.isenabled()
    gc.disable()
    try:
        knn(features, 5, queries=features[:30] if queries else None)
        assert len(kept_alive) == 1
        assert kept_alive[0]() is None
    finally:
        if enabled:
            gc.enable()


# ---- the ops alone ---------------------------------------------------------------------------


def kept(state, keep):
    """The `keep` largest candidates of each row, in order."""
    rows = []
    for values, indices in zip(state[0].tolist(), state[1].tolist(), strict=True):
        pairs = sorted((-v, i) for v, i in zip(values, indices, strict=True) if i >= 0)
        rows.append(pairs[:keep])
    return rows


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("self_search", [False, True])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 400])
def test_select_keeps_the_largest(implementation, device, mirror, self_search, width):
    rows, keep = (width, 5) if mirror else (7, 5)
    state = knn_module._new_state(rows, 9, device)
    columns = 7 if mirror else width
    seen = [{} for _ in range(rows)]
    for turn in range(3):
        tile = torch.randn(7, width, generator=torch.Generator().manual_seed(turn))
        starts = (7 * turn, 0) if mirror else (0, width * turn)
        arguments = (tile.to(device), *starts, keep, mirror, self_search)
        call(implementation, "knn_select_", *state, *arguments)
        for r in range(rows):
            for c in range(columns):
                index = c + columns * turn
                if not (self_search and index == r):
                    seen[r][index] = float(tile[c, r] if mirror else tile[r, c])
    got = kept([t.cpu() for t in state], keep)
    for r in range(rows):
        assert got[r] == sorted((-v, i) for i, v in seen[r].items())[:keep]
    counts = (state[1] >= 0).sum(1)
    assert torch.equal(counts.int(), state[2])
    assert (state[3].isinf() | (state[3] <= state[0].topk(keep).values[:, -1])).all()


@pytest.mark.parametrize("self_search", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_select_takes_rows_that_lie_apart(implementation, device, self_search, strided):
    tile = torch.randn(6, 90, generator=torch.Generator().manual_seed(0)).to(device)
    part = tile[:, 3:83] if strided else tile[:, 3:83].contiguous()
    for mirror in (False, True):
        state = knn_module._new_state(80, 20, device)
        call(implementation, "knn_select_", *state, part, 0, 0, 5, mirror, self_search)
        products = part.cpu().T if mirror else part.cpu()
        got = kept([t.cpu() for t in state], 5)
        for r, row in enumerate(products.tolist()):
            entries = [(-v, c) for c, v in enumerate(row) if not (self_search and c == r)]
            assert got[r] == sorted(entries)[:5]


@pytest.mark.parametrize("capacity", [6, 60])
def test_select_both_is_both_ways_of_select(implementation, device, capacity):
    ours, expected = (knn_module._new_state(70, capacity, device) for _ in range(2))
    for turn, (row, col) in enumerate([(0, 0), (0, 40), (20, 20), (20, 50), (40, 40)]):
        tile = torch.randn(20, 20, generator=torch.Generator().manual_seed(turn)).to(device)
        call(implementation, "knn_select_both_", *ours, tile, row, col, 5)
        first = max(row + 20 - col, 0)
        call("reference", "knn_select_", *expected, tile, row, col, 5, False, True)
        beyond = (tile[:, first:], row, col + first)
        call("reference", "knn_select_", *expected, *beyond, 5, True, True)
        found, wanted = ([t.cpu() for t in state] for state in (ours, expected))
        assert kept(found, 5) == kept(wanted, 5)
        assert torch.equal(found[2].long(), (found[1] >= 0).sum(1))


@pytest.mark.parametrize("self_search", [False, True])
@pytest.mark.parametrize("complete", [False, True])
def test_rank_is_its_reference(implementation, device, self_search, complete):
    features = clustered(60, 130, unit=False)
    features[7:12] = features[2]
    queries = features[:9] if self_search else clustered(9, 130, seed=1, unit=False)
    products = 4 * (queries @ features.T)
    if self_search:
        products.fill_diagonal_(-torch.inf)
    values, indices = products.topk(30, dim=1)
    counts = torch.full((9,), 30, dtype=torch.int32)
    bound = torch.logspace(-3, 4, 9, dtype=torch.float64)
    tensors = [t.to(device) for t in (queries, features, values, indices.int(), counts, bound)]
    rest = (None, 0, 20, 0.25, self_search, complete)
    results = []
    for how in (implementation, "reference"):
        out = (torch.zeros(9, 6), torch.zeros(9, 6, dtype=torch.int64), torch.zeros(9).bool())
        out = [t.to(device) for t in out]
        call(how, "knn_rank_", *out, *tensors, *rest)
        results.append(out)
    assert same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][2].tolist() == sorted(results[0][2].tolist(), reverse=True)
    assert bool(results[0][2].all()) is complete


def test_rank_leaves_out_what_is_below_the_floor(implementation, device):
    """The rest of a row is what happens to be there, or -inf and -1."""
    features = torch.eye(8) + torch.linspace(0, 0.1, 8)
    products = features[:2] @ features.T
    values, indices = products.topk(8, dim=1)
    state = (values, indices.int(), torch.full((2,), 8, dtype=torch.int32))
    bound = torch.full((2,), 1e-3, dtype=torch.float64)
    floor = torch.tensor([0.9, -1.0])
    out = (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2).bool())
    out, rest = (
        [t.to(device) for t in part]
        for part in (out, (features[:2], features, *state, bound, floor))
    )
    call(implementation, "knn_rank_", *out, *rest, 0, 6, 1.0, False, False)
    assert out[0][0, 1:].tolist() == [-torch.inf] * 3
    assert out[1][0].tolist() == [0, -1, -1, -1]
    assert out[1][1].tolist() == [1, *products[1].argsort(descending=True).tolist()[1:4]]
    assert out[2][0]


@pytest.mark.parametrize("d", [0, 1, 128, 301])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**12])
def test_halves_say_what_rounding_took(implementation, device, d, scale):
    rows = clustered(9, d, unit=False).to(device)
    operand, squares = call(implementation, "knn_halves", rows, scale, 24, d + -d % 8)
    assert operand.shape == (24, d + -d % 8)
    assert torch.equal(operand[:9, :d], (rows * scale).half())
    assert not operand[9:].any()
    assert not operand[:, d:].any()
    truth = (rows * scale).double().sub((rows * scale).half().double()).square().sum(1)
    torch.testing.assert_close(squares.double(), truth, rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, r"keep must be in \[1, 9\) .got 0"),
        ({"keep": 9}, r"keep must be in \[1, 9\) .got 9"),
        ({"row_start": -1}, r"the tile's rows must be in \[0, 8\) .got -1 to 2"),
        ({"col_start": 4}, r"the tile's columns must be in \[0, 8\) .got 4 to 9"),
        ({"tile": torch.zeros(3)}, "tile must be 2-D"),
        ({"tile": torch.zeros(3, 5).double()}, "tile must be float32"),
    ],
)
def test_select_both_refuses(change, message):
    if dhcl_ops.status().how == "reference":
        pytest.skip("of the library, whose op can be called without the public function")
    arguments = {"tile": torch.zeros(3, 5), "row_start": 0, "col_start": 3, "keep": 6, **change}
    state = knn_module._new_state(8, 9, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"knn_select_both_: {message}"):
        call("compiled", "knn_select_both_", *state, *arguments.values())
    assert not state[2].any()


@pytest.mark.parametrize("d", [0, 1, 127, 128, 129, 1000])
def test_scores_have_the_stated_bits(implementation, device, d):
    features, queries = clustered(20, d, unit=False), clustered(3, d, seed=2, unit=False)
    candidates = torch.tensor([[0, 19, -1, 4], [5, 5, 5, 5], [-1, -1, -1, -1]])
    got = call(
        implementation, "knn_scores", queries.to(device), features.to(device), candidates.to(device)
    )
    expected = torch.from_numpy(fixed_order_products(queries, features)).gather(
        1, candidates.clamp(min=0)
    )
    assert same_bits(got, expected.masked_fill(candidates < 0, -torch.inf))


def test_scores_check_their_candidates():
    with pytest.raises((RuntimeError, IndexError)):
        call("compiled", "knn_scores", torch.ones(1, 3), torch.ones(2, 3), torch.tensor([[2]]))


def test_scores_compile_as_one_graph(device):
    def function(queries, features, candidates):
        return torch.ops.dhcl.knn_scores(queries * 2, features, candidates) + 1

    arguments = [
        (clustered(4, 30, seed=s), clustered(9, 30, seed=s + 1), torch.randint(-1, 9, (4, 3)))
        for s in (1, 2)
    ]
    arguments = [tuple(t.to(device) for t in a) for a in arguments]
    checks.compiles_fullgraph(function, *arguments, backend="aot_eager")


# ---- the checklist ---------------------------------------------------------------------------


def test_same_bits_twice_and_for_any_thread_count_and_tile(monkeypatch):
    features = clustered(1300, 96)
    features[40:70] = features[7]

    def run():
        found = knn(features, 12)
        return torch.cat([found.similarities.view(torch.int32), found.indices.int()])

    checks.same_bits_twice(run, times=1)
    checks.for_any_thread_count(run)
    expected = run()
    monkeypatch.setattr(knn_module, "_TILES", {"cpu": (100, 333)})
    assert same_bits(run(), expected)


def test_permuting_the_rows_permutes_the_result(device):
    features = clustered(300, 50)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    found, permuted = knn(features.to(device), 12), knn(features[order].to(device), 12)
    assert same_bits(permuted.similarities, found.similarities[order.to(device)])
    # Without ties, the neighbours are the same ones.
    assert torch.equal(order[permuted.indices.cpu()], found.indices[order.to(device)].cpu())


def test_reference_alone_gives_the_same(monkeypatch):
    features = clustered(130, 40)
    expected = knn(features, 9)
    ops = (("_select", "knn_select_"), ("_rank", "knn_rank_"), ("_scores", "knn_scores"))
    for name, function in ops:
        reference = knn_module.OPS[function].reference
        monkeypatch.setattr(knn_module, name, reference)
    assert_is(knn(features, 9), (expected.similarities, expected.indices))


def test_strided_features_and_gradients(device):
    wide = clustered(50, 60).to(device).requires_grad_()
    found = knn(wide[:, ::3], 4)
    assert not found.similarities.requires_grad
    dense = knn(wide.detach()[:, ::3].contiguous(), 4)
    assert torch.equal(found.indices, dense.indices)


def test_lower_precision_of_products_elsewhere_does_not_reach_in(device):
    features = clustered(200, 300).to(device)
    expected = knn(features, 9)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = knn(features, 9)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_is(found, (expected.similarities, expected.indices.cpu()))


def test_precision_set_for_one_backend_stays(device):
    """torch refuses its older functions once a backend's precision was set on its own."""
    features = clustered(60, 50).to(device)
    expected = knn(features, 9)
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        found = knn(features, 9)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert_is(found, (expected.similarities, expected.indices.cpu()))


def test_arrays_in_arrays_out():
    features = clustered(40, 12)
    expected = knn(features, 5, queries=features[:7])
    found = knn(features.double().numpy(), 5, queries=features[:7].numpy())
    assert type(found) is type(expected)
    assert isinstance(found.similarities, np.ndarray)
    assert found.indices.dtype == np.int64
    assert np.array_equal(found.indices, expected.indices.numpy())
    assert int(found.uncertified) == 0


def test_progress_and_interruption(small_tiles):
    features = clustered(100, 8)
    features[30:80] = features[2]
    calls = []
    knn(features, 3, progress=lambda *args: calls.append(args))
    stages = {stage for stage, _, _ in calls}
    assert stages == {"products", "scores", "uncertified rows"}
    for stage in stages:
        done = [d for s, d, _ in calls if s == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for s, _, total in calls if s == stage)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        knn(features, 3, progress=interrupt)


F = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([1.0], 1), {}, TypeError, "features must be a tensor or an array .got list"),
        ((F[0], 1), {}, ValueError, r"features must be 2-D .got shape \(3,\)"),
        ((F.long(), 1), {}, TypeError, "features must be float32 or .*got int64"),
        ((F, 5), {}, ValueError, r"k must be at most the number of features \(got k=5, N=4\)"),
        ((F[:0], 1), {}, ValueError, "got k=1, N=0"),
        ((F, -1), {}, ValueError, "k must be >= 0 .got -1"),
        ((F, 1.5), {}, TypeError, "k must be an integer .got float"),
        ((F, True), {}, TypeError, "k must be an integer .got bool"),
        ((F, 1), {"queries": F[:, :2]}, ValueError, "queries must have the features' width 3"),
        ((F, 1), {"queries": F[0]}, ValueError, "queries must be 2-D"),
        ((F, 1), {"queries": F.to("meta")}, ValueError, "one device .got features on cpu"),
        ((F, 1), {"backend": "annoy"}, ValueError, "backend must be 'auto' or .*got 'annoy'"),
        ((F, 1), {"precision": "half"}, ValueError, "precision must be 'exact' or 'fast'"),
    ],
)
def test_knn_refuses(arguments, keywords, error, message):
    with pytest.raises(error, match="knn: .*" + message):
        knn(*arguments, **keywords)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_knn_names_the_first_row_that_is_not_finite(device, value):
    features = clustered(20, 5).to(device)
    features[[11, 15], 2] = value
    with pytest.raises(ValueError, match=r"knn: features must be finite .*in row 11"):
        knn(features, 2)
    with pytest.raises(ValueError, match=r"knn: queries must be finite .*in row 1"):
        knn(features[:5], 2, queries=features[10:])
    features[11] = 1e25
    with pytest.raises(ValueError, match=r"knn: norms of features must be below .*in row 11"):
        knn(features, 2)


@given(
    data=st.data(),
    n=st.integers(1, 40),
    d=st.integers(1, 4),
    levels=st.integers(1, 3),
    half=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_small_integers_are_full_of_ties(data, n, d, levels, half):
    values = st.lists(st.integers(-levels, levels), min_size=n * d, max_size=n * d)
    features = torch.tensor(data.draw(values), dtype=torch.float32).view(n, d)
    k = data.draw(st.integers(0, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_module, "_TILES", {"cpu": (7, 11)})
        original = knn_module.Products
        patch.setattr(knn_module, "Products", lambda *a, **_: original(*a, half=half))
        assert_is(knn(features, k), brute_force(features, k))
        queries = features[: n // 2]
        assert_is(knn(features, k, queries=queries), brute_force(features, k, queries))


# ---- faiss -----------------------------------------------------------------------------------


def test_without_faiss_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs the package faiss \(pip install faiss-cpu\)"):
        knn(clustered(9, 4), 2, backend="faiss")


@pytest.fixture(params=["stand-in", "installed"])
def faiss(request, monkeypatch):
    """faiss, or a stand-in whose last places are off and whose ties are reversed."""
    if request.param == "installed":
        return pytest.importorskip("faiss")

    class IndexFlatIP:
        def __init__(self, d):
            assert isinstance(d, int)

        def add(self, rows):
            self.rows = rows

        def search(self, queries, k):
            products = queries[:, ::-1] @ self.rows[:, ::-1].T
            order = np.argsort(products[:, ::-1], axis=1, kind="stable")[:, ::-1]
            order = products.shape[1] - 1 - order[:, :k]
            return np.take_along_axis(products, order, 1), order

    module = types.ModuleType("faiss")
    module.IndexFlatIP = IndexFlatIP
    monkeypatch.setitem(sys.modules, "faiss", module)
    return module


@pytest.mark.parametrize("k", [1, 2, 10, 60])
def test_faiss_gives_the_same_result(faiss, small_tiles, k):
    features = clustered(60, 70)
    features[30:55] = features[1]
    assert_is(knn(features, k, backend="faiss"), brute_force(features, k))
    queries = clustered(20, 70, seed=5)
    found = knn(features, k, queries=queries, backend="faiss")
    assert_is(found, brute_force(features, k, queries))


# ---- CUDA ------------------------------------------------------------------------------------


@needs_cuda
def test_cuda_has_the_bits_of_the_cpu():
    features = clustered(9000, 256)
    features[100:300] = features[5]
    expected = knn(features, 30)
    found = knn(features.cuda(), 30)
    assert_is(found, (expected.similarities, expected.indices))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = knn(features.cuda(), 30)
    stream.synchronize()
    assert_is(again, (expected.similarities, expected.indices))


# ---- neighbours by camera -----------------------------------------------------------------------


@pytest.mark.parametrize(("k", "own"), [(1, 1), (12, 4), (12, 12), (9, 3), (40, 1)])
def test_camera_neighbours_are_the_nearest_of_either_kind(device, k, own):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator)).to(device)
    # One camera with two images, one with a single one.
    cameras = torch.tensor([7, 7, 3] + [0] * 17 + [5] * 20)[torch.randperm(40, generator=generator)]
    found = camera_neighbours(features, cameras.to(device), k, own)
    similarity = (features.double() @ features.double().T).cpu()
    similarity.fill_diagonal_(9.0)
    for row, (values, list_) in enumerate(zip(*(t.cpu() for t in found[:2]), strict=True)):
        same = cameras == cameras[row]
        # Of 40 images 40 - count are of other cameras: where that is not enough, more of its own.
        count = max(min(own, int(same.sum())), k - int((~same).sum()))
        ranked = similarity[row].argsort(descending=True).tolist()
        expected_own = [i for i in ranked if same[i]][:count]
        expected_other = [i for i in ranked if not same[i]][: k - count]
        got = list_.tolist()
        assert [i for i in got if same[i]] == expected_own
        assert [i for i in got if not same[i]] == expected_other
        assert got[0] == row
        for begin in range(1, k + 1):  # any beginning has the same shares
            assert abs(sum(bool(same[i]) for i in got[:begin]) - begin * count / k) <= 1
        wanted = (features[row].double() @ features[list_.to(device)].double().T).cpu()
        torch.testing.assert_close(values.double(), wanted, rtol=0, atol=1e-6)


def test_one_camera_has_the_plain_neighbours():
    features = clustered(60, 24)
    found = camera_neighbours(features, torch.zeros(60, dtype=torch.int64), 10, 4)
    plain = knn_module.knn(features, 10)
    assert torch.equal(found.indices, plain.indices)
    assert same_bits(found.similarities, plain.similarities)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cameras": torch.zeros(5)}, TypeError, "cameras must be int64"),
        ({"cameras": torch.zeros(4, dtype=torch.int64)}, ValueError, "cameras must have shape"),
        ({"k": 6}, ValueError, r"must not descend \(got own=1, k=6, N=5\)"),
        ({"own": 4}, ValueError, r"must not descend \(got own=4, k=3, N=5\)"),
        ({"own": 0}, ValueError, "own must be >= 1"),
    ],
)
def test_errors_of_camera_neighbours(change, error, message):
    arguments = {
        "features": torch.eye(5),
        "cameras": torch.zeros(5, dtype=torch.int64),
        "k": 3,
        "own": 1,
        **change,
    }
    with pytest.raises(error, match=f"camera_neighbours: .*{message}"):
        camera_neighbours(**arguments)
