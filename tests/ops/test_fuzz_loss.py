"""The contrastive loss on generated inputs: compiled against the reference, and both against fp64.

Losses and gradients are compared to a tolerance that follows from the inputs. What amplifies
rounding is the difference R - kappa e^r of the debiased estimate: where the two nearly cancel, an
error of R is larger in the difference by the factor R / (R - kappa e^r), and where the difference
meets the floor, one of two neighbouring inputs is clamped and has no gradient towards its
negatives. Such rows are told by the same loss in fp64, moved by fp32's rounding.
"""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

import dhcl_ops
from dhcl_ops import _contrastive_stream, _ops
from tests.ops.fuzzing import fuzzed, some_rows, unit


@dataclasses.dataclass
class Case:
    features: torch.Tensor
    proxies: torch.Tensor
    labels: torch.Tensor
    options: dict


@st.composite
def cases(draw):
    features = unit(draw(some_rows(most=6, width=8, least=1)))
    proxies = unit(draw(some_rows(most=40, width=8, least=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):  # a trained model: features lie near their proxies
        near = torch.randint(0, len(proxies), (len(features),), generator=generator)
        features = unit(proxies[near] + 0.1 * features)
    options = {
        "temperature": draw(st.sampled_from([0.05, 0.07, 1.0, 0.01])),
        "kappa": draw(st.sampled_from([0.0, 0.25, 0.9, 1e-20])),
        "beta": draw(st.sampled_from([0.0, 0.1, 1.0, 1e-300])),
        "hardness_gradient": draw(st.sampled_from(["stop", "through"])),
        "chunk_size": draw(st.sampled_from([None, 1, 7, 16])),
    }
    labels = torch.randint(0, len(proxies), (len(features),), generator=generator)
    if draw(st.booleans()):
        classes = torch.arange(len(proxies)) % max(len(proxies) // 2, 1)
        options["proxy_labels"] = classes
        options["positives"] = draw(st.sampled_from(["each", "sum", "mean"]))
        labels = classes[labels]
        # Smaller than the number of negatives, which may be one.
        options["kappa"] = min(options["kappa"], 0.5)
    if draw(st.booleans()):
        options["exclude"] = torch.randint(-1, 1, (len(features), 2), generator=generator)
    return Case(features, proxies, labels, options)


def run(case, dtype, *, move=0.0):
    """Loss and gradients; ``move`` shifts each input by that share of itself."""
    leaves = [x.to(dtype).mul(1.0 + move).requires_grad_() for x in (case.features, case.proxies)]
    loss, stats = dhcl_ops.debiased_contrastive_loss(
        *leaves, case.labels, reduction="none", return_stats=True, **case.options
    )
    loss.sum().backward()
    return [loss.detach(), stats.clamped, *(leaf.grad for leaf in leaves)]


def on_reference(case, dtype):
    compiled = _contrastive_stream.contrastive
    _contrastive_stream.contrastive = _ops.OPS["contrastive"].reference
    try:
        return run(case, dtype)
    finally:
        _contrastive_stream.contrastive = compiled


def spread(case):
    """How far fp32's rounding of the inputs moves each result, in fp64."""
    low, middle, high = (run(case, torch.float64, move=m) for m in (-3e-7, 0.0, 3e-7))
    return middle, [
        torch.maximum((a - b).abs(), (c - b).abs())
        for a, b, c in zip(low, middle, high, strict=True)
    ]


@fuzzed(60)
@given(cases())
def test_fuzz_loss(case):
    truth, moved = spread(case)
    compiled, reference = run(case, torch.float32), on_reference(case, torch.float32)
    temperature = case.options["temperature"]
    for got in (compiled, reference):
        for value, true, reach in zip(got, truth, moved, strict=True):
            assert value.isfinite().all()
            largest = max(float(reach.max()), 1e-6 / temperature) * 20
            scale = max(float(true.abs().max()), 1.0)
            assert float((value.double() - true).abs().max()) <= largest * scale, (value, true)


@fuzzed(30)
@given(cases())
def test_fuzz_loss_in_fp64(case):
    case.features, case.proxies = case.features.double(), case.proxies.double()
    compiled, reference = run(case, torch.float64), on_reference(case, torch.float64)
    for a, b in zip(compiled, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
