"""Whatever an argument is, a public op names what is wrong with it, or gives a finite result."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dhcl_ops
from dhcl_ops import compat
from tests.ops.fuzzing import Failure, fuzzed, outcome, unit

GENERATOR = torch.Generator().manual_seed(0)
GALLERY = unit(torch.randn(12, 8, generator=GENERATOR))
QUERY = unit(torch.randn(7, 8, generator=GENERATOR))
SEVEN, TWELVE = torch.arange(7), torch.arange(12)
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1])


def bank(**options):
    memory = dhcl_ops.MemoryBank(12, 8, **options)
    memory.init(GALLERY)
    memory.set_labels(LABELS)
    return memory


def of_bank(name):
    return lambda **arguments: getattr(bank(), name)(**arguments)


def update(bank, **arguments):
    return dhcl_ops.momentum_update_(bank.clone() if torch.is_tensor(bank) else bank, **arguments)


def from_features(query, gallery, **arguments):
    return dhcl_ops.evaluate_ranking((query, gallery), **arguments)


def with_similarities(similarities):
    ranks = dhcl_ops.knn(GALLERY, 4)._replace(similarities=similarities)
    return dhcl_ops.jaccard_graph(GALLERY, 4, 2, 0.6, ranks=ranks)


def graph():
    return dhcl_ops.jaccard_graph(GALLERY, 4, 2, 0.6)


def counted_negatives(**arguments):
    """Weights in place of their logarithms, which are infinite for a weight of zero."""
    found = dhcl_ops.graph_false_negatives(**arguments)
    return found._replace(logs=found.logs.exp())


LISTS = {"k1": 4, "k2": 2}
LOSS = {"features": QUERY, "proxies": GALLERY, "temperature": 0.05, "beta": 0.2}
PEOPLE = {"query_ids": SEVEN % 3, "gallery_ids": TWELVE % 3}
DISTANCES = {
    "q_g": torch.cdist(QUERY, GALLERY),
    "q_q": torch.cdist(QUERY, QUERY),
    "g_g": torch.cdist(GALLERY, GALLERY),
}
# The name that errors begin with, a function, and arguments that it takes.
CALLS = [
    ("knn", dhcl_ops.knn, {"features": GALLERY, "k": 3, "queries": QUERY}),
    ("momentum_update_", update,
     {"bank": GALLERY, "features": QUERY, "indices": SEVEN, "momentum": 0.2, "eps": 0.0}),
    ("least_similar", dhcl_ops.least_similar,
     {"features": QUERY, "indices": SEVEN // 2, "bank": GALLERY}),
    ("prototypes", dhcl_ops.prototypes, {"bank": GALLERY, "labels": LABELS, "num_classes": 3}),
    ("MemoryBank", dhcl_ops.MemoryBank,
     {"num_samples": 12, "num_features": 8, "momentum": 0.2, "eps": 0.0}),
    ("MemoryBank.init", of_bank("init"), {"features": GALLERY}),
    ("MemoryBank.set_labels", of_bank("set_labels"), {"labels": LABELS}),
    ("debiased_contrastive_loss", dhcl_ops.debiased_contrastive_loss,
     {**LOSS, "labels": SEVEN, "kappa": 0.3, "chunk_size": 5}),
    ("debiased_contrastive_loss", dhcl_ops.debiased_contrastive_loss,
     {**LOSS, "labels": SEVEN % 3, "kappa": torch.full((7,), 0.3), "proxy_labels": TWELVE % 3}),
    ("debiased_contrastive_loss", dhcl_ops.debiased_contrastive_loss,
     {**LOSS, "labels": SEVEN, "tau_plus": 0.1, "exclude": torch.full((7, 2), -1)}),
    ("hybrid_contrastive_loss", lambda **a: dhcl_ops.hybrid_contrastive_loss(memory=bank(), **a),
     {"features": QUERY, "indices": SEVEN, "instance_weight": 0.25, "prototype_weight": 1.0,
      "temperature": 0.05, "kappa": 0.1, "beta": 0.1}),
    ("hybrid_contrastive_loss", lambda **a: dhcl_ops.hybrid_contrastive_loss(
        memory=bank(), instance_positives="cross-camera", **a),
     {"features": QUERY, "indices": SEVEN, "cameras": TWELVE % 2}),
    ("MemoryBank.hardest_positives", of_bank("hardest_positives"),
     {"features": QUERY, "indices": SEVEN, "cameras": TWELVE % 2}),
    ("graph_false_negatives", counted_negatives,
     {"labels": LABELS, "graph": graph(), "scale": 0.1}),
    ("suspected_false_negatives",
     lambda **a: dhcl_ops.suspected_false_negatives(bank(), **a), {"loose_labels": LABELS}),
    ("jaccard_graph", dhcl_ops.jaccard_graph, {"features": GALLERY, **LISTS, "eps": 0.6}),
    ("jaccard_graph", with_similarities, {"similarities": dhcl_ops.knn(GALLERY, 4).similarities}),
    ("jaccard_distance", dhcl_ops.jaccard_distance, {"features": GALLERY, **LISTS}),
    ("cluster", lambda **a: dhcl_ops.cluster(**a).labels,
     {"features": GALLERY, **LISTS, "eps": 0.5, "min_samples": 2, "self_paced": True,
      "eps_gap": 0.02, "threshold": 0.5}),
    ("dbscan", dhcl_ops.dbscan, {"graph": graph(), "eps": 0.5, "min_samples": 2}),
    ("constrained_dbscan", dhcl_ops.constrained_dbscan,
     {"graph": graph(), "apart": torch.tensor([[0, 1], [9, 3]]), "eps": 0.5, "min_samples": 2}),
    ("self_paced_labels", dhcl_ops.self_paced_labels,
     {"labels": LABELS, "tight": TWELVE % 5 - 1, "loose": TWELVE % 3, "threshold": 0.3}),
    ("camera_neighbours", dhcl_ops.camera_neighbours,
     {"features": GALLERY, "cameras": TWELVE % 3, "k": 4, "own": 2}),
    ("evaluate_ranking", dhcl_ops.evaluate_ranking,
     {"distance_or_features": DISTANCES["q_g"], **PEOPLE, "max_rank": 5, "junk_id": -1, "seed": 0}),
    ("evaluate_ranking", from_features, {"query": QUERY, "gallery": GALLERY, **PEOPLE}),
    ("rerank", dhcl_ops.rerank, {"query": QUERY, "gallery": GALLERY, **LISTS, "lambda_value": 0.3}),
    ("rerank_distances", dhcl_ops.rerank_distances, {**DISTANCES, **LISTS, "topk": 3}),
    ("re_ranking", compat.torchreid.re_ranking,
     {f"{name}_dist": value for name, value in DISTANCES.items()} | LISTS),
]  # fmt: skip


def placed(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] = value
    return changed


def with_row(tensor, value):
    changed = tensor.clone()
    changed[len(tensor) // 2] = value
    return changed


ELEMENTS = [math.nan, math.inf, -math.inf, 1e20, -1e20, 3e38, 1e-30, 1e-42]
FACTORS = [0.0, 1e-42, 1e-25, 1e-10, 1e10, 1e15, 1e20, 1e30]
INTEGERS = [2**62, 2**63 - 1, -(2**63), -2, -1, 2**31, 2**32, 10**6]
NUMBERS = [
    math.nan, math.inf, -math.inf, -1, 0, 1e-300, 1e-45, 1e300, 3e38, 1e20, 2**31, 2**63 - 1, 2**63,
    2**70, 10**400, True, "3", None, 1j, np.float32(2), np.int64(2), np.float64("nan"), [1],
    torch.tensor(2), torch.tensor(2.0), torch.tensor([1.0, 2.0]),
]  # fmt: skip


def shapes(tensor):
    yield from (tensor[:0], tensor[None], tensor[:-1], tensor.flatten()[0], tensor.to_sparse())
    yield from (None, "x", tensor.tolist(), tensor.numpy(), tensor.numpy().astype(object))
    if tensor.dim() == 2:
        yield from (tensor[:, :0], tensor.T, tensor.T.contiguous().T, tensor[:, ::2])


def variants(value):
    """What may come in place of a value."""
    if isinstance(value, bool):
        yield from (None, 0, "x")
    elif not isinstance(value, torch.Tensor):
        yield from NUMBERS
    elif value.layout != torch.strided:
        columns, rows = value.col_indices(), value.crow_indices()
        yield from (None, value.to_dense(), value.double(), np.zeros((3, 3)))
        for values in (placed(value.values(), math.nan), value.values()[:-1]):
            yield torch.sparse_csr_tensor(
                rows, columns, values, value.shape, check_invariants=False
            )
        for wrong in (placed(columns, 10**9), placed(columns, -1), columns[:-1]):
            yield torch.sparse_csr_tensor(
                rows, wrong, value.values(), value.shape, check_invariants=False
            )
    elif value.is_floating_point():
        yield from (placed(value, x) for x in ELEMENTS)
        yield from (with_row(value, x) for x in (math.nan, 0.0, 1e20, 1e-20))
        yield from (value * x for x in FACTORS)
        yield from (placed(value.double(), 1e300), value.double() * 1e-300, value.double() * 1e300)
        kinds = (torch.half, torch.bfloat16, torch.double, torch.long, torch.complex64, torch.bool)
        yield from (value.to(kind) for kind in kinds)
        yield from (value.numpy().astype(">f4"), value.to(torch.float8_e4m3fn))
        yield from shapes(value)
    else:
        yield from (placed(value, x) for x in INTEGERS)
        yield from (torch.full_like(value, x) for x in (2**62, -1))
        kinds = (torch.int32, torch.uint8, torch.float32, torch.bool, torch.uint64)
        yield from (value.clamp(min=0).to(kind) for kind in kinds)
        yield np.full(tuple(value.shape), 2**63 + 5, np.uint64)
        yield from shapes(value)


def tensors_of(result):
    if isinstance(result, (torch.Tensor, np.ndarray)):
        yield torch.as_tensor(result.values() if getattr(result, "is_sparse_csr", 0) else result)
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)


def is_finite(value):
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.double().isfinite().all())
    return True


def check(name, function, arguments):
    """The call gives what is finite, or an error that names the op, or one that it is made of."""
    result = outcome(lambda: function(**arguments))
    if isinstance(result, Failure):
        assert result.text.split(":")[0] in {name, *COMPOSED.get(name, ())}, result
        return
    # Class means and bank rows say of a class or row that was not finite that it is not, and
    # distances may be infinite.
    passed_on = name in {"prototypes", "momentum_update_", "evaluate_ranking"}
    if not (passed_on and not all(map(is_finite, arguments.values()))):
        assert all(map(is_finite, tensors_of(result))), result


COMPOSED = {
    "hybrid_contrastive_loss": {"debiased_contrastive_loss", "MemoryBank.hardest_positives"},
    "cluster": {"self_paced_labels"},
    "camera_neighbours": {"knn"},
    "constrained_dbscan": {"dbscan"},
}
EACH = [
    pytest.param(name, function, arguments, changed, id=f"{number}-{name}-{changed}")
    for number, (name, function, arguments) in enumerate(CALLS)
    for changed in arguments
]


@pytest.mark.parametrize(("name", "function", "arguments", "changed"), EACH)
def test_each_argument(name, function, arguments, changed):
    for value in variants(arguments[changed]):
        check(name, function, {**arguments, changed: value})


@fuzzed(100)
@given(st.data())
def test_fuzz_several_arguments(data):
    name, function, arguments = data.draw(st.sampled_from(CALLS))
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, unique=True))
    values = {n: data.draw(st.sampled_from(list(variants(arguments[n])))) for n in changed}
    check(name, function, {**arguments, **values})


def test_every_public_op_is_called():
    public = {
        name
        for name in dhcl_ops.__all__
        if inspect.isfunction(getattr(dhcl_ops, name)) and name != "status"
    }
    assert public <= {name for name, *_ in CALLS}
