"""csrc/memory.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import numpy as np
import pytest
import torch

from tests.checks import call, same_bits
from tests.ops.test_memory import FLOATS, batch, unit_rows

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "momentum_update or segment_mean or empty or listed or every or 0-130 or False-dtype0"

CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def as_array(t):
    """A NumPy view of the tensor's memory; 16-bit floats as their bits."""
    assert t.is_contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


def host_update(host, bank, features, indices, momentum, eps=0.0, skipped=None):
    host.momentum_update(
        as_array(bank),
        as_array(features),
        indices.numpy(),
        momentum,
        1.0 - momentum,
        eps,
        None if skipped is None else skipped.numpy(),
        CODE[bank.dtype],
        CODE[features.dtype],
    )
    return bank


@pytest.mark.parametrize(
    ("n", "b", "d"),
    [(1, 1, 1), (7, 5, 3), (5, 40, 127), (16, 9, 128), (9, 33, 130), (3, 70, 516)],
)
@pytest.mark.parametrize("bank_dtype", FLOATS)
@pytest.mark.parametrize("feature_dtype", FLOATS)
def test_momentum_update(kernels, n, b, d, bank_dtype, feature_dtype):
    bank = unit_rows(n, d, dtype=bank_dtype)
    features, indices = batch(n, b, d, dtype=feature_dtype)
    if b > 3:
        features[b // 2, d - 1] = float("nan")
    skipped, expected_skipped = torch.zeros(2, 1, dtype=torch.int64)
    expected = bank.clone()
    arguments = (features, indices, 0.2, 0.0, expected_skipped)
    call("reference", "momentum_update_", expected, *arguments)
    got = host_update(kernels, bank.clone(), features, indices, 0.2, skipped=skipped)
    assert same_bits(got, expected)
    assert skipped == expected_skipped


@pytest.mark.parametrize("bank_dtype", FLOATS)
def test_momentum_update_of_rows_longer_than_registers(kernels, bank_dtype):
    bank = unit_rows(3, 2100, dtype=bank_dtype)
    features, indices = batch(3, 6, 2100)
    features[2, 2099] = float("inf")
    skipped, expected_skipped = torch.zeros(2, 1, dtype=torch.int64)
    expected = bank.clone()
    arguments = (features, indices, 0.2, 0.0, expected_skipped)
    call("reference", "momentum_update_", expected, *arguments)
    got = host_update(kernels, bank, features, indices, 0.2, skipped=skipped)
    assert same_bits(got, expected)
    assert skipped == expected_skipped == 1


def test_momentum_update_across_chunks(host):
    bank = unit_rows(6, 4)
    features, indices = batch(6, 4100, 4)
    expected = bank.clone()
    call("reference", "momentum_update_", expected, features, indices, 0.9, 0.0, None)
    assert same_bits(host_update(host, bank, features, indices, 0.9), expected)


def test_momentum_update_on_unaligned_rows(kernels):
    storage = unit_rows(1, 6 * 8 + 1).flatten()
    bank = storage[1:].view(6, 8)
    features, indices = batch(6, 9, 8)
    expected = bank.clone()
    call("reference", "momentum_update_", expected, features, indices, 0.2, 0.0, None)
    assert same_bits(host_update(kernels, bank, features, indices, 0.2), expected)


def test_momentum_update_with_eps_and_zero_rows(kernels):
    bank = torch.zeros(2, 40)
    features = torch.zeros(2, 40)
    features[1] = 1e-3
    indices = torch.tensor([0, 1])
    for eps in (0.0, 1e-6, 5.0):
        expected = bank.clone()
        call("reference", "momentum_update_", expected, features, indices, 0.2, eps, None)
        got = host_update(kernels, bank.clone(), features, indices, 0.2, eps)
        assert same_bits(got, expected)


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_momentum_update_reports_an_index_out_of_range(host, bad):
    features, indices = batch(6, 3, 8)
    indices[1] = bad
    with pytest.raises(RuntimeError, match=rf"\[0, 6\) \(got {bad} at batch position 1\)"):
        host_update(host, unit_rows(6, 8), features, indices, 0.2)


def test_empty_launches(host):
    none = torch.zeros(0, dtype=torch.int64)
    bank = unit_rows(3, 4)
    assert same_bits(host_update(host, bank.clone(), bank[:0].clone(), none, 0.2), bank)
    thin = torch.zeros(3, 0)
    two = torch.tensor([0, 1])
    host_update(host, thin, thin[:2].clone(), two, 0.2)
    host.segment_mean(
        np.zeros((0, 4), np.float32),
        as_array(bank),
        none.numpy(),
        np.zeros(1, np.int64),
        None,
        False,
        0,
    )


@pytest.mark.parametrize("d", [130, 2048])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float16])
def test_one_row_256_times(kernels, d, bank_dtype):
    bank = unit_rows(3, d, dtype=bank_dtype)
    features, _ = batch(3, 256, d)
    features[[0, 7, 255], 1] = float("inf")
    indices = torch.full((256,), 1)
    expected = bank.clone()
    skipped, expected_skipped = torch.zeros(2, 1, dtype=torch.int64)
    call("reference", "momentum_update_", expected, features, indices, 0.6, 0.0, expected_skipped)
    got = host_update(kernels, bank, features, indices, 0.6, skipped=skipped)
    assert same_bits(got, expected)
    assert skipped == expected_skipped == 3


def test_a_row_that_can_only_be_left_alone_keeps_its_bits(host):
    bank = torch.full((2, 5), float("nan"))
    bank.view(torch.int32)[1] = -1  # a NaN that no arithmetic gives
    before = bank.clone()
    features, _ = batch(2, 3, 5)
    host_update(host, bank, features, torch.tensor([1, 1, 0]), 0.2)
    assert same_bits(bank.view(torch.int32), before.view(torch.int32))


def test_a_row_named_in_several_chunks_far_apart(host):
    bank = unit_rows(1100, 3)
    features, _ = batch(4, 2050, 3)
    indices = torch.arange(2050) % 1100
    indices[[0, 31, 32, 1023, 1024, 1055, 2047, 2048, 2049]] = 1099
    expected = bank.clone()
    call("reference", "momentum_update_", expected, features, indices, 0.9, 0.0, None)
    assert same_bits(host_update(host, bank, features, indices, 0.9), expected)


def host_means(
    host, rows, members, offsets, *, classes=None, normalize=False, into=None, class_of=None
):
    means = rows.new_full((len(offsets) - 1, rows.shape[1]), 7.0) if into is None else into
    host.segment_mean(
        as_array(means),
        as_array(rows),
        members.numpy(),
        offsets.numpy(),
        None if classes is None else classes.numpy(),
        normalize,
        CODE[rows.dtype],
        class_of=None if class_of is None else class_of.numpy(),
    )
    return means


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (20, 4, 3), (30, 6, 130), (12, 3, 1032)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_segment_mean_and_its_gradient(kernels, n, k, d, dtype):
    rows = unit_rows(n, d, dtype=dtype)
    labels = torch.arange(n) * 7 % (k + 2) - 1
    lists = call("reference", "class_csr", labels, k)
    expected = call("reference", "segment_mean", rows, *lists)
    assert same_bits(host_means(kernels, rows, *lists), expected)
    grad = unit_rows(k, d, seed=3, dtype=dtype)
    got = torch.full_like(rows, 7.0)
    members, offsets = (t.numpy() for t in lists)
    kernels.segment_mean_backward(as_array(got), as_array(grad), members, offsets, CODE[dtype])
    expected = call("reference", "segment_mean_backward", grad, *lists)
    assert same_bits(got, expected)


def test_segment_mean_of_a_class_longer_than_a_run(kernels):
    rows = unit_rows(600, 9)
    lists = call("reference", "class_csr", torch.zeros(600, dtype=torch.int64), 1)
    expected = call("reference", "segment_mean", rows, *lists)
    assert same_bits(host_means(kernels, rows, *lists), expected)


# Runs are of 256, and a block sums eight at a time.
SIZES = [0, 1, 257, 3, 0, 256, 700, 2049 + 256, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [5, 132])
def test_classes_of_all_sizes(kernels, dtype, normalize, d):
    labels = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    rows = unit_rows(len(labels), d, dtype=dtype)
    lists = call("reference", "class_csr", labels, len(SIZES))
    expected = rows.new_full((len(SIZES), d), 7.0)
    call("reference", "update_segment_mean_", expected, rows, *lists, None, normalize)
    assert same_bits(host_means(kernels, rows, *lists, normalize=normalize), expected)
    some = torch.tensor([6, 0, 6, 2, 7])
    before = unit_rows(len(SIZES), d, seed=8, dtype=dtype)
    got = host_means(kernels, rows, *lists, classes=some, normalize=normalize, into=before.clone())
    assert same_bits(got[some], expected[some])
    assert same_bits(got[[1, 3, 4, 5, 8]], before[[1, 3, 4, 5, 8]])


def test_every_row_its_own_class(kernels):
    rows = unit_rows(50, 130)
    lists = call("reference", "class_csr", torch.arange(50).flip(0), 50)
    assert same_bits(host_means(kernels, rows, *lists), rows.flip(0))


@pytest.mark.parametrize("normalize", [False, True])
def test_classes_of_listed_rows(kernels, normalize):
    rows = unit_rows(30, 132)
    class_of = torch.arange(30) % 7
    lists = call("reference", "class_csr", class_of, 7)
    expected, got = torch.zeros(2, 7, 132)
    touched = torch.tensor([29, 3, 8, 1, 29, 15])
    arguments = (rows, *lists, touched, normalize, class_of)
    call("reference", "update_segment_mean_", expected, *arguments)
    host_means(
        kernels, rows, *lists, classes=touched, normalize=normalize, into=got, class_of=class_of
    )
    assert same_bits(got, expected)
    assert [bool(row.any()) for row in got] == [False, True, False, True, False, False, False]
    with pytest.raises(RuntimeError, match=r"rows must be in \[0, 30\) \(got 30\)"):
        host_means(kernels, rows, *lists, classes=touched + 1, into=got, class_of=class_of)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [5, 132])
def test_update_of_listed_classes(kernels, dtype, normalize, d):
    rows = unit_rows(20, d, dtype=dtype)
    lists = call("reference", "class_csr", torch.arange(20) % 5, 6)
    before = unit_rows(6, d, seed=8, dtype=dtype)
    classes = torch.tensor([4, 1, 4, 5, 1, 4])
    expected = before.clone()
    call("reference", "update_segment_mean_", expected, rows, *lists, classes, normalize)
    got = host_means(
        kernels, rows, *lists, classes=classes, normalize=normalize, into=before.clone()
    )
    assert same_bits(got[[0, 2, 3]], before[[0, 2, 3]])
    assert same_bits(got, expected)


def test_a_class_out_of_range_is_reported(host):
    rows = unit_rows(4, 8)
    lists = call("reference", "class_csr", torch.zeros(4, dtype=torch.int64), 1)
    with pytest.raises(RuntimeError, match=r"classes must be in \[0, 1\) \(got 1\)"):
        host_means(host, rows, *lists, classes=torch.tensor([0, 1]))
