"""csrc/reciprocal.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from tests.ops.stages import check, identities, k_reciprocal, ranked, run

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "repeats or softmax or width"


@pytest.mark.parametrize("d", [1, 3, 127, 128, 132, 260])
def test_pair_dots_of_any_width(host, d):
    features = identities(9, d)
    similarities, ranks = ranked(features, 4)
    offsets = torch.arange(0, 9 * 9 + 1, 9)
    columns = torch.arange(9).repeat(9).int()
    check(host, "pair_dots", features, ranks, None, offsets, columns, 0)
    check(host, "pair_dots", features, ranks, similarities + 1.0, offsets, columns, 0)
    storage = torch.cat([torch.zeros(1), features.flatten()])
    check(host, "pair_dots", storage[1:].view(9, d), ranks, None, offsets, columns, 0)


def test_lists_longer_than_a_warp(kernels):
    features = identities(44, 16, noise=0.3)
    _, ranks = ranked(features, 40)
    positions = check(kernels, "reciprocal_positions", ranks)
    for k, half in [(40, 36), (33, 33), (40, 1)]:
        k_reciprocal(kernels, ranks, positions, k, half, 0, 44)


def test_ranks_with_repeats_and_without_the_row_itself(kernels):
    generator = torch.Generator().manual_seed(5)
    ranks = torch.randint(0, 20, (20, 9), generator=generator).int()
    positions = check(kernels, "reciprocal_positions", ranks)
    k_reciprocal(kernels, ranks, positions, 9, 5, 0, 20)


def test_softmax_of_long_short_and_empty_rows(kernels):
    offsets = torch.tensor([0, 0, 1, 70, 70, 75])
    generator = torch.Generator().manual_seed(4)
    logits = -10.0 * torch.rand(75, generator=generator)
    check(kernels, "softmax_rows", offsets, logits)


def test_what_is_out_of_range_is_reported(host):
    ranks = torch.tensor([[0, 1], [1, 7]]).int()
    with pytest.raises(RuntimeError, match=r"\[0, 2\) \(got 7 in row 1\)"):
        run(host, "reciprocal_positions", ranks)
