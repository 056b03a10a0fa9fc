"""csrc/jaccard.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from tests.checks import call
from tests.ops.stages import check, random_sets, run

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "hub or block or exactly or 1-300"


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


def one_list(n, seed=0):
    """Rows that hold column 0 alone: row i has all later ones as candidates."""
    values = torch.ones(n) - 1e-3 * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return torch.arange(n + 1), torch.zeros(n, dtype=torch.int32), values


@pytest.mark.parametrize(
    ("n", "large", "wide"), [(8, 0, 0), (9, 1, 0), (16, 8, 0), (17, 8, 1), (18, 8, 2), (40, 8, 24)]
)
def test_tables_are_left_exactly_where_they_are_full(kernels, n, large, wide):
    """A near table of 8 cells holds a row and 7 candidates, a large one of 16 a row and 15."""
    csr = one_list(n)
    index = check(kernels, "inverted_index", *csr, 0.5)
    kernels.paths()
    kernels.large_rows()
    tables = {"cells": 8, "large_cells": 16}
    upper = check(kernels, "jaccard_join", *csr, *index, 0.5, 0, n, **tables)
    assert len(upper[1]) == n * (n + 1) // 2
    assert (kernels.large_rows(), kernels.paths()[0]) == (large, wide)


@pytest.mark.parametrize(("n", "large"), [(4096, 0), (4097, 1)])
def test_the_near_table_as_it_is_where_it_is_full(host, n, large):
    """Probing may give up before a table of 4096 is full; a large one has room for all of them."""
    csr = one_list(n)
    index = call("reference", "inverted_index", *csr, 0.5)
    host.large_rows()
    check(host, "jaccard_join", *csr, *index, 0.5, 0, 1, large_cells=16384)
    left = host.large_rows()
    assert left >= large
    assert host.paths()[0] == 0


@pytest.mark.parametrize("size", [127, 128, 129, 300])
def test_rows_of_more_columns_than_are_laid_out_at_once(kernels, size):
    """Six rows of so many columns, shared in parts; heads end within and behind the first 128."""
    n = 2 * size
    generator = torch.Generator().manual_seed(size)
    starts = [0, 3, size // 2, size // 2 + 1, size, 0]
    columns = torch.cat([torch.arange(size) + start for start in starts]).int()
    values = torch.rand(6, size, generator=generator) + 0.05
    values[5] = values[0]
    values = (values / values.sum(1, keepdim=True)).flatten()
    offsets = torch.cat([torch.arange(7) * size, torch.full((n - 6,), 6 * size)])
    for eps in (0.2, 0.6, 0.97):
        index = call("reference", "inverted_index", offsets, columns, values, eps)
        upper = check(kernels, "jaccard_join", offsets, columns, values, *index, eps, 0, 6)
        assert 5 in upper[1][: int(upper[0][1])]
    assert index[1][:6].max() > 100  # heads, at the largest eps


def test_all_rows_one_cluster(kernels):
    csr = (
        torch.arange(41) * 3,
        torch.tensor([1, 4, 7]).repeat(40).int(),
        torch.full((120,), 1 / 3),
    )
    index = check(kernels, "inverted_index", *csr, 0.3)
    for tables in ({}, {"cells": 8, "large_cells": 32}):
        upper = check(kernels, "jaccard_join", *csr, *index, 0.3, 0, 40, **tables)
        assert len(upper[1]) == 820


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
