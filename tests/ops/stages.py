"""What tests of the stages from features to labels share: inputs, calls, comparisons."""

import torch

from dhcl_ops import _ops
from tests.checks import call, same_bits


def equals_reference_on_samples(family):
    """Every op of a family gives the bits of its reference on its sample."""
    ops = [op for op in _ops.OPS.values() if op.family == family]
    assert ops
    for op in ops:
        arguments = op.sample(torch.device("cpu"))
        got, expected = op.overload(*arguments), op.reference(*arguments)
        if isinstance(expected, torch.Tensor):
            got, expected = (got,), (expected,)
        for a, b in zip(got, expected, strict=True):
            assert same_bits(a, b), op.name


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


def k_reciprocal(host, *args, **tables):
    """As check, without the values, of which this op has none."""
    expected = call("reference", "k_reciprocal", *args)
    got = run(host, "k_reciprocal", *args, **tables)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])
    return expected


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
