"""The hybrid loss over a memory bank: its variants, suspects, and the module."""

import math

import pytest
import torch
from torch.nn import functional as F

from dhcl_ops import (
    DHCLLoss,
    MemoryBank,
    Suspects,
    debiased_contrastive_loss,
    hybrid_contrastive_loss,
    suspected_false_negatives,
)
from tests.ops.test_contrastive import leaf, plain, unit

LABELS = torch.tensor([0, 0, 1, -1, 1, 2, 2, 2, -1, 0, 3, 3])
LOOSE = torch.tensor([4, 4, 4, -1, 4, 0, 0, 0, 0, 4, 2, 1])


def bank_and_batch(device="cpu", d=10):
    memory = MemoryBank(len(LABELS), d, momentum=0.2).to(device)
    memory.init(unit(len(LABELS), d, 1, dtype=torch.float32).to(device))
    memory.set_labels(LABELS.to(device))
    indices = torch.tensor([0, 3, 5, 5, 11])
    features = F.normalize(unit(5, d, 2) + 0.5 * unit(len(LABELS), d, 1)[indices])
    return memory, features.to(device, torch.float32), indices.to(device)


def terms(memory, features, indices, *, kappa=0.0, beta=0.0, groups=None, class_positives=False):
    """Both terms (B,) in float64 from whole masks, with the weights of hardness held."""
    f, v, c = (t.double().cpu() for t in (features, memory.features, memory.prototypes))
    y, i = memory.proto_of.cpu(), indices.cpu()
    column = torch.arange(len(c))
    group = column if groups is None else groups.cpu()
    positive = y[i][:, None] == column
    negative = (group[y[i]][:, None] != group) & ~positive
    frozen = f @ c.t() / 0.05
    first = plain(f, c, positive, negative, kappa=kappa, beta=beta, frozen=frozen)
    positive = i[:, None] == torch.arange(len(v))
    if class_positives:
        positive = y[i][:, None] == y
    negative = (group[y[i]][:, None] != group[y]) & (y[i][:, None] != y)
    share = kappa / (len(c) - 1)
    second = plain(
        f, v, positive, negative, tau_plus=share, beta=beta, mode="mean", frozen=f @ v.t() / 0.05
    )
    return first, second


@pytest.mark.parametrize(("kappa", "beta"), [(0.0, 0.0), (0.3, 0.1)])
def test_variants(device, kappa, beta):
    memory, features, indices = bank_and_batch(device)
    first, second = terms(memory, features, indices, kappa=kappa, beta=beta)
    pooled = terms(memory, features, indices, kappa=kappa, beta=beta, class_positives=True)[1]
    options = {"kappa": kappa, "beta": beta, "reduction": "none"}
    close = {"rtol": 2e-5, "atol": 2e-6}
    h1, stats = hybrid_contrastive_loss(
        features, memory, indices, instance_weight=0.4, return_stats=True, **options
    )
    torch.testing.assert_close(h1.cpu().double(), first + 0.4 * second, **close)
    torch.testing.assert_close(stats.prototype_loss.cpu().double(), first.mean(), **close)
    torch.testing.assert_close(stats.instance_loss.cpu().double(), second.mean(), **close)
    assert torch.equal(stats.prototypes.num_negatives.cpu(), torch.full((5,), 5))
    assert stats.instances.num_negatives.tolist() == [9, 11, 9, 9, 10]
    h0, stats = hybrid_contrastive_loss(
        features, memory, indices, instance_weight=0.0, return_stats=True, **options
    )
    torch.testing.assert_close(h0.cpu().double(), first, **close)
    assert stats.instances is stats.instance_loss is None
    h2 = hybrid_contrastive_loss(
        features, memory, indices, prototype_weight=0.0, instance_weight=1.0,
        instance_positives="class", **options,
    )  # fmt: skip
    torch.testing.assert_close(h2.cpu().double(), pooled, **close)


def test_h0_is_the_unified_loss_of_spcl(device):
    """Cross-entropy over cluster means and un-clustered rows (Ge et al. 2020, equation 2)."""
    memory, features, indices = bank_and_batch(device)
    x = leaf(features, device)
    ours = hybrid_contrastive_loss(x, memory, indices, instance_weight=0.0)
    ours.backward()
    truth = leaf(features, "cpu", torch.float64)
    logits = truth @ memory.prototypes.cpu().double().t() / 0.05
    expected = F.cross_entropy(logits, memory.proto_of.cpu()[indices.cpu()])
    expected.backward()
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.cpu().double(), truth.grad, rtol=1e-4, atol=1e-5)


def test_suspects_of_a_looser_clustering(device):
    memory, *_ = bank_and_batch(device)
    suspects = suspected_false_negatives(memory, LOOSE.to(device))
    # Classes 0..3 are clusters, 4 and 5 the outliers 3 and 8. Clusters 0 and 1 meet in loose 4;
    # outlier 8 joins cluster 2 in loose 0; cluster 3 is split 1 to 1 and goes to the lower; outlier
    # 3 stays alone.
    groups = suspects.groups.tolist()
    assert groups[0] == groups[1]
    assert groups[2] == groups[5]
    assert groups[3] == 1
    assert len({groups[0], groups[2], groups[3], groups[4]}) == 4
    assert suspects.others.tolist() == [1, 1, 1, 0, 0, 1]
    nobody = suspected_false_negatives(memory, torch.full_like(LOOSE, -1).to(device))
    assert not nobody.others.any()
    assert len(nobody.groups.unique()) == 6


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_suspects_are_excluded_or_counted(device, beta):
    memory, features, indices = bank_and_batch(device)
    suspects = suspected_false_negatives(memory, LOOSE.to(device))
    options = {"beta": beta, "reduction": "none", "instance_weight": 0.5, "suspects": suspects}
    close = {"rtol": 2e-5, "atol": 2e-6}
    excluded = hybrid_contrastive_loss(features, memory, indices, **options)
    first, second = terms(memory, features, indices, beta=beta, groups=suspects.groups)
    torch.testing.assert_close(excluded.cpu().double(), first + 0.5 * second, **close)
    counted = hybrid_contrastive_loss(features, memory, indices, suspects_as="kappa", **options)
    # Images 0 (class 0), 5 (class 2) and 5 again have one suspect each; 3 and 11 have none.
    with_one = terms(memory, features, indices, kappa=1.0, beta=beta)
    without = terms(memory, features, indices, beta=beta)
    has = torch.tensor([True, False, True, True, False])
    expected = [torch.where(has, a, b) for a, b in zip(with_one, without, strict=True)]
    torch.testing.assert_close(counted.cpu().double(), expected[0] + 0.5 * expected[1], **close)


def test_kappa_of_a_group_that_holds_all_classes_stays_below_the_negatives():
    memory, features, indices = bank_and_batch()
    everyone = suspected_false_negatives(memory, torch.zeros_like(LOOSE))
    assert everyone.others.tolist() == [5] * 6
    losses = hybrid_contrastive_loss(
        features, memory, indices, suspects=everyone, suspects_as="kappa", reduction="none"
    )
    assert losses.isfinite().all()
    alone = hybrid_contrastive_loss(features, memory, indices, suspects=everyone)
    assert alone == 0  # everything excluded


def test_the_bank_may_move_before_backward(device):
    memory, features, indices = bank_and_batch(device)
    grads = []
    for moves in (False, True):
        x = leaf(features, device)
        loss = hybrid_contrastive_loss(x, memory, indices, kappa=0.2, beta=0.1)
        if moves:
            memory.update_(x.detach(), indices)
        loss.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_module(device):
    memory, features, indices = bank_and_batch(device)
    loss = DHCLLoss(instance_weight=0.5, kappa=0.3, beta=0.1)
    assert "kappa=0.3" in repr(loss)
    expected = hybrid_contrastive_loss(
        features, memory, indices, instance_weight=0.5, kappa=0.3, beta=0.1
    )
    assert loss(features, memory, indices) == expected
    value, stats = loss(features, memory, indices, return_stats=True)
    assert value == expected
    assert stats.prototypes.num_negatives.eq(5).all()
    loss.set_suspects(memory, LOOSE.to(device))
    assert loss(features, memory, indices) != expected
    loss.set_suspects(memory, None)
    assert loss(features, memory, indices) == expected
    assert not list(loss.parameters())


def test_whole_bank_compiles(device):
    memory, features, indices = bank_and_batch(device)
    loss = DHCLLoss(kappa=0.3, beta=0.1)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = leaf(features, device), leaf(features, device)
    expected, got = loss(x, memory, indices), compiled(y, memory, indices)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": torch.ones(3, 3)}, TypeError, "memory must be a MemoryBank"),
        ({"features": torch.ones(5)}, ValueError, "features must be 2-D"),
        ({"indices": torch.tensor([0, 1, 2, 3, 12])}, IndexError, r"\[0, 12\) \(got 12"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, ValueError, "one per feature"),
        ({"instance_weight": 0.0, "prototype_weight": 0.0}, ValueError, "must not both be 0"),
        ({"instance_weight": -1.0}, ValueError, "instance_weight must be finite and >= 0"),
        ({"instance_positives": "all"}, ValueError, "'cross-camera' or 'class'"),
        ({"kappa": 5.0}, ValueError, r"number of other prototypes \(got 5 and 5\)"),
        ({"kappa": torch.ones(5)}, TypeError, "kappa must be a number"),
        ({"kappa": 0.2, "tau_plus": 0.1}, ValueError, "kappa or tau_plus, not both"),
        (
            {"kappa": 0.2, "tau_plus": 0.1, "prototype_weight": 0.0},
            ValueError,
            "kappa or tau_plus, not both",
        ),
        ({"suspects_as": "drop"}, ValueError, "'exclude' or 'kappa'"),
        (
            {"suspects": Suspects(torch.zeros(3, dtype=torch.int64), torch.zeros(3))},
            ValueError,
            "one per prototype",
        ),
    ],
)
def test_errors(change, error, message):
    memory, features, indices = bank_and_batch()
    arguments = {"features": features, "memory": memory, "indices": indices, **change}
    with pytest.raises(error, match=f"hybrid_contrastive_loss: .*{message}"):
        hybrid_contrastive_loss(**arguments)


def test_contradictions_and_missing_labels_are_named():
    memory, features, indices = bank_and_batch()
    suspects = suspected_false_negatives(memory, LOOSE)
    with pytest.raises(ValueError, match="sets kappa itself"):
        hybrid_contrastive_loss(
            features, memory, indices, suspects=suspects, suspects_as="kappa", kappa=0.2
        )
    with pytest.raises(ValueError, match=r"loose_labels must be >= -1"):
        suspected_false_negatives(memory, LOOSE - 5)
    with pytest.raises(ValueError, match="one per training image"):
        suspected_false_negatives(memory, LOOSE[:3])
    fresh = MemoryBank(12, 10)
    with pytest.raises(RuntimeError, match="set_labels"):
        hybrid_contrastive_loss(features, fresh, indices)


def test_float16_bank_on_the_cpu():
    memory, features, indices = bank_and_batch()
    half = MemoryBank(len(LABELS), 10, dtype=torch.float16)
    half.init(memory.features)
    half.set_labels(LABELS)
    close = hybrid_contrastive_loss(features, half, indices, kappa=0.2, beta=0.1)
    exact = hybrid_contrastive_loss(features, memory, indices, kappa=0.2, beta=0.1)
    assert math.isclose(float(close), float(exact), rel_tol=5e-3)
    assert debiased_contrastive_loss(features, half.prototypes, half.proto_of[indices]).isfinite()
