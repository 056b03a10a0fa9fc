"""csrc/positives.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from tests.checks import call, same_bits
from tests.ops.test_memory_host import CODE, as_array
from tests.ops.test_positives import CAMERAS, FLOATS, LABELS, made

# What reaches every line of the kernel once, for the sanitizers.
SANITIZED = "130-dtype1 or 516-dtype0 or equal"


def check(host, features, bank, indices, lists, cameras):
    expected = call("reference", "hardest_positive", features, bank, indices, *lists, cameras)
    numbers = [t.numpy() for t in (indices, *lists)]
    there = None if cameras is None else cameras.numpy()
    got = host.hardest_positive(
        as_array(features), as_array(bank), *numbers, there, CODE[bank.dtype]
    )
    assert same_bits(torch.from_numpy(got), expected)


def lists_of(memory):
    return memory.proto_of, memory._members, memory._offsets


@pytest.mark.parametrize("d", [1, 130, 516])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_any_width_and_format(kernels, d, dtype):
    memory, features, indices = made(d, dtype, batch=6)
    for cameras in (None, CAMERAS):
        check(kernels, features, memory.features, indices, lists_of(memory), cameras)


def test_equal_similarities_and_classes_longer_than_a_block_has_warps(kernels):
    memory, _, _ = made(8)
    memory.set_labels(torch.zeros_like(LABELS))
    memory.features[:] = memory.features[0]
    memory.features[[3, 11], 0] -= 0.5  # two that are equal, in one warp and another's turn
    features, indices = memory.features[:3].clone(), torch.tensor([3, 0, 14])
    for cameras in (None, CAMERAS):
        check(kernels, features, memory.features, indices, lists_of(memory), cameras)
    memory.features[:] = torch.nan
    check(kernels, features, memory.features, indices, lists_of(memory), None)


def test_unaligned_rows_and_no_rows(kernels):
    memory, features, indices = made(8, batch=5)
    storage = torch.empty(features.numel() + 1)
    shifted = storage[1:].view(features.shape).copy_(features)
    check(kernels, shifted, memory.features, indices, lists_of(memory), CAMERAS)
    check(kernels, features[:0], memory.features, indices[:0], lists_of(memory), CAMERAS)


@pytest.mark.parametrize(
    ("place", "value", "message"), [(0, 16, "indices must be"), (1, 9, "class_of must be")]
)
def test_what_is_out_of_range_is_reported(host, place, value, message):
    memory, features, indices = made(8, batch=1)
    lists = [t.clone() for t in lists_of(memory)]
    if place == 0:
        indices[0] = value
    else:
        lists[0][indices[0]] = value
    arrays = [t.numpy() for t in (features, memory.features, indices, *lists)]
    with pytest.raises(RuntimeError, match=f"hardest_positive: {message}"):
        host.hardest_positive(*arrays, None, 0)
