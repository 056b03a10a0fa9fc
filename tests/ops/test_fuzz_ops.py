"""Every public op on generated inputs: compiled against the reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import dhcl_ops
from tests.checks import same_bits
from tests.ops.fuzzing import SCALES, Failure, both, fuzzed, on_reference, some_rows, unit

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**32 - 1)


def integers(seed, low, high, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def agree(function):
    """Bit for bit, or with the same error; returns the result, None for an error."""
    got, expected = both(function)
    if isinstance(got, Failure) or isinstance(expected, Failure):
        assert got == expected
        return None
    for a, b in zip(parts(got), parts(expected), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) if a.dtype == torch.bool else same_bits(a, b), (a, b)
        else:
            assert a == b
    return got


def parts(result):
    if isinstance(result, torch.Tensor):
        if result.layout == torch.sparse_csr:
            return [result.crow_indices(), result.col_indices(), result.values()]
        return [result]
    return list(result) if isinstance(result, tuple) else [result]


@fuzzed(40)
@given(some_rows(), st.none() | some_rows(most=5), SCALES, SCALES, st.data())
def test_fuzz_knn(features, queries, scale, other_scale, data):
    k = data.draw(st.integers(0, len(features)))
    if queries is not None:
        queries = queries[:, :1].expand(-1, features.shape[1]) * other_scale
    found = agree(lambda: dhcl_ops.knn(features * scale, k, queries=queries))
    if found is not None:
        assert found.similarities.isfinite().all()


@fuzzed(40)
@given(some_rows(least=1), SEEDS, st.integers(0, 9), FLOATS, SCALES, st.booleans())
def test_fuzz_hardest_positives(bank, seed, batch, dtype, scale, across):
    memory = dhcl_ops.MemoryBank(len(bank), bank.shape[1], dtype=dtype)
    memory.init(unit(bank))
    memory.set_labels(integers(seed, -1, 3, len(bank)).unique(return_inverse=True)[1] - 1)
    features = integers(seed, -3, 4, batch, bank.shape[1]) * scale
    indices = integers(seed + 1, 0, len(bank), batch)
    cameras = integers(seed + 2, 0, 3, len(bank)) if across else None
    rows = agree(lambda: memory.hardest_positives(features, indices, cameras))
    assert torch.equal(memory.proto_of[rows], memory.proto_of[indices])
    if cameras is not None:
        assert ((cameras[rows] != cameras[indices]) | (rows == indices)).all()


@fuzzed(40)
@given(some_rows(least=1), some_rows(width=1), SEEDS, FLOATS, FLOATS, SCALES, st.data())
def test_fuzz_momentum_update(bank, seedling, seed, bank_dtype, dtype, scale, data):
    features = (seedling * torch.linspace(-1, 2, bank.shape[1])).mul(scale).to(dtype)
    indices = integers(seed, 0, len(bank), len(features))
    momentum = data.draw(st.sampled_from([0.0, 0.2, 1.0, 1e-300]))
    eps = data.draw(st.sampled_from([0.0, 1e-6, 3.0, 1e-45]))

    def update():
        rows, skipped = bank.to(bank_dtype), torch.zeros(1, dtype=torch.int64)
        rows = rows.clone() if rows is bank else rows
        dhcl_ops.momentum_update_(rows, features, indices, momentum, eps=eps, skipped=skipped)
        return rows, skipped

    rows, _ = agree(update)
    assert rows.isfinite().all()


@fuzzed(40)
@given(some_rows(), SEEDS, FLOATS, SCALES, st.booleans())
def test_fuzz_prototypes(bank, seed, dtype, scale, normalize):
    labels = integers(seed, -1, 5, len(bank))
    rows = (bank * scale).to(dtype)
    # The norm of a mean is torch's own; class means have the same bits.
    means = agree(lambda: dhcl_ops.prototypes(rows, labels, 5))
    if normalize and means.isfinite().all():
        unit_means = dhcl_ops.prototypes(rows, labels, 5, normalize=True).double()
        norms = unit_means.norm(dim=1)
        long = means.float().abs().amax(1) > 1e-6 if means.numel() else norms > 1
        torch.testing.assert_close(norms[long], torch.ones_like(norms[long]), rtol=0.01, atol=0)


@fuzzed(40)
@given(some_rows(least=1), SEEDS, st.integers(0, 9), SCALES)
def test_fuzz_least_similar(bank, seed, batch, scale):
    indices = integers(seed, 0, len(bank), batch)
    features = bank.roll(1, 0)[indices] * scale
    chosen = agree(lambda: dhcl_ops.least_similar(features, indices, bank))
    if chosen is not None:
        similarity = (features * bank[indices]).sum(1)
        for index in indices.unique():
            own = (indices == index).nonzero().squeeze(1)
            least = own[similarity[own].argmin()]
            assert chosen[own].sum() == 1
            assert chosen[least]


@fuzzed(30)
@given(
    some_rows(least=2), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["spcl", "zhong"]),
    st.sampled_from([0.05, 0.31, 0.55, 0.7, 0.97]), st.integers(1, 4),
)  # fmt: skip
def test_fuzz_from_features_to_labels(rows, k1, k2, convention, eps, min_samples):
    features, k2 = unit(rows), min(k1, k2)
    with on_reference():
        found = dhcl_ops.knn(features, min(k1 + 1, len(rows)))
    options = {"convention": convention, "ranks": found}
    # With Zhong's weights the largest distance of a row comes from a matrix product.
    graph = agree(lambda: dhcl_ops.jaccard_graph(features, k1, k2, eps, **options))
    dense = agree(lambda: dhcl_ops.jaccard_distance(features, k1, k2, **options))
    assert ((dense >= 0) & (dense <= 1)).all()
    kept = graph.to_dense()[graph.to_dense() > 0]
    assert torch.isin(kept, dense).all()
    labels = agree(lambda: dhcl_ops.dbscan(graph, [eps / 2, eps], min_samples))
    agree(lambda: dhcl_ops.self_paced_labels(labels[1], labels[0], labels[1]))


@fuzzed(30)
@given(some_rows(least=2), SEEDS, st.integers(1, 4), st.data())
def test_fuzz_camera_neighbours(features, seed, cameras, data):
    k = data.draw(st.integers(1, len(features)))
    own = data.draw(st.integers(1, k))
    numbers = integers(seed, 0, cameras, len(features)) * 2**40 - 2**39
    found = agree(lambda: dhcl_ops.camera_neighbours(features, numbers, k, own))
    assert (found.indices.sort(1).values.diff(dim=1) > 0).all()


@fuzzed(30)
@given(
    some_rows(least=1, most=6), some_rows(least=2), SEEDS, SCALES, st.integers(1, 8),
    st.sampled_from([0.0, 0.3, 1.0]), st.booleans(),
)  # fmt: skip
def test_fuzz_reranking(query, gallery, seed, scale, k1, share, listed):
    query = unit(query[:, :1] + gallery[:1])
    gallery = unit(gallery)
    options = {"k1": k1, "k2": min(k1, 3), "lambda_value": share}
    options["topk"] = min(3, len(gallery)) if listed else None
    agree(lambda: dhcl_ops.rerank(query, gallery, **options))
    generator = torch.Generator().manual_seed(seed)
    q, g = len(query), len(gallery)
    matrices = [torch.rand(n, m, generator=generator) for n, m in ((q, g), (q, q), (g, g))]
    plain = agree(lambda: dhcl_ops.rerank_distances(*matrices, **options))
    scaled = agree(lambda: dhcl_ops.rerank_distances(*(m * scale for m in matrices), **options))
    # Distances count only relative to each other.
    for a, b in zip(parts(plain), parts(scaled), strict=True):
        assert b.isfinite().all()
        if a.is_floating_point():
            tolerance = 1e-5 if scale > 1e-37 else 0.1
            torch.testing.assert_close(a.sort(1).values, b.sort(1).values, rtol=0, atol=tolerance)


@fuzzed(40)
@given(
    st.integers(1, 5), st.integers(1, 12), SEEDS, st.integers(0, 4), st.booleans(),
    st.sampled_from(["market", "cuhk03"]), st.sampled_from(["hits", "trapezoid"]), SCALES,
)  # fmt: skip
def test_fuzz_ranking(queries, gallery, seed, levels, cameras, protocol, ap, scale):
    generator = torch.Generator().manual_seed(seed)
    distance = torch.rand(queries, gallery, generator=generator)
    if levels:
        distance = (distance * levels).floor()
    people = (integers(seed, -1, 4, queries), integers(seed + 1, -1, 4, gallery))
    seen = (integers(seed, 0, 2, queries), integers(seed + 1, 0, 2, gallery)) if cameras else ()
    options = {"protocol": protocol, "ap": ap, "per_query": True, "max_rank": 7}

    def evaluate():
        found = dhcl_ops.evaluate_ranking(distance * scale, *people, *seen, **options)
        return tuple(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in found)

    found = agree(evaluate)
    if found is not None:
        assert ((found[0] >= 0) & (found[0] <= 1)).all()
