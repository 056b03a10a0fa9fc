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
from tests.ops.fuzzing import both, fuzzed, some_rows, unit


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


@st.composite
def awkward_cases(draw):
    """Rows that nearly meet the floor of the estimate, that nearly cancel, or kappa near M."""
    case = draw(cases())
    options = case.options
    if "positives" in options:
        options["positives"] = draw(st.sampled_from(["sum", "mean"]))
    options["temperature"] = draw(st.sampled_from([0.01, 0.05, 0.2, 1.0]))
    offset = draw(st.sampled_from([-1.0, 1.0])) * 10.0 ** draw(st.floats(-9.0, -3.0))
    kind = draw(st.sampled_from(["floor", "cancels", "all negatives"]))
    options["kappa"] = 0.0
    loss, stats = dhcl_ops.debiased_contrastive_loss(
        case.features.double(), case.proxies.double(), case.labels,
        reduction="none", return_stats=True, **options,
    )  # fmt: skip
    # In units of e^r: the mass R, and the floor.
    negatives, mass = stats.num_negatives.double(), loss.expm1()
    floor = (negatives.log() - 1.0 / options["temperature"] - stats.positive_logit).exp()
    floor = floor if kind == "floor" else torch.zeros_like(floor)
    kappa = (mass - floor) / (1.0 - floor / negatives) * (1.0 + offset)
    if kind == "all negatives":
        kappa = negatives * (1.0 - abs(offset))
    possible = kappa.isfinite() & (kappa > 0.0) & (kappa < negatives)
    options["kappa"] = torch.where(possible, kappa, 0.0)
    return case


def slopes(similarities, case):
    """Loss, clamped share and slopes (B, K) of logits in fp64, by proxies that are the axes."""
    proxies = torch.eye(similarities.shape[1], dtype=torch.float64)
    leaf = similarities.clone().requires_grad_()
    loss, stats = dhcl_ops.debiased_contrastive_loss(
        leaf, proxies, case.labels, reduction="none", return_stats=True, **case.options
    )
    loss.sum().backward()
    return loss.detach(), stats.clamped, leaf.grad


def bounds(case):
    """The results in fp64, where every similarity is off by what fp32 may do to it.

    The error of a sum of d products is at most (d + 2) 2^-24 |f|.|p|, that of the scaled logit one
    rounding more, and an exponential's counts as 2^-22 of its logit. A mass with hardness beta
    grows by at most 1 + 2 beta times the largest of them. Loss and clamped share rise and fall with
    the negatives' logits over the positives', so they lie between those of both ends.
    """
    features, proxies = case.features.double(), case.proxies.double()
    width, temperature = features.shape[1], case.options["temperature"]
    off = 2.0**-24 * (width + 3) * (features.abs() @ proxies.abs().t()) + 2.0**-22 * temperature
    off = off.amax(1, keepdim=True) * (1.0 + 2.0 * case.options["beta"])
    classes = case.options.get("proxy_labels", torch.arange(len(proxies)))
    away = torch.where(classes == case.labels[:, None], -off, off)
    similarities = features @ proxies.t()
    low, middle, high = (slopes(similarities + sign * away, case) for sign in (-1, 0, 1))
    # Slopes go with e^-loss above the floor, and are largest just above it.
    apart = (low[2] - middle[2]).abs() + (high[2] - middle[2]).abs()
    apart += high[2].abs() * (high[0] - low[0]).expm1()[:, None]
    apart += 2.0**-24 * (width + len(proxies) + 3) * middle[2].abs()
    exact = middle[2] @ proxies, middle[2].t() @ features
    reach = apart @ proxies.abs(), apart.t() @ features.abs()
    return low, high, exact, reach


@fuzzed(40)
@given(awkward_cases())
def test_fuzz_loss_where_rounding_decides(case):
    """Compiled and reference may differ by any amount there: both are as right as fp32 can be."""
    low, high, exact, reach = bounds(case)
    for loss, clamped, *gradients in both(lambda: run(case, torch.float32)):
        tolerance = 1e-6 * (1.0 + high[0])
        assert (loss >= low[0] - tolerance).all()
        assert (loss <= high[0] + tolerance).all()
        assert (clamped <= low[1]).all()
        assert (clamped >= high[1]).all()
        for got, true, off in zip(gradients, exact, reach, strict=True):
            assert ((got - true).abs() <= 2.0 * off + 1e-6).all()
