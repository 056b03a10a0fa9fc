"""From features to labels on the host: all stages, each against the PyTorch reference."""

import pytest
import torch

from tests.checks import call
from tests.ops.stages import check, halved, identities, k_reciprocal, ranked, weights

FAMILIES = ("reciprocal", "jaccard", "dbscan")
# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "36 or no_rows or not_fit"


def chain(host, features, k, k2, eps, min_samples, **tables):
    """Features to labels, every step both ways on the results of the step before."""
    n = len(features)
    similarities, ranks = ranked(features, min(k, n))
    k, k2 = min(k, n), min(k2, n)
    positions = check(host, "reciprocal_positions", ranks)
    lines = k_reciprocal(host, ranks, positions, k, halved(k), 0, n, **tables)
    dots = check(host, "pair_dots", features, ranks, similarities, *lines, 0)
    rows = (*lines, check(host, "softmax_rows", lines[0], 2.0 * dots - 2.0))
    if k2 > 1:
        rows = check(host, "query_expand", ranks, *rows, k2, 0, n, **tables)
    index = check(host, "inverted_index", *rows, eps)
    upper = check(host, "jaccard_join", *rows, *index, eps, 0, n, **tables)
    graph = check(host, "mirror_csr", *upper)
    check(host, "jaccard_rows", *rows, index[2], index[4], index[5], 0, n)
    return check(host, "dbscan", *graph, eps, min_samples)


@pytest.mark.parametrize(
    ("n", "k", "k2", "eps"),
    [(1, 4, 2, 0.5), (2, 2, 1, 0.5), (13, 5, 1, 0.6), (36, 7, 3, 0.6), (41, 12, 6, 0.4)],
)
def test_features_to_labels(kernels, n, k, k2, eps):
    labels = chain(kernels, identities(n, 20), k, k2, eps, 3)
    if n > 30:
        assert labels.unique().numel() > 2  # else the case shows little


def test_no_rows(host):
    none = torch.zeros(0, 4)
    labels = chain(host, none, 4, 2, 0.5, 2)
    assert len(labels) == 0


def test_duplicates(kernels):
    labels = chain(kernels, identities(30, 9, copies=12), 6, 3, 0.5, 4)
    assert labels.max() >= 1


def test_rows_that_do_not_fit_in_tables_and_pools(kernels):
    features = identities(36, 20)
    kernels.paths()
    chain(kernels, features, 9, 4, 0.6, 3, cells=8, capacity=10)
    wide, second = kernels.paths()
    assert wide > 36
    assert second == 3
    # Between the extremes some rows fit.
    chain(kernels, features, 9, 4, 0.6, 3, cells=16)
    wide, second = kernels.paths()
    assert 0 < wide < 5 * 36
    assert second == 0


def test_rows_that_fit_in_large_tables(kernels):
    features = identities(36, 20)
    kernels.paths()
    kernels.large_rows()
    chain(kernels, features, 9, 4, 0.6, 3, cells=4, large_cells=64)
    large = sum(module.large_rows() for module in kernels.modules[:2])
    assert large > 36
    assert kernels.paths()[0] == 0


def test_a_list_that_names_a_row_twice(kernels):
    ranks = torch.arange(12).int().view(12, 1).repeat(1, 4)
    ranks[:, 1] = (ranks[:, 0] + 1) % 12
    ranks[:, 2] = ranks[:, 1]
    ranks[:, 3] = (ranks[:, 0] + 11) % 12
    positions = check(kernels, "reciprocal_positions", ranks)
    for tables in ({}, {"cells": 2, "large_cells": 4}):
        k_reciprocal(kernels, ranks, positions, 4, 3, 0, 12, **tables)


def test_ranges_of_rows(kernels):
    features = identities(24, 20)
    ranks, rows = weights(features, 6)
    positions = call("reference", "reciprocal_positions", ranks)
    index = call("reference", "inverted_index", *rows, 0.6)
    for begin, end in [(0, 0), (5, 19), (23, 24)]:
        k_reciprocal(kernels, ranks, positions, 6, 4, begin, end)
        check(kernels, "query_expand", ranks, *rows, 3, begin, end)
        check(kernels, "jaccard_join", *rows, *index, 0.6, begin, end)
        lists = (index[2], index[4], index[5])
        check(kernels, "jaccard_rows", *rows, *lists, begin, end)
        first, last = int(rows[0][begin]), int(rows[0][end])
        lines = (rows[0][begin : end + 1] - first, rows[1][first:last].clone())
        check(kernels, "pair_dots", features, ranks, None, *lines, begin)
