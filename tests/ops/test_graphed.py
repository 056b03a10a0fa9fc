"""A step from graphs (on the CPU: from its parts, called) has the bits of the plain step."""

import copy

import pytest
import torch

from dhcl_ops import DHCLLoss, GraphedStep, MemoryBank
from tests import checks
from tests.conftest import needs_cuda
from tests.ops.test_contrastive import leaf
from tests.ops.test_hybrid import LABELS, LOOSE, bank_and_batch

VARIANTS = {
    "defaults": {},
    "prototypes alone": {"instance_weight": 0.0},
    "positives of the class": {"instance_positives": "class"},
    "hardest positive": {"instance_positives": "hardest"},
    "hardest positive of another camera": {"instance_positives": "cross-camera"},
    "weights differentiated": {"hardness_gradient": "through", "beta": 0.2},
    "suspects excluded": {"beta": 0.1, "suspects": "exclude"},
    "suspects counted": {"kappa": 0.0, "suspects": "kappa"},
    "fast": {"precision": "fast"},
}


def loss_of(variant, memory):
    settings = dict(VARIANTS[variant])
    suspects_as = settings.pop("suspects", None)
    loss = DHCLLoss(**settings, **({"suspects_as": suspects_as} if suspects_as else {}))
    if suspects_as:
        loss.set_suspects(memory, LOOSE.to(memory.labels.device))
    return loss


def batches(device, count=4):
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        features = torch.nn.functional.normalize(torch.randn(5, 10, generator=generator))
        if number == 2:
            features[1] = torch.nan
        indices = torch.randint(0, len(LABELS), (5,), generator=generator)
        yield features.to(device), indices.to(device)


def same_memory(a, b):
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_has_the_bits_of_the_plain_step(device, variant):
    memory, features, indices = bank_and_batch(device)
    twin = copy.deepcopy(memory)
    loss = loss_of(variant, memory)
    cameras = (torch.arange(len(LABELS)) % 2).to(device)
    step = GraphedStep(loss, memory, features, indices, cameras=cameras)
    assert same_memory(memory, twin)
    for number, (given, rows) in enumerate(batches(device)):
        if number == 2:  # the loss refuses what is not finite on the CPU
            given = given.nan_to_num(0.3)
        x, y = leaf(given, device), leaf(given, device)
        expected, stats = loss(x, twin, rows, cameras=cameras, return_stats=True)
        value = step(y, rows)
        assert checks.same_bits(value.detach(), expected.detach())
        assert torch.equal(step.stats.prototype_loss, stats.prototype_loss)
        for ours, theirs in zip(step.stats.prototypes, stats.prototypes, strict=True):
            assert torch.equal(ours, theirs)
        # As with accumulated gradients, and with the scale of fp16.
        (expected / 3 * 1024).backward()
        (value / 3 * 1024).backward()
        assert checks.same_bits(y.grad, x.grad)
        twin.update_(x.detach(), rows)
        step.update_()
        assert same_memory(memory, twin)


def test_values_and_gradients_outlive_the_next_call(device):
    memory, features, indices = bank_and_batch(device)
    step = GraphedStep(DHCLLoss(), memory, features, indices)
    kept = []
    for given, rows in list(batches(device))[:2]:
        x = leaf(given, device)
        value = step(x, rows)
        value.backward()
        kept.append((value.detach(), value.detach().clone(), x.grad, x.grad.clone()))
    for value, value_then, grad, grad_then in kept:
        assert torch.equal(value, value_then)
        assert torch.equal(grad, grad_then)
    assert not torch.equal(kept[0][2], kept[1][2])


def test_features_that_are_not_finite_are_skipped_and_counted(device):
    memory, features, indices = bank_and_batch(device)
    step = GraphedStep(DHCLLoss(), memory, features, indices)
    assert memory.skipped == 0
    before = memory.features.clone()
    step(features, indices)
    step._features.detach()[0] = torch.nan
    step.update_()
    assert memory.skipped == 1
    assert torch.equal(memory.features[indices[0]], before[indices[0]])
    assert not torch.equal(memory.features[indices[1]], before[indices[1]])


def test_what_was_saved_of_the_bank_is_known_to_have_moved(device):
    memory, features, indices = bank_and_batch(device)
    step = GraphedStep(DHCLLoss(), memory, features, indices)
    step(features, indices)
    weight = torch.ones((), device=device, requires_grad=True)
    other = (memory.features * weight).sum()
    step.update_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_it_is_refused_where_it_would_be_of_another_step(device):
    memory, features, indices = bank_and_batch(device)
    loss = DHCLLoss()
    step = GraphedStep(loss, memory, features, indices)
    with pytest.raises(RuntimeError, match="GraphedStep: update_ is of the batch of a call"):
        step.update_()
    x = leaf(features, device)
    first = step(x, indices)
    step(x, indices)
    with pytest.raises(RuntimeError, match="GraphedStep: backward must come before the next call"):
        first.backward()
    moved = step(x, indices)
    step.update_()
    with pytest.raises(RuntimeError, match="GraphedStep: backward must come before the bank's"):
        moved.backward()
    with pytest.raises(ValueError, match=r"GraphedStep: features must be as .* \(got \(4, 10\)"):
        step(features[:4], indices)
    with pytest.raises(ValueError, match=r"GraphedStep: features must be as .*float64"):
        step(features.double(), indices)
    with pytest.raises(ValueError, match=r"GraphedStep: indices must be as .*\(got \(3,\) int64"):
        step(features, indices[:3])
    with pytest.raises(TypeError, match="GraphedStep: indices must be a tensor"):
        step(features, [0, 1, 2, 3, 4])
    loss.settings["kappa"] = 0.1
    with pytest.raises(RuntimeError, match="GraphedStep: the loss's settings changed since"):
        step(features, indices)
    loss.settings["kappa"] = 0.25
    step(features, indices)
    loss.set_suspects(memory, LOOSE.to(device))
    with pytest.raises(RuntimeError, match="GraphedStep: labels or suspects were set since"):
        step(features, indices)
    loss.set_suspects(memory, None)
    memory.set_labels(LABELS.to(device))
    with pytest.raises(RuntimeError, match="GraphedStep: labels or suspects were set since"):
        step(features, indices)


def test_wrong_arguments_are_named_at_once():
    memory, features, indices = bank_and_batch()
    with pytest.raises(TypeError, match="GraphedStep: features must be float32"):
        GraphedStep(DHCLLoss(), memory, features.double(), indices)
    with pytest.raises(RuntimeError, match="set_labels"):
        GraphedStep(DHCLLoss(), MemoryBank(12, 10), features, indices)
    with pytest.raises(IndexError, match=r"\[0, 12\) \(got 12"):
        GraphedStep(DHCLLoss(), memory, features, indices + 1)


@needs_cuda
def test_on_cuda_a_step_waits_for_nothing():
    memory, features, indices = bank_and_batch("cuda")
    step = GraphedStep(DHCLLoss(), memory, features, indices)
    x = leaf(features, "cuda")

    def run():
        step(x, indices).backward()
        step.update_()

    run()
    checks.no_host_synchronisation(run)
