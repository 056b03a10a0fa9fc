import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dhcl_ops
from dhcl_ops import MemoryBank, _ops, least_similar, memory, momentum_update_, prototypes
from tests import checks
from tests.checks import call, same_bits
from tests.conftest import needs_cuda

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def unit_rows(n, d, *, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return rows.to(device=device, dtype=dtype)


def batch(n, b, d, *, seed=1, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = unit_rows(b, d, seed=seed + 100, device=device, dtype=dtype)
    return features, torch.randint(0, max(n, 1), (b,), generator=generator).to(device)


def spcl_loop(bank, features, indices, momentum):
    """The update of SpCL's HybridMemory, one sample after another, as published."""
    for f, i in zip(features, indices, strict=True):
        bank[i] = momentum * bank[i] + (1.0 - momentum) * f
        bank[i] /= bank[i].norm()
    return bank


def fixed_order_loop(bank, features, indices, momentum):
    """The same loop with the norm's order of summation written out, element by element."""
    one = np.float32(1)
    m, rest = np.float32(momentum), np.float32(1.0 - momentum)
    bank = bank.clone().numpy()
    for f, i in zip(features.numpy(), indices.tolist(), strict=True):
        v = m * bank[i] + rest * f
        columns = np.zeros(128, np.float32)
        for j, x in enumerate(v):
            columns[j % 128] += x * x
        while len(columns) > 1:
            half = len(columns) // 2
            columns = columns[:half] + columns[half:]
        bank[i] = v / (np.sqrt(columns[0]) * one)
    return torch.from_numpy(bank)


# ---- square roots ----


def rounded_root(x):
    """The double nearest to the root of a positive double, by integers alone."""
    numerator, denominator = x.as_integer_ratio()
    # Scaled by 4 ** shift the integer root has at least 60 bits, of which a double keeps 53.
    shift = max(0, 64 + (denominator.bit_length() - numerator.bit_length()) // 2)
    scaled, remainder = divmod(numerator << 2 * shift, denominator)
    root = math.isqrt(scaled)
    # A bit below all others says that the root is not exact, so that no tie is seen where none is.
    sticky = int(remainder > 0 or root * root != scaled)
    return float(Fraction(2 * root + sticky, 2 ** (shift + 1)))


EDGES = [0.0, -0.0, math.inf, math.nan, 1.0, 4.0, math.nextafter(1.0, 0), math.nextafter(1.0, 2)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_square_roots_of_the_reference_are_rounded_correctly(device, dtype):
    """Bits are compared between reference, C++ and CUDA, so no root may be off on any processor."""
    tiny, largest = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    generator = np.random.default_rng(0)
    integer = {8: np.int64, 4: np.int32}[np.dtype(dtype).itemsize]
    every_exponent = generator.integers(0, np.iinfo(integer).max, 1 << 20, integer).view(dtype)
    every_exponent = every_exponent[np.isfinite(every_exponent)]
    edges = np.array([*EDGES, tiny, np.finfo(dtype).tiny, largest], dtype)
    squares = generator.integers(1, 4096, 1000).astype(dtype) ** 2
    uniform = generator.random(1 << 20).astype(dtype)
    x = np.concatenate([edges, squares, uniform, every_exponent])
    got = memory._square_root(torch.from_numpy(x).to(device)).cpu()
    # Rounded twice, to a double and to a float, the root of a float is still the nearest float.
    roots = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64).to(got.dtype)
    assert same_bits(got[4:], roots[4:])
    got = got.numpy()
    assert got[:3].tolist() == [0.0, -0.0, math.inf]
    assert np.signbit(got[1])
    assert np.isnan(got[3])
    some = generator.choice(x[4:], 2000).tolist()
    assert [math.sqrt(v) for v in some] == [rounded_root(v) for v in some]


# ---- momentum_update_: values ----

SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (16, 40, 127),
    (16, 40, 128),
    (9, 33, 300),
    (50, 64, 2048),
    (4, 3, 2050),
]


@pytest.mark.parametrize(("n", "b", "d"), SHAPES)
def test_update_has_the_bits_of_the_sequential_loop(implementation, device, n, b, d):
    bank = unit_rows(n, d)
    features, indices = batch(n, b, d)
    expected = fixed_order_loop(bank, features, indices, 0.2)
    got, f, i = bank.to(device), features.to(device), indices.to(device)
    call(implementation, "momentum_update_", got, f, i, 0.2, 0.0, None)
    assert same_bits(got, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.2, 0.9, 1.0])
def test_update_follows_spcl(device, momentum):
    """PyTorch's own norm sums in an order of its own, so equality is to a few ulp."""
    bank = unit_rows(30, 512)
    features, indices = batch(30, 200, 512)
    expected = spcl_loop(bank.clone(), features, indices, momentum)
    got = momentum_update_(bank.to(device), features.to(device), indices.to(device), momentum)
    torch.testing.assert_close(got.cpu(), expected, rtol=2e-5, atol=2e-7)


def test_duplicates_are_applied_one_after_another(implementation, device):
    bank = unit_rows(3, 64, device=device)
    features = unit_rows(6, 64, seed=5, device=device)
    indices = torch.tensor([2, 0, 2, 2, 1, 2], device=device)
    at_once, one_by_one = bank.clone(), bank.clone()
    call(implementation, "momentum_update_", at_once, features, indices, 0.3, 0.0, None)
    for k in range(6):
        arguments = (features[k : k + 1], indices[k : k + 1], 0.3, 0.0, None)
        call(implementation, "momentum_update_", one_by_one, *arguments)
    assert same_bits(at_once, one_by_one)
    backwards = bank.clone()
    order = torch.arange(5, -1, -1, device=device)
    arguments = (features[order], indices[order], 0.3, 0.0, None)
    call(implementation, "momentum_update_", backwards, *arguments)
    assert not same_bits(at_once[2], backwards[2])


@pytest.mark.parametrize(("bank_dtype", "feature_dtype"), list(itertools.product(FLOATS, FLOATS)))
def test_update_in_every_pair_of_dtypes(device, bank_dtype, feature_dtype):
    bank = unit_rows(20, 200, device=device, dtype=bank_dtype)
    features, indices = batch(20, 50, 200, device=device, dtype=feature_dtype)
    ours, reference = bank.clone(), bank.clone()
    momentum_update_(ours, features, indices, 0.2)
    call("reference", "momentum_update_", reference, features, indices, 0.2, 0.0, None)
    assert same_bits(ours, reference)
    plain = spcl_loop(bank.clone(), features.to(bank_dtype), indices, 0.2)
    truth = spcl_loop(bank.double(), features.double(), indices, 0.2)
    # A float32 PyTorch loop differs from ours by the norm's order alone, within rounding.
    checks.no_worse_than_plain(ours, plain, truth, slack=1.05 if bank_dtype.itemsize == 2 else 2.0)


def test_update_of_a_large_batch_crosses_the_kernels_chunks(device):
    bank = unit_rows(50, 8)
    features, indices = batch(50, 9000, 8)
    expected = fixed_order_loop(bank, features, indices, 0.5)
    got = momentum_update_(bank.to(device), features.to(device), indices.to(device), 0.5)
    assert same_bits(got, expected)


def test_update_takes_strided_features_and_indices(implementation, device):
    bank = unit_rows(10, 6, device=device)
    wide = unit_rows(8, 12, seed=2, device=device)
    double_indices = torch.randint(0, 10, (16,), device=device)
    strided, dense = bank.clone(), bank.clone()
    for into, f, i in (
        (strided, wide[:, ::2], double_indices[::2]),
        (dense, wide[:, ::2].contiguous(), double_indices[::2].contiguous()),
    ):
        call(implementation, "momentum_update_", into, f, i, 0.2, 0.0, None)
    assert same_bits(strided, dense)


def test_update_reading_from_the_bank_itself(device):
    bank = unit_rows(6, 32, device=device)
    indices = torch.tensor([1, 0, 1, 2], device=device)
    expected = momentum_update_(bank.clone(), bank[:4].clone(), indices, 0.2)
    assert same_bits(momentum_update_(bank, bank[:4], indices, 0.2), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_features_may_be_rows_of_the_bank_in_a_compiled_graph(device, backend):
    bank = unit_rows(12, 36, device=device)
    indices = torch.tensor([1, 0, 3, 2], device=device)

    def update(bank, indices):
        return momentum_update_(bank, bank[:4], indices, 0.2)

    expected = momentum_update_(bank.clone(), bank[:4].clone(), indices, 0.2)
    torch.compiler.reset()
    assert same_bits(
        torch.compile(update, fullgraph=True, backend=backend)(bank, indices), expected
    )


@pytest.mark.parametrize("offset", [0, 3, 7])
def test_the_op_itself_reads_rows_of_the_bank_as_they_were(device, implementation, offset):
    bank = unit_rows(12, 36, device=device)
    indices = torch.tensor([4, 3, 5, 4], device=device)
    rows = bank[offset : offset + 4]
    expected = bank.clone()
    call(implementation, "momentum_update_", expected, rows.clone(), indices, 0.2, 0.0, None)
    call(implementation, "momentum_update_", bank, rows, indices, 0.2, 0.0, None)
    assert same_bits(bank, expected)


def test_update_on_an_unaligned_slice(device):
    """A bank that starts 4 bytes into an allocation cannot be read in 16-byte pieces."""
    storage = unit_rows(1, 10 * 8 + 1, device=device).flatten()
    bank = storage[1:].view(10, 8)
    features, indices = batch(10, 12, 8, device=device)
    expected = momentum_update_(bank.clone(), features, indices, 0.2)
    assert same_bits(momentum_update_(bank, features, indices, 0.2), expected)


def test_rows_that_are_not_named_stay(implementation, device):
    bank = unit_rows(10, 40, device=device)
    before = bank.clone()
    features = unit_rows(3, 40, seed=9, device=device)
    indices = torch.tensor([2, 7, 2], device=device)
    call(implementation, "momentum_update_", bank, features, indices, 0.2, 0.0, None)
    rest = [i for i in range(10) if i not in (2, 7)]
    assert same_bits(bank[rest], before[rest])
    assert not same_bits(bank[[2, 7]], before[[2, 7]])


# ---- momentum_update_: bad and borderline input ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_feature_that_is_not_finite_leaves_its_row(implementation, device, value):
    bank = unit_rows(4, 130, device=device)
    before = bank.clone()
    features = unit_rows(3, 130, seed=3, device=device)
    features[1, 129] = value
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    indices = torch.tensor([0, 1, 2], device=device)
    call(implementation, "momentum_update_", bank, features, indices, 0.2, 0.0, skipped)
    assert same_bits(bank[[1, 3]], before[[1, 3]])
    assert not same_bits(bank[0], before[0])
    assert skipped.item() == 1


def test_the_next_occurrence_after_a_skipped_one_counts(implementation, device):
    bank = unit_rows(2, 50, device=device)
    good = unit_rows(1, 50, seed=3, device=device)
    features = torch.cat([torch.full_like(good, float("nan")), good])
    expected = bank.clone()
    zero = torch.tensor([0], device=device)
    call(implementation, "momentum_update_", expected, good, zero, 0.2, 0.0, None)
    both = torch.tensor([0, 0], device=device)
    call(implementation, "momentum_update_", bank, features, both, 0.2, 0.0, None)
    assert same_bits(bank, expected)


def test_zero_rows(implementation, device):
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    bank, features = torch.zeros(2, 20, device=device), torch.zeros(1, 20, device=device)
    zero = torch.tensor([0], device=device)
    call(implementation, "momentum_update_", bank, features, zero, 0.2, 0.0, skipped)
    assert skipped.item() == 1
    assert not bank.any()
    # A positive eps makes it a division like any other.
    call(implementation, "momentum_update_", bank, features, zero, 0.2, 1e-12, skipped)
    assert skipped.item() == 1
    assert not bank.any()
    features = unit_rows(1, 20, device=device)
    call(implementation, "momentum_update_", bank, features, zero, 0.2, 2.0, skipped)
    torch.testing.assert_close(bank[:1], 0.8 * features / 2.0)


def test_empty_batch_and_empty_rows(implementation, device):
    bank = unit_rows(3, 4, device=device)
    before = bank.clone()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    call(implementation, "momentum_update_", bank, bank[:0].clone(), none, 0.2, 0.0, None)
    assert same_bits(bank, before)
    thin = torch.zeros(3, 0, device=device)
    two = torch.tensor([0, 1], device=device)
    call(implementation, "momentum_update_", thin, thin[:2].clone(), two, 0.2, 0.0, None)
    assert thin.shape == (3, 0)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_index_out_of_range_raises_and_changes_nothing(implementation, bad, dtype):
    bank = unit_rows(10, 8, dtype=dtype)
    before = bank.clone()
    features = unit_rows(3, 8, dtype=dtype)
    indices = torch.tensor([1, 2, bad])
    with pytest.raises(IndexError, match=rf"\[0, 10\) \(got {bad} at batch position 2\)"):
        momentum_update_(bank, features, indices, 0.2)
    # The op alone, as torch.compile calls it, is as careful.
    with pytest.raises((IndexError, RuntimeError), match=rf"\[0, 10\) \(got {bad} at batch"):
        call(implementation, "momentum_update_", bank, features, indices, 0.2, 0.0, None)
    assert same_bits(bank, before)


def test_an_empty_bank_has_no_row_to_update():
    with pytest.raises(IndexError, match=r"\[0, 0\) \(got 0"):
        momentum_update_(torch.zeros(0, 4), torch.ones(1, 4), torch.tensor([0]), 0.2)


BANK, FEATURES, INDICES = torch.ones(4, 3), torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], FEATURES, INDICES, 0.2), TypeError, "bank must be a tensor or an array .got list"),
        (
            (torch.ones(4), FEATURES, INDICES, 0.2),
            ValueError,
            r"bank must be 2-D .got shape \(4,\)",
        ),
        (
            (BANK.double(), FEATURES, INDICES, 0.2),
            TypeError,
            "bank must be float32 or .*got float64",
        ),
        ((BANK, FEATURES.long(), INDICES, 0.2), TypeError, "features must be .*got int64"),
        ((BANK, FEATURES, INDICES.int(), 0.2), TypeError, "indices must be int64 .got int32"),
        ((BANK, FEATURES, INDICES.view(1, 2), 0.2), ValueError, "indices must be 1-D"),
        (
            (BANK, FEATURES[:1], INDICES, 0.2),
            ValueError,
            r"features must have shape \(2, 3\).*\(1, 3\)",
        ),
        (
            (BANK, FEATURES[:, :2], INDICES, 0.2),
            ValueError,
            r"features must have shape \(2, 3\).*\(2, 2\)",
        ),
        (
            (BANK.t().contiguous().t(), FEATURES, INDICES, 0.2),
            ValueError,
            "bank .* contiguous .got strides",
        ),
        ((BANK, FEATURES, INDICES, 1.5), ValueError, r"momentum must be in \[0, 1\] .got 1.5"),
        ((BANK, FEATURES, INDICES, -0.1), ValueError, "momentum must be"),
        ((BANK, FEATURES, INDICES, float("nan")), ValueError, "momentum must be .*got nan"),
        ((BANK, FEATURES, INDICES, "0.2"), TypeError, "momentum must be a number .got str"),
        ((BANK.to("meta"), FEATURES, INDICES, 0.2), ValueError, "one device .got bank on meta"),
        (
            (BANK.clone().requires_grad_(), FEATURES, INDICES, 0.2),
            ValueError,
            "not require a gradient",
        ),
    ],
)
def test_update_refuses(arguments, error, message):
    with pytest.raises(error, match="momentum_update_: .*" + message):
        momentum_update_(*arguments)


def test_update_refuses_bad_keyword_values():
    for eps in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eps must be finite and >= 0"):
            momentum_update_(BANK.clone(), FEATURES, INDICES, 0.2, eps=eps)
    with pytest.raises(TypeError, match="skipped must be int64"):
        momentum_update_(BANK.clone(), FEATURES, INDICES, 0.2, skipped=torch.zeros(1))
    with pytest.raises(ValueError, match=r"skipped must have shape \(1,\)"):
        momentum_update_(
            BANK.clone(), FEATURES, INDICES, 0.2, skipped=torch.zeros(2, dtype=torch.int64)
        )


# ---- momentum_update_: the checklist ----


def test_update_same_bits_twice_and_for_any_thread_count():
    bank = unit_rows(300, 256)
    features, indices = batch(300, 500, 256)

    def run():
        return momentum_update_(bank.clone(), features, indices, 0.2)

    checks.same_bits_twice(run)
    checks.for_any_thread_count(run)


def test_update_bumps_the_version_counter(device):
    """Autograd must notice that a bank saved for backward was changed."""
    bank = unit_rows(4, 8, device=device)
    features = unit_rows(2, 8, device=device).requires_grad_()
    similarity = (features @ bank.T).sum()
    momentum_update_(bank, features, torch.tensor([0, 1], device=device), 0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        similarity.backward()


def test_update_takes_features_that_require_grad(device):
    bank = unit_rows(4, 8, device=device)
    features = unit_rows(2, 8, device=device).requires_grad_()
    out = momentum_update_(bank, features, torch.tensor([0, 1], device=device), 0.2)
    assert out is bank
    assert not bank.requires_grad


@pytest.mark.parametrize("name", sorted(_ops.OPS))
def test_opcheck(name, device):
    checks.opcheck(name, _ops.OPS[name].sample(device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_update_compiles_as_one_graph(device, backend):
    def step(bank, features, indices):
        momentum_update_(bank, features * 2, indices, 0.2, eps=1e-6)
        return bank + 1

    bank = unit_rows(10, 16, device=device)
    arguments = [(bank, *batch(10, 6, 16, seed=s, device=device)) for s in (1, 2, 3)]
    checks.compiles_fullgraph(step, *arguments, backend=backend)


def test_update_under_autocast(device):
    bank = unit_rows(10, 16, device=device)
    features, indices = batch(10, 6, 16, device=device)
    expected = momentum_update_(bank.clone(), features, indices, 0.2)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = momentum_update_(bank, features, indices, 0.2)
    assert got.dtype == torch.float32
    assert same_bits(got, expected)


@needs_cuda
def test_update_on_cuda_streams_and_graphs():
    bank = unit_rows(1000, 2048, device="cuda")
    features, indices = batch(1000, 256, 2048, device="cuda")
    expected = momentum_update_(bank.clone(), features, indices, 0.2)
    checks.on_side_stream(lambda: momentum_update_(bank.clone(), features, indices, 0.2), expected)
    checks.no_host_synchronisation(lambda: momentum_update_(bank.clone(), features, indices, 0.2))
    target = bank.clone()
    graph = checks.captured_in_graph(lambda: momentum_update_(target, features, indices, 0.2))
    target.copy_(bank)
    graph.replay()
    assert same_bits(target, expected)
    other_features, other_indices = batch(1000, 256, 2048, seed=7, device="cuda")
    features.copy_(other_features)
    indices.copy_(other_indices)
    target.copy_(bank)
    graph.replay()
    again = momentum_update_(bank.clone(), other_features, other_indices, 0.2)
    assert same_bits(target, again)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_update_on_a_device_that_is_not_current():
    bank = unit_rows(10, 64, device="cuda:1")
    features, indices = batch(10, 8, 64, device="cuda:1")
    expected = momentum_update_(bank.cpu(), features.cpu(), indices.cpu(), 0.2)
    with torch.cuda.device(0):
        assert same_bits(momentum_update_(bank, features, indices, 0.2), expected)


# ---- prototypes ----


def labels_for(n, k, *, seed=0, outliers=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1 if outliers else 0, k, (n,), generator=generator)


def loop_prototypes(bank, labels, k):
    out = torch.zeros(k, bank.shape[1], dtype=torch.float64)
    for c in range(k):
        members = bank[labels == c].double()
        if len(members):
            out[c] = members.mean(0)
    return out


@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (7, 3, 5), (60, 9, 130), (300, 40, 2048), (50, 60, 33)]
)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_prototypes_are_the_means(device, n, k, d, dtype):
    bank, labels = unit_rows(n, d, dtype=dtype), labels_for(n, k)
    got = prototypes(bank.to(device), labels.to(device), k)
    assert got.dtype == dtype
    assert got.shape == (k, d)
    truth = loop_prototypes(bank, labels, k)
    plain = torch.stack(
        [bank[labels == c].mean(0) if (labels == c).any() else bank.new_zeros(d) for c in range(k)]
    )
    checks.no_worse_than_plain(got.cpu(), plain, truth, slack=1.05 if dtype.itemsize == 2 else 3.0)
    reference = call("reference", "segment_mean", bank, *call("reference", "class_csr", labels, k))
    assert same_bits(got, reference)


@pytest.mark.parametrize("members", [255, 256, 257, 600, 5000])
def test_prototypes_of_one_giant_class(implementation, device, members):
    """Runs of 256 rows, and the split of giant classes over threads, keep the stated order."""
    bank = unit_rows(members + 3, 600)
    labels = torch.zeros(members + 3, dtype=torch.int64)
    labels[[0, 100, members]] = -1
    rows = bank[labels == 0].numpy()
    total = np.zeros(600, np.float32)
    for start in range(0, len(rows), 256):
        part = np.zeros(600, np.float32)
        for row in rows[start : start + 256]:
            part += row
        total += part
    expected = torch.from_numpy(total / np.float32(members)).unsqueeze(0)
    lists = call(implementation, "class_csr", labels.to(device), 1)
    got = call(implementation, "segment_mean", bank.to(device), *lists)
    assert same_bits(got, expected)


def test_prototypes_count_classes_themselves(device):
    bank = unit_rows(5, 4, device=device)
    labels = torch.tensor([0, 3, -1, 3, 1], device=device)
    got = prototypes(bank, labels)
    assert got.shape == (4, 4)
    assert not got[2].any()
    assert prototypes(bank, torch.full((5,), -1, device=device)).shape == (0, 4)
    assert prototypes(bank[:0], labels[:0]).shape == (0, 4)
    assert prototypes(bank[:0], labels[:0], 3).shape == (3, 4)


def test_normalized_prototypes(device):
    bank, labels = unit_rows(40, 65, device=device), labels_for(40, 5).to(device)
    labels[labels == 4] = -1
    got = prototypes(bank, labels, 5, normalize=True)
    torch.testing.assert_close(got[:4].norm(dim=1), torch.ones(4, device=device))
    assert not got[4].any()
    mean = prototypes(bank, labels, 5)
    torch.testing.assert_close(got[:4], mean[:4] / mean[:4].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_prototypes(device, normalize):
    bank = unit_rows(9, 4, dtype=torch.float64, device=device).requires_grad_()
    labels = torch.tensor([0, 2, 2, -1, 0, 0, 2, -1, 1], device=device)

    def function(b):
        return prototypes(b, labels, 3, normalize=normalize)

    assert torch.autograd.gradcheck(function, (bank,))
    assert torch.autograd.gradgradcheck(function, (bank,))


def test_gradient_of_prototypes_equals_the_reference(implementation, device):
    labels = labels_for(70, 8).to(device)
    lists = call(implementation, "class_csr", labels, 8)
    for dtype in (*FLOATS, torch.float64):
        grad = unit_rows(8, 130, seed=4, dtype=dtype, device=device)
        got = call(implementation, "segment_mean_backward", grad, *lists)
        counts = torch.bincount(labels[labels >= 0], minlength=8)
        for i, c in enumerate(labels.tolist()):
            wide = grad[c].to(torch.promote_types(dtype, torch.float32))
            expected = (wide / counts[c]).to(dtype) if c >= 0 else torch.zeros_like(got[i])
            assert same_bits(got[i], expected)


def test_prototypes_without_gradient_make_no_graph(device):
    bank, labels = unit_rows(5, 4, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    assert not prototypes(bank, labels).requires_grad
    assert prototypes(bank.requires_grad_(), labels).requires_grad


def test_prototypes_of_strided_rows(implementation, device):
    wide = unit_rows(20, 24, device=device)
    labels = labels_for(20, 4).to(device)
    lists = call(implementation, "class_csr", labels, 4)
    strided = call(implementation, "segment_mean", wide[:, ::3], *lists)
    dense = call(implementation, "segment_mean", wide[:, ::3].contiguous(), *lists)
    assert same_bits(strided, dense)


def test_prototypes_same_bits_twice_and_for_any_thread_count():
    bank, labels = unit_rows(9000, 300), labels_for(9000, 200)
    labels[:4500] = 7
    checks.same_bits_twice(lambda: prototypes(bank, labels))
    checks.for_any_thread_count(lambda: prototypes(bank, labels))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_prototypes_compile_as_one_graph(device, backend):
    labels = labels_for(30, 6).to(device)

    def function(bank):
        return prototypes(bank * 2, labels, 6)

    bank = unit_rows(30, 16, device=device)
    checks.compiles_fullgraph(
        function, (bank,), (unit_rows(30, 16, seed=8, device=device),), backend=backend
    )
    checks.compiles_with_backward(function, bank, backend)


def test_prototypes_compiled_without_a_class_count_say_so(device):
    compiled = torch.compile(prototypes, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"pass num_classes under torch\.compile"):
        compiled(unit_rows(3, 4, device=device), torch.zeros(3, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4), INDICES), ValueError, "bank must be 2-D"),
        ((torch.ones(4, 2).int(), torch.zeros(4).long()), TypeError, "bank must be .*got int32"),
        ((torch.ones(4, 2), torch.zeros(4)), TypeError, "labels must be int64 .got float32"),
        ((torch.ones(4, 2), INDICES), ValueError, r"labels must have shape \(4,\).*got \(2,\)"),
        ((torch.ones(2, 2), torch.tensor([0, -2])), ValueError, r"\[-1, 1\) .got -2 at row 1"),
        ((torch.ones(2, 2), torch.tensor([0, 5]), 5), ValueError, r"\[-1, 5\) .got 5 at row 1"),
        ((torch.ones(2, 2), INDICES, -1), ValueError, "num_classes must be >= 0 .got -1"),
        ((torch.ones(2, 2), INDICES, 2.0), TypeError, "num_classes must be an integer .got float"),
        ((torch.ones(2, 2, device="meta"), INDICES), ValueError, "one device"),
        ((None, INDICES), TypeError, "bank must be a tensor or an array .got NoneType"),
    ],
)
def test_prototypes_refuse(arguments, error, message):
    with pytest.raises(error, match="prototypes: .*" + message):
        prototypes(*arguments)


@needs_cuda
def test_prototypes_on_cuda_streams_and_graphs():
    bank, labels = unit_rows(500, 2048, device="cuda"), labels_for(500, 30).cuda()
    expected = prototypes(bank, labels, 30)
    checks.on_side_stream(lambda: prototypes(bank, labels, 30), expected)
    out = torch.empty_like(expected)
    graph = checks.captured_in_graph(lambda: out.copy_(prototypes(bank, labels, 30)))
    bank.copy_(unit_rows(500, 2048, seed=3))
    graph.replay()
    assert same_bits(out, prototypes(bank, labels, 30))


# ---- arrays ----


def test_numpy_in_numpy_out_without_copies():
    bank = unit_rows(6, 5).numpy()
    features, indices = batch(6, 4, 5)
    expected = momentum_update_(torch.from_numpy(bank.copy()), features, indices, 0.2)
    out = momentum_update_(bank, features.numpy(), indices.numpy(), 0.2)
    assert out is bank
    np.testing.assert_array_equal(bank, expected.numpy())
    labels = np.array([0, 1, 1, -1, 0, 2])
    means = prototypes(bank, labels)
    assert isinstance(means, np.ndarray)
    np.testing.assert_array_equal(means, prototypes(expected, torch.from_numpy(labels)).numpy())


def test_numpy_labels_join_a_torch_bank(device):
    bank = unit_rows(4, 5, device=device)
    means = prototypes(bank, np.array([0, 0, 1, -1]))
    assert isinstance(means, torch.Tensor)
    assert means.device.type == device.type


def test_arrays_that_cannot_be_changed_in_place():
    features, indices = np.ones((1, 3), np.float32), np.array([0])
    frozen = np.ones((2, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"momentum_update_: bank .* writable"):
        momentum_update_(frozen, features, indices, 0.2)
    with pytest.raises(ValueError, match=r"momentum_update_: bank .* contiguous"):
        momentum_update_(np.ones((2, 3), np.float32)[::-1], features, indices, 0.2)
    with pytest.raises(ValueError, match=r"momentum_update_: bank .* contiguous"):
        momentum_update_(np.ones((3, 2), np.float32).T, features, indices, 0.2)
    with pytest.raises(TypeError, match=r"momentum_update_: bank must be .*float64"):
        momentum_update_(np.ones((2, 3)), features, indices, 0.2)
    with pytest.raises(TypeError, match=r"momentum_update_: bank has an unsupported dtype"):
        momentum_update_(np.array([["a"]]), features, indices, 0.2)


def test_frozen_and_reversed_arrays_are_fine_as_inputs():
    features = np.ones((2, 3), np.float32)[::-1]
    indices = np.array([1, 0])
    indices.flags.writeable = False
    bank = np.eye(2, 3, dtype=np.float32)
    momentum_update_(bank, features, indices, 0.0)
    np.testing.assert_allclose(bank, np.full((2, 3), 3**-0.5), rtol=1e-6)


@needs_cuda
def test_cupy_in_cupy_out_without_copies():
    cupy = pytest.importorskip("cupy")
    bank = unit_rows(6, 5, device="cuda")
    features, indices = batch(6, 4, 5, device="cuda")
    expected = momentum_update_(bank.clone(), features, indices, 0.2)
    array = cupy.from_dlpack(bank)
    out = momentum_update_(array, cupy.from_dlpack(features), cupy.from_dlpack(indices), 0.2)
    assert out is array
    assert same_bits(bank, expected)
    means = prototypes(array, cupy.asarray([0, 1, 1, -1, 0, 2]))
    assert isinstance(means, cupy.ndarray)


@needs_cuda
def test_a_cupy_stream_waits_for_what_is_done_to_its_array():
    cupy = pytest.importorskip("cupy")
    bank = unit_rows(6, 5, device="cuda")
    features, indices = batch(6, 4, 5, device="cuda")
    expected = momentum_update_(bank.clone(), features, indices, 0.2)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        arrays = [cupy.from_dlpack(each) for each in (bank, features, indices)]
        torch.cuda._sleep(20_000_000)  # before the update, on torch's stream
        momentum_update_(*arrays, 0.2)
        got = arrays[0].copy()
        arrays[1].fill(0)
    assert same_bits(torch.from_dlpack(got), expected)


# ---- MemoryBank ----


def filled_bank(device="cpu", *, n=40, d=36, **options):
    bank = MemoryBank(n, d, device=device, **options)
    bank.init(unit_rows(n, d, device=device))
    bank.set_labels(torch.arange(n, device=device) % 7 - 1)
    return bank


def assert_current(bank):
    """The prototypes are the means of their members, to the bit."""
    expected = call(
        "reference",
        "segment_mean",
        bank.features,
        *call("reference", "class_csr", bank.proto_of, len(bank.prototypes)),
    )
    assert same_bits(bank.prototypes, expected)


def test_bank_keeps_its_prototypes_current(device):
    bank = filled_bank(device)
    assert_current(bank)
    for step in range(5):
        features, indices = batch(40, 16, 36, seed=step, device=device)
        expected = momentum_update_(bank.features.clone(), features, indices, 0.2)
        before = bank.prototypes.clone()
        bank.update_(features, indices)
        assert same_bits(bank.features, expected)
        assert not same_bits(bank.prototypes, before)
        assert_current(bank)


def test_bank_with_normalized_prototypes(device):
    bank = filled_bank(device, normalize_prototypes=True)
    for step in range(3):
        bank.update_(*batch(40, 16, 36, seed=step, device=device))
        expected = prototypes(bank.features, bank.proto_of, normalize=True)
        torch.testing.assert_close(bank.prototypes, expected, rtol=1e-6, atol=1e-7)


def test_bank_numbers_clusters_first_then_outliers():
    bank = MemoryBank(6, 4)
    bank.init(unit_rows(6, 4))
    bank.set_labels(torch.tensor([-1, 1, 0, -1, 1, -1]))
    assert bank.proto_of.tolist() == [2, 1, 0, 3, 1, 4]
    assert bank.class_sizes.tolist() == [1, 2, 1, 1, 1]
    assert bank.num_clusters == 2
    assert bank.prototypes.shape == (5, 4)
    assert same_bits(bank.prototypes[3], bank.features[3])


@pytest.mark.parametrize("labels", [[-1] * 4, [0] * 4, [3, 2, 1, 0]])
def test_bank_with_all_outliers_or_one_cluster(labels):
    bank = MemoryBank(4, 5)
    bank.init(unit_rows(4, 5))
    bank.set_labels(torch.tensor(labels))
    assert len(bank.prototypes) == len(set(bank.proto_of.tolist()))
    bank.update_(*batch(4, 3, 5))
    assert_current(bank)


def test_bank_restored_from_its_state_goes_on_bit_for_bit(tmp_path, device):
    bank = filled_bank(device)
    for step in range(3):
        bank.update_(*batch(40, 16, 36, seed=step, device=device))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    restored = MemoryBank(40, 36, device=device)
    restored.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    other = filled_bank(device)
    other.set_labels(torch.arange(40, device=device) // 2)
    other.load_state_dict(bank.state_dict())
    for step in range(3, 6):
        for each in (bank, restored, other):
            each.update_(*batch(40, 16, 36, seed=step, device=device))
    for each in (restored, other):
        assert each.num_clusters == bank.num_clusters
        for name, value in bank.state_dict().items():
            assert torch.equal(each.state_dict()[name], value), name
    assert_current(restored)


def test_bank_state_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for features"):
        MemoryBank(10, 36).load_state_dict(filled_bank().state_dict())


def test_bank_before_labels():
    bank = MemoryBank(4, 5)
    with pytest.raises(RuntimeError, match=r"call set_labels"):
        _ = bank.prototypes
    with pytest.raises(RuntimeError, match=r"call set_labels"):
        _ = bank.proto_of
    with pytest.raises(RuntimeError, match="class_sizes: call set_labels"):
        _ = bank.class_sizes
    bank.update_(unit_rows(2, 5), torch.tensor([0, 3]))
    assert bank.features[0].any()
    assert not bank.features[1].any()
    fresh = MemoryBank(4, 5)
    fresh.load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match=r"call set_labels"):
        _ = fresh.prototypes


def test_bank_init_normalizes_and_refuses_bad_rows():
    bank = filled_bank(n=5, d=8)
    before = copy.deepcopy(bank.state_dict())
    for row, value in ((3, 0.0), (2, float("nan")), (4, float("inf"))):
        features = unit_rows(5, 8, seed=3)
        features[row] = value
        with pytest.raises(ValueError, match=rf"got 1 that are not, the first at row {row}"):
            bank.init(features)
        assert all(torch.equal(bank.state_dict()[k], v) for k, v in before.items())
    bank.init(7 * unit_rows(5, 8, seed=3))
    torch.testing.assert_close(bank.features, unit_rows(5, 8, seed=3))
    assert_current(bank)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3, -1]), "without gaps .got none with label 2"),
        (torch.tensor([0, 1, 9, -1]), "without gaps .got label 9 for 4 images"),
        (torch.tensor([0, -2, 1, -1]), "labels must be >= -1 .got -2"),
        (torch.tensor([0, 1]), r"labels must have shape \(4,\)"),
    ],
)
def test_bank_refuses_labels_and_keeps_the_old_ones(labels, message):
    bank = filled_bank(n=4, d=5)
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(ValueError, match=r"MemoryBank.set_labels: .*" + message):
        bank.set_labels(labels)
    assert all(torch.equal(bank.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("labels", [[2, -1, 0, 1, -1, 0], [-1] * 6, [0] * 6])
def test_bank_takes_labels_with_one_wait_for_the_device(labels):
    bank = filled_bank(n=6, d=5)
    assert checks.host_reads(lambda: bank.set_labels(torch.tensor(labels))) == ["tolist"]
    assert_current(bank)


def test_bank_update_reads_nothing_back():
    bank = filled_bank(n=6, d=5)
    features, indices = batch(6, 4, 5)
    reads = checks.host_reads(lambda: bank.update_(features, indices))
    # The range of CPU indices, for a plain error; CUDA's kernel looks at its own.
    assert reads == ["aten::_local_scalar_dense"] * 2


@pytest.mark.parametrize("implementation", ["reference", "compiled"])
def test_classes_of_listed_rows(implementation):
    rows = unit_rows(30, 12)
    class_of = torch.arange(30) % 7
    lists = call("reference", "class_csr", class_of, 7)
    touched = torch.tensor([29, 3, 8, 1, 29, 15])
    expected, got = torch.zeros(2, 7, 12)
    call("reference", "update_segment_mean_", expected, rows, *lists, class_of[touched], True)
    call(implementation, "update_segment_mean_", got, rows, *lists, touched, True, class_of)
    assert same_bits(got, expected)
    before = got.clone()
    with pytest.raises((IndexError, RuntimeError), match=r"rows must be in \[0, 30\) \(got 30"):
        call(implementation, "update_segment_mean_", got, rows, *lists, touched + 1, True, class_of)
    assert same_bits(got, before)


@pytest.mark.parametrize("k", [2**15 - 1, 2**15, 40_000])
def test_class_lists_at_the_ends_of_narrow_keys(k):
    labels = torch.tensor([k - 1, -1, 0, k, k - 2, k - 1, 2**40, -(2**40), 2**15 - 1, 2**16])
    expected = call("compiled", "class_csr", labels, k)
    got = call("reference", "class_csr", labels, k)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    inside = (labels >= 0) & (labels < k)
    assert got[1][-1] == inside.sum()


def test_update_of_tensors_of_inference_mode():
    with torch.inference_mode():
        bank = unit_rows(4, 8)
        features, indices = batch(4, 6, 8)
        expected = torch.zeros(4, 8).copy_(bank)
        call("reference", "momentum_update_", expected, features, indices, 0.2, 0.0, None)
        momentum_update_(bank, features, indices, 0.2)
        assert same_bits(bank, expected)


def test_bank_update_bumps_the_version_counters():
    bank = filled_bank(n=6, d=5)
    versions = [bank.features._version, bank.prototypes._version, bank.skipped._version]
    bank.update_(*batch(6, 4, 5))
    after = [bank.features._version, bank.prototypes._version, bank.skipped._version]
    assert all(b > a for a, b in zip(versions, after, strict=True))


def test_bank_takes_numpy_labels_and_int32():
    bank = MemoryBank(4, 5)
    bank.init(unit_rows(4, 5).numpy())
    bank.set_labels(np.array([0, 0, -1, 1], np.int32))
    assert bank.proto_of.tolist() == [0, 0, 2, 1]
    with pytest.raises(TypeError, match=r"labels must be int64 or int32 .got float32"):
        bank.set_labels(torch.zeros(4))


def test_a_bad_index_leaves_bank_and_prototypes():
    bank = filled_bank(n=6, d=5)
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(IndexError, match="got 6"):
        bank.update_(unit_rows(2, 5), torch.tensor([0, 6]))
    assert all(torch.equal(bank.state_dict()[k], v) for k, v in before.items())


def test_bank_counts_skipped_updates(device):
    bank = filled_bank(device)
    features, indices = batch(40, 4, 36, device=device)
    features[2] = float("nan")
    bank.update_(features, indices)
    assert bank.skipped.item() == 1
    assert bank.features.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"num_samples": 0}, {"num_features": True}, {"momentum": 2.0}, {"eps": -1.0}]
)
def test_bank_refuses_options(options):
    with pytest.raises(ValueError, match=r"MemoryBank: " + next(iter(options))):
        MemoryBank(**{"num_samples": 4, "num_features": 5, **options})


def test_bank_refuses_a_double_dtype():
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
        MemoryBank(4, 5, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bank_in_half_precision(device, dtype):
    bank = filled_bank(device, dtype=dtype)
    bank.update_(*batch(40, 16, 36, device=device))
    assert bank.prototypes.dtype == dtype
    assert_current(bank)


def test_bank_update_compiles_as_one_graph(device):
    banks = [filled_bank(device), filled_bank(device)]
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(features, indices):
        banks[0].update_(features, indices)
        return banks[0].prototypes.sum()

    for seed in (1, 2):
        features, indices = batch(40, 16, 36, seed=seed, device=device)
        got = compiled(features, indices)
        banks[1].update_(features, indices)
        assert got == banks[1].prototypes.sum()
        assert same_bits(banks[0].features, banks[1].features)
        assert same_bits(banks[0].prototypes, banks[1].prototypes)


def test_bank_moves_with_to(device):
    bank = filled_bank().to(device)
    bank.update_(*batch(40, 16, 36, device=device))
    assert_current(bank)
    assert "40 x 36" in repr(bank)
    if device.type == "cuda":
        with pytest.raises(ValueError, match="features must be on the bank's device cuda"):
            bank.update_(*batch(40, 16, 36))


@needs_cuda
def test_bank_update_on_cuda_does_not_wait_and_can_be_captured():
    bank = filled_bank("cuda", n=1000, d=2048)
    twin = copy.deepcopy(bank)
    features, indices = batch(1000, 64, 2048, device="cuda")
    checks.no_host_synchronisation(lambda: bank.update_(features, indices))
    checks.captured_in_graph(lambda: bank.update_(features, indices)).replay()
    for _ in range(3):
        twin.update_(features, indices)
    assert same_bits(bank.features, twin.features)
    assert same_bits(bank.prototypes, twin.prototypes)


# ---- properties ----


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 140),
    indices=st.lists(st.integers(0, 11), max_size=30),
    momentum=st.floats(0, 1),
    split=st.integers(0, 30),
)
def test_splitting_a_batch_changes_nothing(n, d, indices, momentum, split):
    rows = torch.tensor([i % n for i in indices], dtype=torch.int64)
    features = unit_rows(len(rows), d, seed=1)
    at_once, in_two = unit_rows(n, d), unit_rows(n, d)
    momentum_update_(at_once, features, rows, momentum)
    for part in (slice(None, split), slice(split, None)):
        momentum_update_(in_two, features[part], rows[part], momentum)
    assert same_bits(at_once, in_two)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-1, 6), min_size=1, max_size=60), extra=st.integers(0, 3))
def test_class_lists_hold_every_row_once(labels, extra):
    k = max(labels) + 1 + extra
    got = call("compiled", "class_csr", torch.tensor(labels), k)
    expected = call("reference", "class_csr", torch.tensor(labels), k)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    members, offsets = (t.tolist() for t in got)
    assert sorted(members) == list(range(len(labels)))
    for c in range(k):
        assert members[offsets[c] : offsets[c + 1]] == [
            i for i, label in enumerate(labels) if label == c
        ]


def test_the_compiled_library_is_what_was_tested():
    """Guards the suite: with a compiler at hand these tests must not all run on the reference."""
    from dhcl_ops import _build

    if dhcl_ops.status().reason == "DHCL_BUILD=off":
        pytest.skip("DHCL_BUILD=off asks for the reference")
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert dhcl_ops.status().how in {"built", "prebuilt"}, dhcl_ops.status().line
    assert all(op.compiled("cpu") for op in _ops.OPS.values() if not op.composed)


def test_the_least_similar_feature_of_each_row_is_chosen():
    bank = unit_rows(5, 6)
    features, rows = batch(5, 20, 6)
    features[[3, 11]] = features[[7, 7]]  # equal ones: the first counts
    rows[[3, 11]] = rows[[7, 7]]
    chosen = least_similar(features, rows, bank)
    expected = []
    for row in rows.unique().tolist():
        positions = (rows == row).nonzero().flatten().tolist()
        expected.append(min(positions, key=lambda i: float((features[i] * bank[row]).sum())))
    assert chosen.nonzero().flatten().tolist() == sorted(expected)
    assert not least_similar(features[:0], rows[:0], bank).any()
