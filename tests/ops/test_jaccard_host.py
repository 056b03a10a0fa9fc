"""csrc/jaccard.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from tests.ops.stages import check, random_sets, run

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "hub or block"


def test_a_hub_that_all_rows_hold(kernels):
    """Column 0 is everybody's; the lists behind the head are left out."""
    n = 40
    rows, columns, values = [0], [], []
    for i in range(n):
        own = sorted({0, 1 + i % 13, 14 + (i * 7) % 20, 34 + i % 5})
        columns += own
        values += [0.4] + [0.6 / (len(own) - 1)] * (len(own) - 1)
        rows.append(len(columns))
    csr = (torch.tensor(rows), torch.tensor(columns).int(), torch.tensor(values))
    for eps in (0.3, 0.5, 0.9):
        index = check(kernels, "inverted_index", *csr, eps)
        upper = check(kernels, "jaccard_join", *csr, *index, eps, 0, n)
        assert len(upper[1]) >= n
        check(kernels, "jaccard_join", *csr, *index, eps, 0, n, cells=16, capacity=1)
        check(kernels, "mirror_csr", *upper)


@pytest.mark.parametrize("eps", [0.05, 0.5, 0.7, 0.97])
def test_join_of_random_sets(kernels, eps):
    rows = random_sets(50, 12, seed=int(100 * eps))
    index = check(kernels, "inverted_index", *rows, eps)
    check(kernels, "jaccard_join", *rows, *index, eps, 0, 50)
    check(kernels, "jaccard_join", *rows, *index, eps, 7, 31, cells=16)


def test_index_of_rows_longer_than_a_block(host):
    rows = random_sets(300, 290, seed=1)
    rows = tuple(part[: 41 if place == 0 else rows[0][40]] for place, part in enumerate(rows))
    # The columns reach past the 40 rows left, so 260 empty ones follow.
    offsets = torch.cat([rows[0], rows[0][-1:].expand(260)]).contiguous()
    csr = (offsets, rows[1].clone(), rows[2].clone())
    check(host, "inverted_index", *csr, 0.6)


def test_sort_of_a_line_longer_than_shared_memory(host):
    n = 1500
    offsets = torch.cat([torch.tensor([0]), torch.full((n,), n)])
    columns = torch.arange(n).int()
    values = torch.rand(n, generator=torch.Generator().manual_seed(1))
    check(host, "mirror_csr", offsets, columns, values)


def test_what_is_out_of_range_is_reported(host):
    csr = (torch.tensor([0, 1, 2]), torch.tensor([1, 2]).int(), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"inverted_index: columns .* \(got 2\)"):
        run(host, "inverted_index", *csr, 0.5)
    lower = (torch.tensor([0, 1, 2]), torch.tensor([0, 0]).int(), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"mirror_csr: columns .* \(got 0 in row 1\)"):
        run(host, "mirror_csr", *lower)
