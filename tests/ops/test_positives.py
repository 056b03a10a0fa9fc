"""The hardest positive of a class: against a plain loop, its ties, and what it refuses."""

import math

import pytest
import torch

from dhcl_ops import MemoryBank, _ops, hybrid_contrastive_loss
from dhcl_ops.positives import hardest_positives
from tests import checks
from tests.checks import call

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LABELS = torch.tensor([0, 0, 1, -1, 1, 2, 2, 2, -1, 0, 3, 3, 0, 1, 2, 0])
CAMERAS = torch.tensor([0, 1, 0, 0, 0, 1, 2, 2, 1, 2, 0, 1, 0, 0, 1, 1])


def made(d=40, dtype=torch.float32, device="cpu", batch=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    memory = MemoryBank(len(LABELS), d, dtype=dtype, device=device)
    memory.init(torch.randn(len(LABELS), d, generator=generator).to(device))
    memory.set_labels(LABELS.to(device))
    features = torch.nn.functional.normalize(torch.randn(batch, d, generator=generator))
    indices = torch.randint(0, len(LABELS), (batch,), generator=generator)
    return memory, features.to(device), indices.to(device)


def plain(memory, features, indices, cameras):
    """A loop in float64; the rows of a class have similarities that differ."""
    classes, bank = memory.proto_of.cpu(), memory.features.cpu().double()
    found = []
    for feature, own in zip(features.cpu().double(), indices.tolist(), strict=True):
        rows = (classes == classes[own]).nonzero().squeeze(1)
        if cameras is not None:
            rows = rows[cameras[rows] != cameras[own]]
        found.append(int(rows[(bank[rows] @ feature).argmin()]) if len(rows) else own)
    return torch.tensor(found)


@pytest.mark.parametrize("d", [1, 3, 128, 130, 516])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cameras", [None, CAMERAS], ids=["any camera", "others"])
def test_it_is_the_least_similar_row_of_the_class(device, d, dtype, cameras):
    memory, features, indices = made(d, dtype, device)
    there = None if cameras is None else cameras.to(device)
    found = memory.hardest_positives(features, indices, there)
    if d > 1:  # in one dimension rows of norm 1 are equal
        assert torch.equal(found.cpu(), plain(memory, features, indices, cameras))
    arguments = (features, memory.features, indices, memory.proto_of, memory._members)
    expected = call("reference", "hardest_positive", *arguments, memory._offsets, there)
    assert torch.equal(found, expected)


def test_a_class_of_one_camera_has_the_own_row(device):
    memory, features, indices = made(device=device, batch=3)
    indices[:] = torch.tensor([2, 4, 3])  # a class that one camera sees, and an outlier
    others = memory.hardest_positives(features, indices, CAMERAS.to(device))
    assert torch.equal(others, indices)
    assert memory.hardest_positives(features, indices)[2] == 3


def test_of_equal_similarities_the_lowest_row_wins(device):
    memory, _, _ = made(device=device)
    memory.features[:] = memory.features[0]
    features = memory.features[:4].clone()
    indices = torch.tensor([15, 9, 7, 13], device=device)
    assert memory.hardest_positives(features, indices).tolist() == [0, 0, 5, 2]
    others = memory.hardest_positives(features, indices, CAMERAS.to(device))
    assert others.tolist() == [0, 0, 5, 13]


def test_what_is_not_finite_is_never_the_least(device):
    memory, features, indices = made(device=device, batch=2)
    indices[:] = torch.tensor([0, 10])
    memory.features[[1, 9, 10, 11], 3] = torch.tensor([math.nan, math.inf, math.nan, math.inf]).to(
        device
    )
    features[:, 3] = 0.5
    found = memory.hardest_positives(features, indices).tolist()
    assert found[0] in {0, 12, 15}
    assert found[1] == 10


def test_it_has_the_bits_of_any_number_of_threads_and_layout():
    memory, features, indices = made(516, batch=64)
    checks.for_any_thread_count(lambda: memory.hardest_positives(features, indices, CAMERAS))
    wide = torch.stack([features, features], dim=2)[..., 0]
    assert not wide.is_contiguous()
    expected = memory.hardest_positives(features, indices)
    assert torch.equal(memory.hardest_positives(wide, indices), expected)
    assert torch.equal(memory.hardest_positives(features.double(), indices), expected)
    assert len(memory.hardest_positives(features[:0], indices[:0])) == 0


def test_it_compiles_as_one_graph():
    memory, features, indices = made()
    others = made(seed=3)[1:]
    checks.compiles_fullgraph(
        lambda f, i: memory.hardest_positives(f, i, CAMERAS),
        (features, indices),
        others,
        backend="aot_eager",
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 5)}, ValueError, r"features must have shape \(3, 8\)"),
        ({"features": torch.zeros(3, 8).int()}, TypeError, "features must be float32"),
        ({"bank": torch.zeros(4, 8).double()}, TypeError, "bank must be float32"),
        ({"indices": torch.tensor([0, 1])}, ValueError, r"indices must have shape \(3,\)"),
        ({"indices": torch.tensor([0, 1, 4])}, IndexError, r"indices must be in \[0, 4\)"),
        ({"cameras": torch.zeros(3).long()}, ValueError, r"cameras must have shape \(4,\)"),
        ({"cameras": torch.zeros(4)}, TypeError, "cameras must be int64"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "features": torch.zeros(3, 8),
        "bank": torch.zeros(4, 8),
        "indices": torch.tensor([0, 1, 2]),
        "class_of": torch.zeros(4).long(),
        "members": torch.arange(4),
        "offsets": torch.tensor([0, 4]),
    }
    with pytest.raises(error, match=f"hardest_positives: {message}"):
        hardest_positives(**{**arguments, **change})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (3, [0, 0, 7, 0], r"class_of must be in \[0, 1\)"),
        (4, [0, 1, 9, 3], r"members must be in \[0, 4\)"),
        (5, [0, 5], "offsets must ascend"),
        (2, [0, -1, 2], r"indices must be in \[0, 4\)"),
    ],
)
def test_the_op_itself_refuses_lists_that_lead_nowhere(place, value, message):
    if not _ops.OPS["hardest_positive"].compiled("cpu"):
        pytest.skip("the reference looks at fewer numbers")
    arguments = [
        torch.zeros(3, 8),
        torch.zeros(4, 8),
        torch.tensor([0, 1, 2]),
        torch.zeros(4).long(),
        torch.arange(4),
        torch.tensor([0, 4]),
        None,
    ]
    arguments[place] = torch.tensor(value)
    with pytest.raises(RuntimeError, match=f"hardest_positive: {message}"):
        torch.ops.dhcl.hardest_positive(*arguments)


def test_the_loss_pulls_to_it():
    memory, features, indices = made(batch=5)
    rows = memory.hardest_positives(features, indices, CAMERAS)
    options = {"prototype_weight": 0.0, "instance_weight": 1.0, "reduction": "none"}
    got = hybrid_contrastive_loss(
        features, memory, indices, instance_positives="cross-camera", cameras=CAMERAS, **options
    )
    # log(1 + sum of e^((f.v_j - f.v_p) / tau) over the rows of other classes), as it is written.
    f, v = features.double(), memory.features.double()
    gaps = ((f @ v.t()) - (f * v[rows]).sum(1, keepdim=True)) / 0.05
    other = memory.proto_of[indices][:, None] != memory.proto_of
    expected = (1 + (gaps.exp() * other).sum(1)).log()
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["hardest", "cross-camera"])
def test_the_gradient_of_the_loss(kind):
    memory, features, indices = made(d=6, batch=4)
    memory.features.copy_(memory.features.half().float())

    def loss(x):
        return hybrid_contrastive_loss(
            x, memory, indices, instance_weight=0.7, instance_positives=kind, cameras=CAMERAS,
            temperature=0.5,
        )  # fmt: skip

    x = features.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-7)


def test_cross_camera_needs_cameras():
    memory, features, indices = made()
    with pytest.raises(ValueError, match=r"cross-camera. needs cameras"):
        hybrid_contrastive_loss(features, memory, indices, instance_positives="cross-camera")
