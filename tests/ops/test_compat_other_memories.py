"""The memories of ISE, HHCL and OpenUnReID against the same written out plainly."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dhcl_ops.compat import hhcl, ise, openunreid
from tests.ops.test_compat_memories import (
    LABELS,
    PlainCluster,
    PlainHybrid,
    close,
    cluster_pair,
    one_step,
    unit_rows,
)

TARGETS = torch.tensor([2, 0, 2, 5, 5, 2, 0, 1, 2, 5])


@pytest.mark.parametrize("sample_type", ["hard", "ori"])
def test_ise_chooses_the_update_by_sample_type(sample_type):
    hard = sample_type == "hard"
    _, plain = cluster_pair(6, use_hard=hard)
    memory = ise.ClusterMemory(24, 6, use_hard=not hard, sample_type=sample_type)
    memory.features = plain.features.clone()
    close(*one_step(memory, plain, 3.0 * unit_rows(10, 24, 1), TARGETS))


class PlainSmoothed(PlainCluster):
    """HHCL's: no normalisation, and a tenth of the target on the likeliest fiftieth, or on all."""

    def __init__(self, features, smooth, use_hard):
        super().__init__(features, use_hard=use_hard)
        self.share = 0.1 if smooth else 0.0

    def loss(self, inputs, targets):
        log_p = (inputs @ self.features.T / self.temp).log_softmax(1)
        total = 0.0
        for row, target in zip(log_p, targets.tolist(), strict=True):
            likeliest = len(row) // 50
            wanted = torch.full_like(row, self.share / len(row))
            if likeliest > 1:
                wanted = torch.zeros_like(row)
                wanted[row.argsort(descending=True)[:likeliest]] = self.share / likeliest
            wanted[target] += 1.0 - self.share
            total = total - (wanted.detach() * row).sum()
        return total / len(inputs)


@pytest.mark.parametrize("mode", ["CM", "CMhard"])
@pytest.mark.parametrize("smooth", [0.0, 0.3])
@pytest.mark.parametrize("clusters", [30, 160])
def test_hhcl_step(mode, smooth, clusters):
    features = unit_rows(clusters, 24, 0)
    memory = hhcl.ClusterMemory(24, clusters, mode=mode, smooth=smooth)
    memory.features = features.clone()
    plain = PlainSmoothed(features, smooth, mode == "CMhard")
    close(*one_step(memory, plain, unit_rows(10, 24, 1), TARGETS))


def test_hhcl_does_not_normalise():
    features, inputs = unit_rows(6, 24, 0), 2.0 * unit_rows(10, 24, 1)
    memory = hhcl.ClusterMemory(24, 6, temp=0.5)
    memory.features = features
    loss = memory(inputs, TARGETS)
    expected = nn.functional.cross_entropy(inputs @ features.T / 0.5, TARGETS)
    close((loss,), (expected,))


def test_hhcl_refuses_hybrid_banks_and_wrong_targets():
    for mode in ("CMhybrid", "CMhybrid_v2"):
        with pytest.raises(ValueError, match=r"mode must be 'CM' or 'CMhard'.*hybrid banks"):
            hhcl.ClusterMemory(24, 6, mode=mode)
    memory = hhcl.ClusterMemory(24, 6, smooth=0.1)
    with pytest.raises(IndexError, match=r"targets must be in \[0, 6\) \(got 6 at"):
        memory(unit_rows(2, 24, 1), torch.tensor([0, 6]))


def openunreid_memory(labels):
    memory = openunreid.HybridMemory(num_features=24, num_memory=len(labels))
    memory._update_feature(2.0 * unit_rows(len(labels), 24, 0))
    memory._update_label(labels)
    return memory


def test_openunreid_takes_a_dictionary():
    labels = LABELS["numbers without images"]
    memory = openunreid_memory(labels)
    plain = PlainHybrid(memory.features, labels)
    inputs = 3.0 * unit_rows(8, 24, 1)
    indexes = torch.tensor([3, 0, 3, 11, 5, 3, 0, 8])
    ours, theirs = (inputs.clone().requires_grad_() for _ in range(2))
    loss = memory({"feat": ours, "prob": None}, indexes)
    loss.backward()
    expected = plain.loss(nn.functional.normalize(theirs), indexes)
    expected.backward()
    plain.update(nn.functional.normalize(inputs), indexes)
    close((loss, ours.grad, memory.features), (expected, theirs.grad, plain.features))
    with pytest.raises(TypeError, match="results must be a dictionary with 'feat'"):
        memory(ours, indexes)


def openunreid_steps(rank, store):
    """Two steps of one of two processes; the bank after each."""
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        memory = openunreid_memory(torch.arange(12) // 3)
        banks = []
        for step in range(2):
            inputs = unit_rows(3, 24, 10 * step + rank).requires_grad_()
            memory({"feat": inputs}, torch.tensor([0, 4, 7]) + rank).backward()
            banks.append(memory.features.clone())
    finally:
        torch.distributed.destroy_process_group()
    return torch.stack(banks)


def test_openunreid_moves_the_rows_of_all_processes(tmp_path):
    store, other = f"file://{tmp_path}/store", tmp_path / "other.pt"
    source = (
        "import sys, torch; from tests.ops.test_compat_other_memories import openunreid_steps; "
        "torch.save(openunreid_steps(1, sys.argv[1]), sys.argv[2])"
    )
    child = subprocess.Popen([sys.executable, "-c", source, store, str(other)])
    banks = openunreid_steps(0, store)
    assert child.wait() == 0
    assert torch.equal(torch.load(other), banks)
    memory = openunreid_memory(torch.arange(12) // 3)
    plain = PlainHybrid(memory.features, memory.labels)
    for step, bank in enumerate(banks):
        for rank in range(2):
            plain.update(unit_rows(3, 24, 10 * step + rank), torch.tensor([0, 4, 7]) + rank)
        close((bank,), (plain.features,))
