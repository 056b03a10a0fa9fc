"""False negatives that the graph tells, and negatives of the loss that count by a weight."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from dhcl_ops import (
    DHCLLoss,
    FalseNegatives,
    GraphedStep,
    MemoryBank,
    NegativeWeights,
    _csr,
    _ops,
    cluster,
    debiased_contrastive_loss,
    graph_false_negatives,
    hybrid_contrastive_loss,
)
from tests import checks
from tests.checks import call, same_bits
from tests.ops.fuzzing import fuzzed, on_reference
from tests.ops.stages import identities, random_graph

LABELS = torch.tensor([0, 0, 1, -1, 1, 2, 2, 2, -1, 0, 3, 3])


def graph_of(n, edges=60, seed=0):
    offsets, columns, values = random_graph(n, edges, seed)
    return _csr.sparse_tensor(offsets, columns, values)


def bank_and_batch(d=10):
    generator = torch.Generator().manual_seed(0)
    memory = MemoryBank(len(LABELS), d)
    memory.init(torch.randn(len(LABELS), d, generator=generator))
    memory.set_labels(LABELS)
    indices = torch.tensor([0, 3, 5, 5, 11])
    features = normalize(memory.features[indices] + 0.5 * torch.randn(5, d, generator=generator))
    return memory, features, indices


def probabilities(labels, graph, scale):
    """(N, K) by the formula, class after class."""
    rows = torch.arange(len(labels)).repeat_interleave(graph.crow_indices().diff())
    near = torch.zeros(len(labels), len(labels))
    near[rows, graph.col_indices()] = 1.0 - graph.values()
    alone = labels.max() + (labels < 0).cumsum(0)
    classes = torch.where(labels < 0, alone, labels)
    found = torch.zeros(len(labels), int(classes.max()) + 1, dtype=torch.float64)
    for k in range(found.shape[1]):
        found[:, k] = near[:, classes == k].double().mean(1) / scale
    found[torch.arange(len(labels)), classes] = 0.0
    return found.clamp(max=1.0), classes


def dense(found, classes):
    """(N, K) from the lists."""
    rows = torch.arange(len(found.offsets) - 1).repeat_interleave(found.offsets.diff())
    out = torch.zeros(len(found.offsets) - 1, int(classes.max()) + 1, dtype=torch.float64)
    out[rows, found.classes] = -torch.expm1(found.logs.double())
    return out


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_means_over_the_classes(seed):
    graph = graph_of(len(LABELS), seed=seed)
    wanted, classes = probabilities(LABELS, graph, 0.3)
    found = graph_false_negatives(LABELS, graph, 0.3)
    torch.testing.assert_close(dense(found, classes), wanted, rtol=1e-5, atol=1e-6)
    assert (wanted == 1.0).any()
    assert ((wanted > 0) & (wanted < 1)).any()
    again = graph_false_negatives(LABELS, graph, 0.3)
    assert all(same_bits(a, b) for a, b in zip(found, again, strict=True))


def test_without_pairs_or_rows_there_are_none():
    labels = torch.zeros(4, dtype=torch.int64)
    assert len(graph_false_negatives(labels, graph_of(4, 12)).classes) == 0
    nothing = torch.zeros(0).long()
    graph = _csr.sparse_tensor(torch.zeros(1).long(), nothing, torch.zeros(0))
    assert graph_false_negatives(nothing, graph).offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"graph": torch.eye(12)}, TypeError, "graph must be a sparse CSR"),
        ({"graph": graph_of(12).double()}, TypeError, "graph must be float32"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"labels must have shape \(12,\)"),
        ({"scale": 0.0}, ValueError, "scale must be finite and > 0"),
        ({"scale": math.nan}, ValueError, "scale must be finite and > 0"),
    ],
)
def test_errors_of_the_graph(change, error, message):
    arguments = {"labels": LABELS, "graph": graph_of(12), **change}
    with pytest.raises(error, match=f"graph_false_negatives: {message}"):
        graph_false_negatives(**arguments)


def test_the_graph_of_a_clustering_may_be_larger_than_its_eps():
    rows = identities(60, 16)
    tight, wide = (cluster(rows, k1=8, k2=3, eps=0.45, graph_eps=eps) for eps in (None, 0.85))
    assert torch.equal(tight.labels, wide.labels)
    assert len(wide.graph.values()) > len(tight.graph.values())
    assert wide.graph.values().max() > 0.45
    with pytest.raises(ValueError, match=r"cluster: graph_eps must be at least 0.45, .*got 0.4"):
        cluster(rows, k1=8, k2=3, eps=0.45, graph_eps=0.4)


# ---- in the loss --------------------------------------------------------------------------------


def by_formula(memory, features, indices, likely, *, instance_weight, temperature):
    """Both terms in float64 as they are written, the positive of an instance being its own row."""
    f, c, v = (t.double() for t in (features, memory.prototypes, memory.features))
    keep, y = 1.0 - likely[indices], memory.proto_of
    own = y[indices]
    z = (f @ c.t() - (f * c[own]).sum(1, keepdim=True)) / temperature
    other = own[:, None] != torch.arange(len(c))
    first = (1 + (keep * z.exp() * other).sum(1)).log()
    z = (f @ v.t() - (f * v[indices]).sum(1, keepdim=True)) / temperature
    second = (1 + (keep[:, y] * z.exp() * (own[:, None] != y)).sum(1)).log()
    return first + instance_weight * second


def test_the_loss_is_the_formula_and_its_gradient():
    memory, features, indices = bank_and_batch()
    graph = graph_of(len(LABELS))
    likely = probabilities(LABELS, graph, 0.3)[0]
    found = graph_false_negatives(LABELS, graph, 0.3)
    ours = features.clone().requires_grad_()
    got, stats = hybrid_contrastive_loss(
        ours, memory, indices, instance_weight=0.7, temperature=0.1, false_negatives=found,
        reduction="none", return_stats=True,
    )  # fmt: skip
    theirs = features.double().clone().requires_grad_()
    wanted = by_formula(memory, theirs, indices, likely, instance_weight=0.7, temperature=0.1)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6)
    got.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-4, atol=2e-5)
    assert stats.prototypes.clamped_fraction == 0
    gone = (likely[indices] == 1).sum(1)
    assert gone.any()
    assert torch.equal(stats.prototypes.num_negatives, 5 - gone)


def weights_of(batch, columns, seed, *, classes=False, lists=4):
    """Random lists, of columns or of classes of three columns each."""
    generator = torch.Generator().manual_seed(seed)
    entries = (columns + 2) // 3 if classes else columns
    chosen = [
        torch.randperm(entries, generator=generator)[: int(size)].sort().values
        for size in torch.randint(0, entries + 1, (lists,), generator=generator)
    ]
    offsets = torch.tensor([0, *(len(c) for c in chosen)]).cumsum(0)
    logs = -3 * torch.rand(int(offsets[-1]), generator=generator)
    logs[::5] = -math.inf
    rows = torch.randint(0, lists, (batch,), generator=generator)
    members = torch.randperm(columns, generator=generator) if classes else None
    ends = torch.arange(entries + 1).mul(3).clamp(max=columns) if classes else None
    return NegativeWeights(rows, offsets, torch.cat(chosen), logs, members, ends)


def inputs(seed=0, b=4, k=17, d=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(b, d, generator=generator, dtype=torch.float64))
    proxies = normalize(torch.randn(k, d, generator=generator, dtype=torch.float64))
    return features.to(dtype), proxies.to(dtype), torch.randint(0, k, (b,), generator=generator)


OPTIONS = {
    "cross-entropy": {},
    "hard": {"beta": 0.3},
    "weights differentiated": {"beta": 0.3, "hardness_gradient": "through"},
    "several positives": {"proxy_labels": torch.arange(17) % 6, "positives": "each"},
    "a mean of positives": {"proxy_labels": torch.arange(17) % 6, "positives": "mean"},
}


@pytest.mark.parametrize("classes", [False, True], ids=["columns", "classes"])
# Where the weights of hardness are held, the difference quotient is of something else.
@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if kind != "hard"])
def test_gradcheck(kind, classes):
    features, proxies, labels = inputs(dtype=torch.float64)
    options = OPTIONS[kind]
    if "proxy_labels" in options:
        labels = labels % 6
    weights = weights_of(4, 17, 1, classes=classes)

    def loss(x, c):
        return debiased_contrastive_loss(
            x, c, labels, temperature=0.5, weights=weights, chunk_size=5, **options
        )

    leaves = features.requires_grad_(), proxies.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", OPTIONS)
def test_compiled_equals_reference_and_chunks_do_not_matter(kind):
    features, proxies, labels = inputs()
    options = OPTIONS[kind]
    if "proxy_labels" in options:
        labels = labels % 6
    weights = weights_of(4, 17, 2, classes=True)
    found = []
    for chunk in (None, 5):
        x = features.clone().requires_grad_()
        value, stats = debiased_contrastive_loss(
            x, proxies, labels, weights=weights, chunk_size=chunk, reduction="none",
            return_stats=True, **options,
        )  # fmt: skip
        value.sum().backward()
        found.append((value.detach(), x.grad, stats))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][2].num_negatives, found[1][2].num_negatives)
    with on_reference():
        x = features.clone().requires_grad_()
        value, stats = debiased_contrastive_loss(
            x, proxies, labels, weights=weights, reduction="none", return_stats=True, **options
        )
        value.sum().backward()
    torch.testing.assert_close(found[0][:2], (value.detach(), x.grad), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][2].num_negatives, stats.num_negatives)


def test_a_weight_of_one_changes_no_bit_and_of_zero_excludes():
    features, proxies, labels = inputs()
    plain = debiased_contrastive_loss(features, proxies, labels, reduction="none")
    columns = torch.arange(17)
    lists = torch.zeros(4).long(), torch.tensor([0, 17]), columns
    ones = NegativeWeights(*lists, torch.zeros(17))
    assert same_bits(
        debiased_contrastive_loss(features, proxies, labels, weights=ones, reduction="none"), plain
    )
    some = columns < 6
    logs = torch.where(some, -math.inf, 0.0)
    gone = debiased_contrastive_loss(
        features, proxies, labels, weights=NegativeWeights(*lists, logs), reduction="none"
    )
    without = debiased_contrastive_loss(
        features, proxies, labels, exclude=columns[some].expand(4, -1), reduction="none"
    )
    torch.testing.assert_close(gone, without, rtol=1e-6, atol=1e-7)
    none = debiased_contrastive_loss(
        features, proxies, labels, weights=NegativeWeights(*lists, torch.full((17,), -math.inf))
    )
    assert none == 0


@fuzzed(40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 20), st.booleans(), st.data())
def test_fuzz_weigh(seed, batch, columns, classes, data):
    """What is added to the products has one value, whatever computes it."""
    weights = weights_of(batch, columns, seed, classes=classes)
    generator = torch.Generator().manual_seed(seed)
    start = data.draw(st.integers(0, columns))
    width = data.draw(st.integers(0, columns - start))
    products = torch.randn(batch, width, generator=generator)
    labels = torch.randint(0, columns, (batch,), generator=generator)
    proxy_labels = torch.arange(columns) % 4 if data.draw(st.booleans()) else None
    rest = (labels, proxy_labels, *weights, start, data.draw(st.sampled_from([20.0, 0.3])))
    ours, theirs = products.clone(), products.clone()
    call("compiled", "contrastive_weigh_", ours, *rest)
    call("reference", "contrastive_weigh_", theirs, *rest)
    assert same_bits(ours, theirs)


def test_the_loss_compiles_as_one_graph():
    features, proxies, labels = inputs()
    weights = weights_of(4, 17, 3)

    def loss(x):
        return debiased_contrastive_loss(x, proxies, labels, weights=weights, reduction="none")

    checks.compiles_with_backward(loss, features, "aot_eager")


def test_a_graphed_step_has_the_bits_of_the_plain_one():
    memory, features, indices = bank_and_batch()
    loss = DHCLLoss(kappa=0.0, beta=0.1, instance_weight=1.0)
    found = graph_false_negatives(LABELS, graph_of(len(LABELS)))
    loss.set_false_negatives(found)
    step = GraphedStep(loss, memory, features, indices)
    x, y = features.clone().requires_grad_(), features.clone().requires_grad_()
    expected, value = loss(x, memory, indices), step(y, indices)
    assert same_bits(value.detach(), expected.detach())
    expected.backward()
    value.backward()
    assert same_bits(x.grad, y.grad)
    without = DHCLLoss(kappa=0.0, beta=0.1, instance_weight=1.0)(features, memory, indices)
    assert without != value.detach()
    loss.set_false_negatives(None)
    with pytest.raises(RuntimeError, match="false negatives were set since"):
        step(y, indices)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kappa": 0.3}, ValueError, "weights stand in place of kappa and tau_plus"),
        ({"weights": (1, 2)}, TypeError, "weights must be NegativeWeights"),
        ({"rows": torch.zeros(3).long()}, ValueError, r"weights.rows must have shape \(4,\)"),
        ({"rows": torch.full((4,), 9)}, ValueError, r"rows must be in \[0, 4\)"),
        ({"entries": torch.zeros(2).long()}, ValueError, "weights.logs must have shape"),
        ({"logs": torch.zeros(2).double()}, TypeError, "weights.logs must be float32"),
        ({"members": torch.zeros(3).long()}, ValueError, "go together"),
    ],
)
def test_errors_of_weights(change, error, message):
    features, proxies, labels = inputs()
    weights = weights_of(4, 17, 1)
    arguments = {"weights": weights}
    if set(change) <= set(weights._fields):
        arguments["weights"] = weights._replace(**change)
    else:
        arguments |= change
    if message.startswith("rows") and not _ops.OPS["contrastive_weigh_"].compiled("cpu"):
        pytest.skip("the reference's own indexing refuses it in other words")
    with pytest.raises(error, match=message):
        debiased_contrastive_loss(features, proxies, labels, **arguments)


def test_errors_of_false_negatives():
    memory, features, indices = bank_and_batch()
    found = graph_false_negatives(LABELS, graph_of(len(LABELS)))
    with pytest.raises(ValueError, match=r"offsets must have shape \(13,\)"):
        hybrid_contrastive_loss(
            features, memory, indices,
            false_negatives=FalseNegatives(found.offsets[:-1], *found[1:]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="in place of kappa"):
        hybrid_contrastive_loss(features, memory, indices, kappa=0.2, false_negatives=found)
