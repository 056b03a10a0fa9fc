"""Losses, their gradients and updates of the bank read nothing from a CUDA device."""

import sys
import types

import pytest
import torch
from torch.nn.functional import normalize

import dhcl_ops.contrastive
import dhcl_ops.memory
from dhcl_ops import (
    DHCLLoss,
    FalseNegatives,
    MemoryBank,
    _arrays,
    debiased_contrastive_loss,
    momentum_update_,
    suspected_false_negatives,
)
from tests.unread import UnreadDevice, backward

LABELS = torch.tensor([0, 0, 1, -1, 1, 2, 2, 2, -1, 0, 3, 3])
LOOSE = torch.tensor([4, 4, 4, -1, 4, 0, 0, 0, 0, 4, 2, 1])


@pytest.fixture
def there(monkeypatch):
    # The first features of a process are looked at, which waits once.
    monkeypatch.setattr(dhcl_ops.contrastive, "_norm_seen", True)
    return UnreadDevice()


def case(rows=5, columns=12, width=10):
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(rows, width, generator=generator)).requires_grad_()
    proxies = normalize(torch.randn(columns, width, generator=generator))
    return features, proxies, torch.arange(rows)


def test_a_value_is_not_read_and_nothing_is_copied(there):
    """The device does refuse what the other tests say does not happen."""
    value = there.of(torch.ones(3))
    reads = [
        lambda: value.sum().item(),
        lambda: value.tolist(),
        lambda: bool(value.sum() > 0),
        lambda: value.nonzero(),
        lambda: value[value > 0],
        lambda: value.cpu(),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3, device="cuda").copy_(torch.ones(3)),
    ]
    for read in reads:
        with pytest.raises((RuntimeError, AssertionError)), there.unread():
            read()


VARIANTS = {
    "cross-entropy": {},
    "debiased, hard": {"kappa": 0.3, "beta": 0.1},
    "a prior": {"tau_plus": 0.1},
    "kappa of each row": {"kappa": torch.full((5,), 0.2)},
    "groups": {"exclude": (torch.arange(5), torch.arange(12))},
    "lists": {"exclude": torch.full((5, 2), -1)},
    "positives of a class": {"proxy_labels": torch.arange(12) % 6, "positives": "mean"},
    "weights differentiated": {"beta": 0.1, "hardness_gradient": "through"},
    "fast": {"precision": "fast", "reduction": "sum"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_its_gradient(there, variant):
    def moved(value):
        if isinstance(value, tuple):
            return tuple(map(there.of, value))
        return there.of(value) if isinstance(value, torch.Tensor) else value

    arguments = {name: moved(value) for name, value in VARIANTS[variant].items()}
    features, proxies, labels = map(there.of, case())
    with there.unread():
        loss, stats = debiased_contrastive_loss(
            features, proxies, labels, return_stats=True, **arguments
        )
        backward(loss)
    assert features.grad.shape == features.shape
    assert features.grad.device == loss.device == stats.clamped_fraction.device
    assert loss.device.type == "cuda"


HYBRID = {
    "defaults": {},
    "prototypes alone": {"instance_weight": 0.0},
    "positives of the class": {"instance_positives": "class"},
    "hardest positive of another camera": {"instance_positives": "cross-camera"},
    "false negatives by the graph": {"kappa": 0.0, "false_negatives": True},
    "suspects excluded": {"beta": 0.1, "suspects": "exclude"},
    "suspects counted": {"kappa": 0.0, "suspects": "kappa"},
}


@pytest.mark.parametrize("variant", HYBRID)
@pytest.mark.parametrize("normalised", [False, True])
def test_a_step_of_the_hybrid_loss_and_the_bank(there, variant, normalised):
    features, rows, indices = case()
    bank = MemoryBank(12, 10, normalize_prototypes=normalised)
    bank.init(rows)
    bank.set_labels(LABELS)
    settings = dict(HYBRID[variant])
    suspects_as = settings.pop("suspects", None)
    listed = settings.pop("false_negatives", False)
    loss = DHCLLoss(**settings, **({"suspects_as": suspects_as} if suspects_as else {}))
    if suspects_as:
        suspects = suspected_false_negatives(bank, LOOSE)
        loss._suspects = suspects._replace(
            groups=there.of(suspects.groups), others=there.of(suspects.others)
        )
    if listed:
        lists = torch.arange(13), torch.arange(12) % 6, torch.full((12,), -0.5)
        loss.set_false_negatives(FalseNegatives(*map(there.of, lists)))
    there.move(bank)
    features, indices = there.of(features), there.of(indices)
    cameras = there.of(torch.arange(12) % 3)
    with there.unread():
        value, stats = loss(features, bank, indices, cameras=cameras, return_stats=True)
        backward(value)
        bank.update_(features.detach(), indices)
    assert features.grad.shape == features.shape
    assert stats.prototype_loss.device == bank.features.device == value.device


def test_the_update_of_rows(there):
    features, rows, indices = (there.of(each.detach()) for each in case())
    skipped = there.of(torch.zeros(1, dtype=torch.int64))
    with there.unread():
        assert momentum_update_(rows, features, indices, 0.2, skipped=skipped) is rows


class CupyArray:
    """As much of an array of CuPy, which needs a GPU, as the ops look at."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def handed_over(monkeypatch):
    """Tensors that CuPy, whose current stream then waits, was given."""
    seen = []
    monkeypatch.setitem(
        sys.modules, "cupy", types.SimpleNamespace(ndarray=CupyArray, from_dlpack=seen.append)
    )
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", lambda array: array.tensor)
    return seen


def test_the_stream_of_cupy_waits_for_an_update_of_its_array(there, handed_over, monkeypatch):
    features, rows, indices = (CupyArray(there.of(each.detach())) for each in case())
    update = dhcl_ops.memory._momentum_update

    def watched(*arguments):
        assert not handed_over
        update(*arguments)

    monkeypatch.setattr(dhcl_ops.memory, "_momentum_update", watched)
    with there.unread():
        assert momentum_update_(rows, features, indices, 0.2) is rows
    assert [tensor.device.type for tensor in handed_over] == ["cuda"]


def test_the_stream_of_cupy_waits_for_an_update_that_reads_its_array(there, handed_over):
    features, rows, indices = case()
    bank = MemoryBank(12, 10)
    bank.init(rows)
    bank.set_labels(LABELS)
    there.move(bank)
    features, indices = there.of(features.detach()), there.of(indices)
    with there.unread():
        bank.update_(features, indices)
        assert not handed_over
        bank.update_(CupyArray(features), indices)
    assert [tensor.device.type for tensor in handed_over] == ["cuda"]


def test_no_stream_waits_for_arrays_on_the_host(handed_over):
    features, rows, indices = (CupyArray(each.detach()) for each in case())
    momentum_update_(rows, features, indices, 0.2)
    assert not handed_over
    assert _arrays.is_array(rows)
