"""csrc/jaccard.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import itertools

import pytest
import torch

from tests.checks import call, same_bits


def run(host, name, *args, **options):
    """Call a launcher with tensors; return tensors."""
    arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
    got = getattr(host, name)(*arrays, **options)
    if not isinstance(got, tuple):
        return torch.from_numpy(got)
    return tuple(torch.from_numpy(part) for part in got)


def check(host, name, *args, **options):
    """Same bits as the reference; returns what the reference gives."""
    expected = call("reference", name, *args)
    got = run(host, name, *args, **options)
    both = [(got, expected)]
    if not isinstance(expected, torch.Tensor):
        both = list(zip(got, expected, strict=True))
    for place, (a, b) in enumerate(both):
        assert same_bits(a, b), f"{name}: result {place}\n{a}\n{b}"
    return expected


def identities(n, d, *, copies=1, seed=0, noise=0.6):
    """n unit rows around n / 6 centres; the last rows are copies of row 0."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n // 6), d, generator=generator)
    rows = centres[torch.arange(n) % len(centres)]
    rows = rows + noise * torch.randn(n, d, generator=generator)
    rows[n - copies + 1 :] = rows[:1]
    return torch.nn.functional.normalize(rows)


def ranked(features, k):
    """The k most similar rows, ties to the lower row."""
    similarities, ranks = (features @ features.T).sort(dim=1, descending=True, stable=True)
    return similarities[:, :k].contiguous(), ranks[:, :k].int().contiguous()


def halved(k):
    return min(round(k / 2) + 1, k)


def weights(features, k):
    """Sets and their weights by the references."""
    similarities, ranks = ranked(features, k)
    positions = call("reference", "reciprocal_positions", ranks)
    n = len(features)
    lines = call("reference", "k_reciprocal", ranks, positions, k, halved(k), 0, n)
    dots = call("reference", "pair_dots", features, ranks, similarities, *lines, 0)
    return ranks, (*lines, call("reference", "softmax_rows", lines[0], 2.0 * dots - 2.0))


def expanded(features, k, k2):
    ranks, rows = weights(features, k)
    if k2 == 1:
        return rows
    return call("reference", "query_expand", ranks, *rows, k2, 0, len(ranks))


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


def k_reciprocal(host, *args, **tables):
    """As check, without the values, of which this op has none."""
    expected = call("reference", "k_reciprocal", *args)
    got = run(host, "k_reciprocal", *args, **tables)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])
    return expected


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


def random_sets(n, most, seed):
    """Rows of random columns and weights that sum up to one; some are empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, most + 1, (n,), generator=generator)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    columns, values = [], []
    for size in sizes.tolist():
        columns.append(torch.randperm(n, generator=generator)[:size].sort().values)
        values.append(torch.rand(size, generator=generator) + 0.05)
        values[-1] /= values[-1].sum()
    return offsets, torch.cat(columns).int(), torch.cat(values)


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


@pytest.mark.parametrize("n", [0, 1, 5, 2048, 2049, 5000])
def test_scan(host, n):
    counts = torch.randint(0, 1 << 40, (n,), generator=torch.Generator().manual_seed(n))
    expected = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert same_bits(run(host, "scan", counts), expected)


def graph_of(dense):
    """The sparse graph of the distances below 1."""
    near = dense < 1.0
    offsets = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
    return offsets, near.nonzero()[:, 1].contiguous(), dense[near]


def random_graph(n, edges, seed):
    """A symmetric sparse graph with its diagonal, distances in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.full((n, n), 2.0)
    pairs = torch.randint(0, n, (2, edges), generator=generator)
    dense[pairs[0], pairs[1]] = torch.rand(edges, generator=generator)
    dense = torch.minimum(dense, dense.T).fill_diagonal_(0.0)
    return graph_of(dense)


@pytest.mark.parametrize("seed", range(6))
def test_dbscan_of_random_graphs(kernels, seed):
    found = set()
    for n, edges, min_samples in [(60, 70, 2), (60, 110, 3), (45, 200, 4), (7, 9, 1)]:
        graph = random_graph(n, edges, seed)
        for eps in (0.0, 0.3, 0.6, 1.0):
            found |= set(check(kernels, "dbscan", *graph, eps, min_samples).tolist())
    assert {-1, 0, 1, 2} <= found


@pytest.mark.parametrize("touched", [(7, 9), (3, 5), (6, 0)])
def test_a_border_row_of_two_clusters_takes_the_lower(kernels, touched):
    # The cluster of row 0 holds the lowest and the highest rows, so it comes last in row 8's line.
    dense = torch.full((10, 10), 2.0).fill_diagonal_(0.0)
    for members in ([0, 1, 2, 9], [4, 5, 6, 7], [8, touched[0]], [8, touched[1]]):
        for a, b in itertools.permutations(members, 2):
            dense[a, b] = 0.1
    labels = check(kernels, "dbscan", *graph_of(dense), 0.5, 4)
    expected = {(7, 9): 0, (3, 5): 1, (6, 0): 0}[touched]
    assert labels.tolist() == [0, 0, 0, -1, 1, 1, 1, 1, expected, 0]


def test_a_border_row_with_more_neighbours_than_lanes(kernels):
    # Two of cluster 0, then 36 of cluster 1, so that the lanes which see 0 see 1 after it.
    dense = torch.full((81, 81), 2.0)
    for members in (range(40), range(40, 80), [0, 1, *range(40, 76), 80]):
        rows = torch.tensor(list(members))
        dense[rows[:, None], rows] = 0.1
    dense[:2, 40:76] = dense[40:76, :2] = 2.0
    labels = check(kernels, "dbscan", *graph_of(dense), 0.5, 40)
    assert labels.tolist() == [0] * 40 + [1] * 40 + [0]


def path_graph(order):
    """A path through the rows in the given order."""
    n = len(order)
    dense = torch.full((n, n), 2.0).fill_diagonal_(0.0)
    for a, b in itertools.pairwise(order):
        dense[a, b] = dense[b, a] = 0.1
    return graph_of(dense)


def test_dbscan_of_long_paths(kernels):
    for order in (list(range(60)), [(i * 37) % 60 for i in range(60)]):
        graph = path_graph(order)
        assert (check(kernels, "dbscan", *graph, 0.5, 2) == 0).all()
        # Ends are not core: they take their neighbour's cluster.
        assert (check(kernels, "dbscan", *graph, 0.5, 3) == 0).all()


def test_what_is_out_of_range_is_reported(host):
    ranks = torch.tensor([[0, 1], [1, 7]]).int()
    with pytest.raises(RuntimeError, match=r"\[0, 2\) \(got 7 in row 1\)"):
        run(host, "reciprocal_positions", ranks)
    csr = (torch.tensor([0, 1, 2]), torch.tensor([1, 2]).int(), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"inverted_index: columns .* \(got 2\)"):
        run(host, "inverted_index", *csr, 0.5)
    lower = (torch.tensor([0, 1, 2]), torch.tensor([0, 0]).int(), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"mirror_csr: columns .* \(got 0 in row 1\)"):
        run(host, "mirror_csr", *lower)
    with pytest.raises(RuntimeError, match=r"dbscan: columns .* \(got 2 in row 1\)"):
        run(host, "dbscan", csr[0], csr[1].long(), csr[2], 0.5, 1)
