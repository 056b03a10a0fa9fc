"""The contrastive loss against plain formulas in float64, and its checklist."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import dhcl_ops
from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops import _contrastive_stream as streaming
from dhcl_ops import _ops, debiased_contrastive_loss
from dhcl_ops import contrastive as module
from tests import checks
from tests.conftest import needs_cuda
from tests.unread import UnreadDevice

OPS = sorted(name for name, op in _ops.OPS.items() if op.family == "contrastive")
MODES = ("each", "sum", "mean")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def unit(rows, d, seed=0, together=1.0, dtype=torch.float64):
    """Rows of norm 1 that have something in common, as features have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    centre = torch.randn(d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return F.normalize(x + together * centre).to(dtype)


def plain(
    f, c, positive, negative, *, tau=0.05, kappa=0.0, tau_plus=None, beta=0.0, mode="each",
    frozen=None,
):  # fmt: skip
    """Losses (B,) row by row, as the papers write them: exponentials, means, a maximum.

    ``frozen`` are the logits the hardness weights are computed from, for "stop".
    """
    losses = []
    s = f @ c.t() / tau
    for i in range(len(f)):
        n = s[i][negative[i]]
        m = len(n)
        if m == 0:
            losses.append(0.0 * s[i].sum())
            continue
        w = (beta * (s if frozen is None else frozen)[i][negative[i]]).exp()
        reweighted = (w * n.exp()).sum() / w.mean()
        prior = kappa / m if tau_plus is None else tau_plus

        def one(e, m=m, prior=prior, reweighted=reweighted):
            mass = (reweighted - m * prior * e) / (1 - prior)
            mass = mass.clamp(min=m * math.exp(-1 / tau))
            return -(e / (e + mass)).log()

        e = s[i][positive[i]].exp()
        if mode == "each":
            losses.append(torch.stack([one(x) for x in e]).mean())
        else:
            losses.append(one(e.sum() if mode == "sum" else e.mean()))
    return torch.stack(losses)


def leaf(t, device, dtype=None):
    return t.detach().to(device, dtype, copy=True).requires_grad_()


def one_hot(labels, k):
    return F.one_hot(labels, k).bool()


def case(b=6, k=23, d=12, seed=0, several=False):
    """Features, proxies, labels, proxy labels or None, and the masks of positives and negatives."""
    generator = torch.Generator().manual_seed(seed + 1)
    f, c = unit(b, d, seed), unit(k, d, seed + 7)
    if several:
        proxy_labels = torch.arange(k) % 5
        labels = torch.randint(5, (b,), generator=generator)
        positive = labels[:, None] == proxy_labels
    else:
        proxy_labels = None
        labels = torch.randint(k, (b,), generator=generator)
        positive = one_hot(labels, k)
    return f, c, labels, proxy_labels, positive, ~positive


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_debiasing_and_hardness_it_is_cross_entropy(device, dtype, chunk):
    f, c, labels, *_ = case(9, 101, 40)
    leaves = [leaf(t, device, dtype) for t in (f, c)]
    truth = [leaf(t, "cpu") for t in (f, c)]
    ours = debiased_contrastive_loss(*leaves, labels.to(device), chunk_size=chunk)
    expected = F.cross_entropy(truth[0] @ truth[1].t() / 0.05, labels)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours.cpu().double(), expected, **tolerance)
    ours.backward()
    expected.backward()
    for a, b in zip(leaves, truth, strict=True):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, **tolerance)


def two_views(n=8, d=16):
    """Two views of n images, as in the code of both papers: 2n rows, 2n - 2 negatives each."""
    x = unit(n, d, 3)
    views = F.normalize(torch.cat([x, x + 0.3 * unit(n, d, 4, 0.0)]))
    partner = torch.arange(2 * n).roll(n)
    own = torch.stack([torch.arange(2 * n)], dim=1)
    return views, partner, own


@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["DCL", "HCL"])
def test_published_formulas_at_their_own_settings(device, beta):
    """Equation 8 of Chuang et al. 2020 and equation 5 of Robinson et al. 2021, written out.

    Temperature 0.5, tau+ 0.1, and the image itself left out of its negatives.
    """
    views, partner, own = two_views()
    count, t, prior = 14, 0.5, 0.1
    expected = []
    for i, x in enumerate(views):
        e = [math.exp(float(x @ y) / t) for y in views]
        positive = e[partner[i]]
        negatives = [v for j, v in enumerate(e) if j not in (i, int(partner[i]))]
        importance = [v**beta for v in negatives]
        mean = sum(importance) / count
        reweighted = sum(w * v / mean for w, v in zip(importance, negatives, strict=True)) / count
        g = max((reweighted - prior * positive) / (1 - prior), math.exp(-1 / t))
        expected.append(-math.log(positive / (positive + count * g)))
    arguments = [t.to(device) for t in (views, views, partner)]
    losses = debiased_contrastive_loss(
        *arguments, temperature=t, tau_plus=prior, beta=beta, exclude=own.to(device),
        reduction="none",
    )  # fmt: skip
    truth = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(losses.cpu(), truth, rtol=1e-12, atol=1e-12)


SETTINGS = [
    {"tau": 0.5, "kappa": 0.0, "beta": 1.0},
    {"tau": 0.5, "kappa": 2.0, "beta": 0.5},
    {"tau": 0.05, "kappa": 0.25, "beta": 0.1},
    {"tau": 0.05, "kappa": 1.0, "beta": 0.0},
    {"tau": 0.2, "tau_plus": 0.3, "beta": 2.0},
    {"tau": 0.2, "tau_plus": 0.9, "beta": 1.0},  # on the clamp
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("several", [False, True])
def test_loss_and_statistics(device, implementation, monkeypatch, options, mode, several):
    if implementation == "reference":
        on_reference(monkeypatch)
    f, c, labels, proxy_labels, positive, negative = case(several=several)
    expected = plain(f, c, positive, negative, mode=mode, **options)
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    named = {"temperature" if k == "tau" else k: v for k, v in options.items()}
    losses, stats = debiased_contrastive_loss(
        to(f), to(c), to(labels), proxy_labels=to(proxy_labels), positives=mode,
        reduction="none", return_stats=True, chunk_size=5, **named,
    )  # fmt: skip
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-10, atol=1e-10)
    s = f @ c.t() / options["tau"]
    hidden = s.masked_fill(~negative, -math.inf)
    assert torch.equal(stats.num_negatives.cpu(), negative.sum(1))
    assert torch.equal(stats.hardest_index.cpu(), hidden.argmax(1))
    torch.testing.assert_close(stats.hardest_negative.cpu(), hidden.amax(1))
    p = ((1 + options["beta"]) * hidden).softmax(1)
    torch.testing.assert_close(stats.effective_negatives.cpu(), 1 / (p * p).sum(1))
    r = s.masked_fill(~positive, -math.inf).logsumexp(1)
    if mode != "sum":
        r = r - positive.sum(1).log()
    torch.testing.assert_close(stats.positive_logit.cpu(), r)
    # Clamped rows are those where the plain formula takes its floor.
    floored = []
    for i in range(len(f)):
        m = int(negative[i].sum())
        n = s[i][negative[i]]
        w = (options["beta"] * n).exp()
        reweighted = (w * n.exp()).sum() / w.mean()
        prior = options.get("tau_plus", options.get("kappa", 0.0) / m)
        e = s[i][positive[i]].exp()
        e = e if mode == "each" else (e.sum() if mode == "sum" else e.mean())[None]
        mass = (reweighted - m * prior * e) / (1 - prior)
        floored.append((mass <= m * math.exp(-1 / options["tau"])).double().mean())
    torch.testing.assert_close(stats.clamped.cpu(), torch.stack(floored))
    torch.testing.assert_close(stats.clamped_fraction.cpu(), torch.stack(floored).mean())


def on_reference(monkeypatch):
    """Run the small ops by their reference; the streaming around them is Python in both cases."""
    for name, op in (("stream", "contrastive_stream_"), ("finish", "contrastive_finish")):
        monkeypatch.setattr(kernels, name, _ops.OPS[op].reference)
    monkeypatch.setattr(streaming, "contrastive", _ops.OPS["contrastive"].reference)


@pytest.mark.parametrize(
    "name", ["contrastive_stream_", "contrastive_finish", "contrastive_slopes_"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_kernels_equal_their_reference(device, name, dtype, mode, beta):
    inputs = kernel_inputs(name, dtype, mode, beta)
    inputs = [t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs]
    ours, expected = checks.clones(inputs), checks.clones(inputs)
    returned = checks.call("compiled", name, *ours) or ()
    wanted = checks.call("reference", name, *expected) or ()
    assert_kernels_agree(ours + list(returned), expected + list(wanted), dtype)


def assert_kernels_agree(ours, expected, dtype):
    # The ways to take an exponential differ by units in the last place.
    # A slope is a difference of two of them.
    rtol = 2e-6 if dtype == torch.float32 else 1e-12
    for a, b in zip(ours, expected, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            finite = b[b.isfinite()]
            atol = rtol * float(finite.abs().max()) if finite.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def kernel_inputs(name, dtype, mode, beta, b=7, k=205, start=31, weights=None):
    """Arguments of one kernel, in the middle of a stream: some columns came before."""
    generator = torch.Generator().manual_seed(mode)
    products = (torch.rand(b, k, generator=generator, dtype=torch.float64) - 0.3).to(dtype)
    before = (torch.rand(b, start, generator=generator, dtype=torch.float64) - 0.3).to(dtype)
    total = start + k
    labels = torch.randint(total, (b,), generator=generator)
    proxy_labels = None
    if mode != kernels.SUM:
        proxy_labels = torch.randint(9, (total,), generator=generator)
        labels = labels % 9
    row_groups = torch.randint(-1, 4, (b,), generator=generator)
    column_groups = torch.randint(-1, 4, (total,), generator=generator)
    excluded = torch.randint(-1, total, (b, 6), generator=generator)
    roles = (labels, proxy_labels, row_groups, column_groups, excluded)
    each = mode == kernels.EACH
    state, counts, slots = kernels.new_sums(b, total if each else None, torch.device("cpu"))
    scale = 1 / 0.05
    earlier = (state, counts, slots, before, None, None, *roles, 0, scale, beta, 1.0)
    checks.call("reference", "contrastive_stream_", *earlier)
    out = torch.full((b, k), 7.0, dtype=weights or dtype)
    factors = torch.full((b,), 7.0, dtype=dtype)
    stream = (state, counts, slots, products, out, factors, *roles, start, scale, beta, 0.5)
    if name == "contrastive_stream_":
        return list(stream)
    later = checks.clones(stream)
    checks.call("reference", "contrastive_stream_", *later)
    state, counts, slots = later[:3]
    assert (counts[:, 1] > 0).sum() > 1
    kappa = torch.linspace(0, 2, b, dtype=torch.float64)
    state, counts = state[counts[:, 1] > 0], counts[counts[:, 1] > 0]
    if name == "contrastive_finish":
        live = later[1][:, 1] > 0
        held = None if slots is None else slots[live].contiguous()
        return [state, counts, held, kappa[live], False, mode, 0.05, beta, True]
    state, counts = later[:2]
    counts[:, 1].clamp_(min=1)
    state[:, kernels.POSITIVE_MASS].clamp_(min=1.0)
    state[:, kernels.POSITIVE_MAX].clamp_(min=-10.0)
    finish = (state, counts, slots, kappa, False, mode, 0.05, beta, True)
    _, rows = checks.call("reference", "contrastive_finish", *finish)
    grad = torch.linspace(-1, 1, b, dtype=torch.float64)
    return [products, rows, state, counts, grad, *roles, start, scale, beta, mode]


def torch_fuses_multiply_and_add():
    """Whether torch's addcmul rounds once on this processor."""
    x = torch.full((64,), 1 + 2.0**-12)
    return bool((torch.full((64,), -1.0).addcmul(x, x) == 2.0**-11 + 2.0**-24).all())


@pytest.mark.parametrize("features_dtype", FLOATS)
@pytest.mark.parametrize("proxies_dtype", FLOATS)
@pytest.mark.parametrize("chunk", [0, 16, 100])
@pytest.mark.parametrize("kind", ["one pass", "one pass, strided", "groups", "listed", *MODES])
def test_the_loss_in_one_op_has_the_bits_of_its_pytorch_form(
    device, features_dtype, proxies_dtype, chunk, kind
):
    """Both stream through the same products, in the same chunks."""
    f, c, labels, proxy_labels, *_ = case(9, 237, 40, several=kind in MODES)
    f, c = f.to(features_dtype), c.to(proxies_dtype)
    one_pass = kind.startswith("one pass")
    if kind == "one pass, strided":
        f, c = torch.stack([f, f], 1)[:, 0], c.t().contiguous().t()
    groups = (torch.arange(9) % 4 - 1, torch.arange(237) % 5) if kind == "groups" else (None, None)
    listed = torch.arange(9 * 3).view(9, 3) * 7 if kind == "listed" else None
    roles = kernels.Roles(labels, proxy_labels, *groups, listed)
    aggregation = MODES.index(kind) if kind in MODES else kernels.SUM
    kappa = torch.linspace(0, 2, 9, dtype=torch.float64)
    options = kernels.Settings(kappa, False, aggregation, 0.05, 0.2, kind == "listed")
    how = streaming.Streaming(one_pass, False, chunk)
    flat = [f, c, *roles, *options, *how]
    flat = [t.to(device) if isinstance(t, torch.Tensor) else t for t in flat]
    ours = streaming.Results(*checks.call("compiled", "contrastive", *flat))
    expected = streaming.Results(*checks.call("reference", "contrastive", *flat))
    assert len(ours.gradient) == (9 if one_pass else 0)
    for name in streaming.Results._fields:
        if name != "gradient" or torch_fuses_multiply_and_add():
            assert checks.same_bits(getattr(ours, name), getattr(expected, name)), name
    # Where it does not, the last sum is rounded twice.
    torch.testing.assert_close(ours.gradient, expected.gradient, rtol=1e-6, atol=1e-6)


# ---- gradients ----------------------------------------------------------------------------------


BRANCHES = {
    "unclamped": {"temperature": 0.5, "kappa": 0.7},
    "clamped": {"temperature": 0.5, "tau_plus": 0.97},
    "both": {"temperature": 0.2, "kappa": 1.5},
}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("gradient", ["stop", "through"])
@pytest.mark.parametrize("mode", ["single", *MODES])
def test_gradcheck(device, branch, gradient, mode):
    """Against central differences; for "stop" those of a loss whose weights are held."""
    several = mode != "single"
    f, c, labels, proxy_labels, positive, negative = case(4, 11, 6, several=several)
    if branch == "clamped":
        if proxy_labels is not None:
            c = F.normalize(c + 4 * unit(5, 6, 50)[proxy_labels])
        f = F.normalize(positive.double() @ c)
    options = {**BRANCHES[branch], "beta": 0.6}
    ours = {"hardness_gradient": gradient, "reduction": "none", "chunk_size": 4}
    leaves = [leaf(t, device) for t in (f, c)]
    proxy = None if proxy_labels is None else proxy_labels.to(device)
    pooled = mode if several else "each"
    losses, stats = debiased_contrastive_loss(
        *leaves, labels.to(device), proxy_labels=proxy, positives=pooled, return_stats=True,
        **ours, **options,
    )  # fmt: skip
    assert {"unclamped": stats.clamped.max() == 0, "clamped": stats.clamped.min() == 1}.get(
        branch, True
    )
    weights = torch.linspace(0.5, 2.0, len(f), dtype=torch.float64)
    grads = torch.autograd.grad((losses * weights.to(device)).sum(), leaves)
    frozen = f @ c.t() / options["temperature"] if gradient == "stop" else None
    named = {"tau" if k == "temperature" else k: v for k, v in options.items()}

    def value(f, c):
        held = plain(f, c, positive, negative, mode=pooled, frozen=frozen, **named)
        return (held * weights).sum()

    for which, grad in enumerate(grads):
        inputs = [f.clone(), c.clone()]
        flat = inputs[which].view(-1)
        numeric = torch.empty_like(flat)
        for j in range(len(flat)):
            kept, step = float(flat[j]), 1e-6
            flat[j] = kept + step
            above = value(*inputs)
            flat[j] = kept - step
            numeric[j] = (above - value(*inputs)) / (2 * step)
            flat[j] = kept
        torch.testing.assert_close(grad.cpu().view(-1), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["single", *MODES])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_torch_gradcheck_where_the_weights_are_differentiated(device, mode, kappa):
    several = mode != "single"
    f, c, labels, proxy_labels, *_ = case(3, 8, 5, several=several)
    leaves = [leaf(t, device) for t in (f, c)]
    proxy = None if proxy_labels is None else proxy_labels.to(device)

    def loss(f, c):
        return debiased_contrastive_loss(
            f, c, labels.to(device), proxy_labels=proxy, positives=mode if several else "each",
            kappa=kappa, beta=0.8, temperature=0.5, hardness_gradient="through",
            reduction="none", chunk_size=3,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("gradient", ["stop", "through"])
@pytest.mark.parametrize("mode", ["single", *MODES])
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_gradients_over_all_logits_sum_to_zero(device, gradient, mode, kappa):
    """Moving all logits of an unclamped row together changes nothing."""
    several = mode != "single"
    f, c, labels, proxy_labels, *_ = case(8, 50, 30, several=several)
    # A common last coordinate of the proxies shifts all logits of a row through its feature.
    c = torch.cat([c, torch.ones(len(c), 1, dtype=c.dtype)], dim=1)
    f = torch.cat([f, torch.zeros(len(f), 1, dtype=f.dtype)], dim=1).requires_grad_()
    loss, stats = debiased_contrastive_loss(
        f, c, labels, proxy_labels=proxy_labels, positives=mode if several else "each",
        kappa=kappa, beta=0.3, hardness_gradient=gradient, reduction="sum", return_stats=True,
    )  # fmt: skip
    loss.backward()
    free = stats.clamped == 0
    assert free.any()
    assert f.grad[free, -1].abs().max() < 1e-12 * f.grad.abs().max()


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_each_subset_of_gradients(device, which, beta):
    f, c, labels, *_ = case(5, 30, 9)
    both = [leaf(t, device) for t in (f, c)]
    loss = debiased_contrastive_loss(*both, labels.to(device), kappa=0.5, beta=beta, chunk_size=8)
    loss.backward()
    some = [leaf(t, device).requires_grad_(r) for t, r in zip((f, c), which, strict=True)]
    again = debiased_contrastive_loss(*some, labels.to(device), kappa=0.5, beta=beta, chunk_size=8)
    again.backward()
    torch.testing.assert_close(again, loss)
    for a, b, required in zip(some, both, which, strict=True):
        if required:
            torch.testing.assert_close(a.grad, b.grad)
        else:
            assert a.grad is None


def test_proxies_may_change_before_backward_when_they_need_no_gradient(device):
    f, c, labels, *_ = (t.to(device) for t in case(5, 30, 9)[:3])
    grads = []
    for change in (False, True):
        x, proxies = f.clone().requires_grad_(), c.clone()
        loss = debiased_contrastive_loss(x, proxies, labels, kappa=0.5, beta=0.2)
        if change:
            proxies.zero_()
        loss.backward()
        grads.append(x.grad)
    assert checks.same_bits(*grads)
    # Else they are kept, and autograd notices.
    x, proxies = f.clone().requires_grad_(), c.clone().requires_grad_()
    loss = debiased_contrastive_loss(x, proxies, labels)
    with torch.no_grad():
        proxies.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("proxies_too", [False, True])
def test_double_backward_raises(device, proxies_too):
    f, c, labels, *_ = case(4, 9, 5)
    x, c = leaf(f, device), leaf(c, device).requires_grad_(proxies_too)
    loss = debiased_contrastive_loss(x, c, labels.to(device))
    [grad] = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        grad.sum().backward()


# ---- invariances --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 9), k=st.integers(1, 70), d=st.integers(1, 40), seed=st.integers(0, 10**6),
    chunk=st.integers(1, 80), beta=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    tau=st.sampled_from([0.01, 0.05, 0.5, 1.0]), mode=st.sampled_from(["single", *MODES]),
    gradient=st.sampled_from(["stop", "through"]), prior=st.sampled_from([0.0, 0.01, 0.2]),
)  # fmt: skip
def test_chunks_and_permutations_do_not_show(
    b, k, d, seed, chunk, beta, tau, mode, gradient, prior
):
    f, c, labels, proxy_labels, *_ = case(b, k, d, seed, several=mode != "single")
    if proxy_labels is not None:
        labels = proxy_labels[torch.arange(b) % k]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(k)

    def run(c, labels, proxy_labels, chunk):
        x, y = f.clone().requires_grad_(), c.clone().requires_grad_()
        loss = debiased_contrastive_loss(
            x, y, labels, proxy_labels=proxy_labels, temperature=tau, beta=beta, tau_plus=prior,
            positives=mode if mode in MODES else "each", hardness_gradient=gradient,
            chunk_size=chunk,
        )  # fmt: skip
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        assert y.grad.isfinite().all()
        return loss.detach(), x.grad, y.grad

    whole = run(c, labels, proxy_labels, k)
    split = run(c, labels, proxy_labels, chunk)
    moved = run(
        c[order],
        place[labels] if proxy_labels is None else labels,
        None if proxy_labels is None else proxy_labels[order],
        chunk,
    )
    moved = (*moved[:2], moved[2][place])
    for other in (split, moved):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tau", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("gradient", ["stop", "through"])
def test_no_overflow_in_fp32(device, tau, beta, gradient):
    f, c, labels, *_ = case(12, 300, 64)
    c[labels[0]] = f[0]
    c[5] = -f[1]
    x, y = (leaf(t, device, torch.float32) for t in (f, c))
    truth = [leaf(t, "cpu") for t in (f, c)]
    options = {"temperature": tau, "beta": beta, "kappa": 0.5, "hardness_gradient": gradient}
    loss, stats = debiased_contrastive_loss(x, y, labels.to(device), return_stats=True, **options)
    expected, seen = debiased_contrastive_loss(*truth, labels, return_stats=True, **options)
    loss.backward()
    expected.backward()
    assert torch.equal(stats.clamped.cpu(), seen.clamped)
    # Logits of 1 / tau are rounded to about 6e-8 / tau.
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=2e-5, atol=2e-6 / tau)
    for a, b in ((x, truth[0]), (y, truth[1])):
        scale = b.grad.abs().max()
        assert (a.grad.cpu().double() - b.grad).abs().max() < 3e-6 * (1 + beta) / tau * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_half_precision_is_no_worse_than_plain(device, dtype, beta):
    f, c, labels, _, _, negative = case(32, 200, 128)
    x, y = f.to(device, dtype).requires_grad_(), c.to(device, dtype)
    truth = x.detach().cpu().double().requires_grad_()
    exact = debiased_contrastive_loss(truth, y.cpu().double(), labels, kappa=0.3, beta=beta)
    exact.backward()
    ours = debiased_contrastive_loss(x, y, labels.to(device), kappa=0.3, beta=beta)
    ours.backward()
    z = x.detach().clone().requires_grad_()
    s = z @ y.t() / 0.05
    p = s.gather(1, labels.to(device)[:, None])[:, 0]
    n = s.masked_fill(~negative.to(device), -torch.inf)
    m = len(c) - 1
    # Hardness weights are held, as "stop" has it.
    r = n.logsumexp(1)
    if beta:
        r = math.log(m) + (n + (beta * n).log_softmax(1).detach()).logsumexp(1)
    q = (r.float().exp() - 0.3 * p.float().exp()).clamp(min=m * math.exp(-20)).log()
    eager = F.softplus(q - p).mean()
    eager.backward()
    assert ours.dtype == torch.float32
    checks.no_worse_than_plain(ours.detach().cpu(), eager.detach().cpu(), exact.detach())
    checks.no_worse_than_plain(x.grad.cpu(), z.grad.cpu(), truth.grad, slack=1.2)


# ---- edges --------------------------------------------------------------------------------------


def test_rows_without_negatives_have_loss_zero(device):
    f, c, labels, *_ = (t.to(device) for t in case(4, 9, 5)[:3])
    everything = torch.arange(9, device=device).expand(4, 9).contiguous()
    for k, options in ((1, {}), (9, {"exclude": everything})):
        x, y = f.clone().requires_grad_(), c[:k].clone().requires_grad_()
        targets = labels % k
        loss, stats = debiased_contrastive_loss(
            x, y, targets, kappa=0.5, beta=0.3, return_stats=True, **options
        )
        loss.backward()
        assert loss == 0
        assert not x.grad.any()
        assert not y.grad.any()
        assert not stats.num_negatives.any()
        assert (stats.hardest_index == -1).all()
        assert (stats.hardest_negative == -math.inf).all()
        assert not stats.effective_negatives.any()
        assert stats.positive_logit.isfinite().all()


def test_empty_batch(device):
    x = torch.zeros(0, 5, device=device, requires_grad=True)
    c = unit(3, 5, dtype=torch.float32).to(device).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss, stats = debiased_contrastive_loss(
            x, c, none, reduction=reduction, return_stats=True, kappa=0.1
        )
        assert loss.shape == shape
        assert not loss.any()
        assert stats.clamped_fraction == 0
        loss.sum().backward()
        assert x.grad.shape == (0, 5)
        assert not c.grad.any()


def test_duplicate_labels_and_identical_rows(device):
    """Equal rows differ by the rounding of their products, which may depend on where a row lies."""
    f, c, *_ = case(3, 9, 5)
    f = f[:1].expand(3, -1)
    labels, tau, beta, d = torch.tensor([2, 2, 2]), 0.05, 0.2, 5
    losses = debiased_contrastive_loss(
        f.to(device), c.to(device), labels.to(device), reduction="none", beta=beta, temperature=tau
    )
    # A product of unit rows is off by d units of rounding, whatever the order of its sum, and a
    # logit by that over tau. Where every logit is off by x, the loss is by at most x for its
    # positive, 1 + beta times x for the negatives' mass and beta times x for what it is weighted
    # by. What is computed of the logits adds a few units of numbers that are at most 1 / tau.
    unit = torch.finfo(losses.dtype).eps / 2
    assert (losses - losses[0]).abs().max() <= 4 * (1 + beta) * (d + 8) * unit / tau


def test_rows_with_the_same_products_have_the_same_bits(device):
    """What the kernels make of a row of products depends on nothing but that row."""
    rows = 70
    products = torch.rand(1, 333, generator=torch.Generator().manual_seed(0)) - 0.3
    products = products.repeat(rows, 1).to(device)
    labels = torch.full((rows,), 40, device=device)
    roles = (labels, None, None, None, None)
    state, counts, _ = kernels.new_sums(rows, None, device)
    weights, factors = torch.empty_like(products), products.new_empty(rows)
    checks.call(
        "compiled", "contrastive_stream_", state, counts, None, products, weights, factors,
        *roles, 0, 20.0, 0.2, 1.0,
    )  # fmt: skip
    kappa = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
    loss, coefficients = checks.call(
        "compiled", "contrastive_finish", state, counts, None, kappa, False, kernels.SUM, 0.05,
        0.2, False,
    )  # fmt: skip
    for result in (state, counts, products, weights, factors, loss, coefficients):
        assert checks.same_bits(result, result[:1].expand_as(result))


def test_exclusion_by_list_and_by_group_is_dropping_columns(device):
    f, c, *_ = case(6, 20, 8)
    labels = torch.arange(6)
    groups = torch.arange(20) % 7
    rows = torch.tensor([0, 1, 2, -1, 4, 5])
    listed = torch.full((6, 4), -1)
    for i in range(6):
        # The positive, listed too, stays the positive; repeats and padding count once.
        same = (groups == rows[i]).nonzero().flatten().tolist() if rows[i] >= 0 else []
        entries = [*same, *same[:1], i][:4]
        listed[i, : len(entries)] = torch.tensor(entries)
    options = {"kappa": 0.4, "beta": 0.2, "reduction": "none", "chunk_size": 6}
    grads = []
    for exclude in ((rows, groups), listed):
        moved = tuple(t.to(device) for t in exclude) if isinstance(exclude, tuple) else exclude
        moved = moved if isinstance(moved, tuple) else moved.to(device)
        x, y = (leaf(t, device) for t in (f, c))
        losses = debiased_contrastive_loss(x, y, labels.to(device), exclude=moved, **options)
        losses.sum().backward()
        grads.append((losses.detach().cpu(), x.grad.cpu(), y.grad.cpu()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    for i in range(6):
        kept = (groups != rows[i]) | (torch.arange(20) == i) if rows[i] >= 0 else groups >= 0
        alone = debiased_contrastive_loss(f[i : i + 1], c[kept], kept[:i].sum()[None], **options)
        torch.testing.assert_close(grads[0][0][i : i + 1], alone)


def test_one_kappa_per_row(device):
    f, c, labels, *_ = (t.to(device) for t in case(5, 30, 9)[:3])
    kappa = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64, device=device)
    together = debiased_contrastive_loss(f, c, labels, kappa=kappa, reduction="none")
    for i, one in enumerate(kappa.tolist()):
        row = slice(i, i + 1)
        alone = debiased_contrastive_loss(f[row], c, labels[row], kappa=one, reduction="none")
        torch.testing.assert_close(together[row], alone)
    share = debiased_contrastive_loss(f, c, labels, tau_plus=0.5 / 29, reduction="none")
    torch.testing.assert_close(share[2], together[2])


def test_inputs_that_are_not_contiguous_and_of_mixed_dtypes(device):
    f, c, labels, *_ = (t.to(device) for t in case(5, 30, 9)[:3])
    expected = debiased_contrastive_loss(f.float(), c.float(), labels, kappa=0.2)
    strided = torch.stack([labels, labels], 1)[:, 0]
    got = debiased_contrastive_loss(
        f.float().t().contiguous().t(), torch.stack([c, c], 1).float()[:, 0], strided, kappa=0.2
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    x = f.half().requires_grad_()
    mixed = debiased_contrastive_loss(x, c.float(), labels, kappa=0.2)
    mixed.backward()
    truth = debiased_contrastive_loss(f.half().float(), c.float(), labels, kappa=0.2)
    torch.testing.assert_close(mixed, truth, rtol=1e-5, atol=1e-6)
    assert x.grad.dtype == torch.float16


def test_same_bits_twice_and_for_any_number_of_threads(device):
    f, c, labels, *_ = case(70, 5000, 32)
    x, c, labels = f.float().to(device), c.float().to(device), labels.to(device)

    def run():
        row, proxies = leaf(x, device), leaf(c, device)
        loss = debiased_contrastive_loss(row, proxies, labels, kappa=0.3, beta=0.1)
        loss.backward()
        return torch.cat([loss.detach()[None], row.grad.flatten(), proxies.grad.flatten()])

    checks.same_bits_twice(run)
    products, *rest = kernel_inputs("contrastive_slopes_", torch.float32, 1, 0.3, b=64, k=5000)

    def slopes():
        held = products.clone()
        checks.call("compiled", "contrastive_slopes_", held, *rest)
        return held

    checks.for_any_thread_count(slopes)

    def stream():
        inputs = kernel_inputs("contrastive_stream_", torch.float32, 1, 0.3, b=64, k=5000)
        checks.call("compiled", "contrastive_stream_", *inputs)
        return torch.cat([inputs[0].flatten(), inputs[4].double().flatten()])

    checks.for_any_thread_count(stream)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    checks.opcheck(name, _ops.OPS[name].sample(torch.device("cpu")))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    f, c, labels, *_ = (t.to(device) for t in case(6, 50, 16)[:3])
    f, c = f.float(), c.float()

    def loss(x):
        return debiased_contrastive_loss(
            x, c, labels, kappa=0.3, beta=0.1, reduction="none", chunk_size=16
        )

    checks.compiles_with_backward(loss, f, backend)
    other = torch.roll(f, 1, 0)
    checks.compiles_fullgraph(loss, [f], [other], backend=backend)


def test_autocast_changes_nothing(device):
    f, c, labels, *_ = (t.to(device) for t in case(6, 50, 16)[:3])
    x = f.float().requires_grad_()
    expected = debiased_contrastive_loss(x, c.float(), labels, kappa=0.3)
    [grad] = torch.autograd.grad(expected, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = debiased_contrastive_loss(x, c.float(), labels, kappa=0.3)
    assert checks.same_bits(got.detach(), expected.detach())
    assert checks.same_bits(torch.autograd.grad(got, x)[0], grad)


def test_distributed_data_parallel(tmp_path):
    """Under DDP with one process the gradients are those without."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain_model = torch.nn.Linear(12, 8)
        wrapped = torch.nn.parallel.DistributedDataParallel(plain_model)
        f, _, labels, *_ = case(6, 20, 12)
        proxies = unit(20, 8, dtype=torch.float32)
        grads = []
        for model in (plain_model, wrapped):
            plain_model.zero_grad()
            features = F.normalize(model(f.float()))
            debiased_contrastive_loss(features, proxies, labels, kappa=0.2, beta=0.1).backward()
            grads.append(plain_model.weight.grad.clone())
        assert checks.same_bits(*grads)
    finally:
        dist.destroy_process_group()


# ---- memory -------------------------------------------------------------------------------------


def test_the_logits_never_exist_as_a_whole():
    """Of 1024 x 20,000 logits (78 MiB) no tensor holds more than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.numel() * t.element_size())
            return out

    f, c, labels, *_ = case(1024, 20_000, 8)
    f, c = f.float(), c.float()
    roles = kernels.Roles(labels, None, None, None, None)
    kappa = torch.zeros(1024, dtype=torch.float64)
    options = kernels.Settings(kappa, False, kernels.SUM, 0.05, 0.1, False)
    with Watch():
        streaming.stream_loss(f, c, roles, options, streaming.Streaming(True, False, 0))
    assert largest[0] <= streaming.WORKSPACE["cpu"] / 2
    assert largest[0] < 4 * 1024 * 20_000 / 3


def test_no_allocation_of_the_op_is_larger_than_a_chunk():
    from torch.profiler import ProfilerActivity, profile

    f, c, labels, *_ = case(1024, 20_000, 8)
    x, c = f.float().requires_grad_(), c.float()
    debiased_contrastive_loss(x, c, labels)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        debiased_contrastive_loss(x, c, labels, beta=0.1)
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    # The products of a chunk and their weights, half of the workspace each; the PyTorch form turns
    # a chunk into fp64, which is twice that. Whole logits are 78 MiB.
    chunk = streaming.WORKSPACE["cpu"] / 2
    if dhcl_ops.status().how == "reference":
        chunk *= 2
    assert 1 << 20 < max(sizes) <= chunk


@pytest.mark.parametrize("fast", [False, True])
def test_chunks_of_16_bit_products_take_the_place_of_the_last(fast):
    """On CUDA, whose products these are; without a GPU its tensors have no values."""
    there = UnreadDevice()
    dtype = torch.float32 if fast else torch.bfloat16
    f, c = there.of(torch.ones(8, 16, dtype=dtype)), there.of(torch.ones(100, 16, dtype=dtype))
    with there.unread():
        operands = streaming.Operands(f, c, fast=fast, columns=32)
        chunks = [products for _, products, _ in operands.chunks()]
    assert operands.narrow
    assert [tuple(products.shape) for products in chunks] == [(8, 32)] * 3 + [(8, 4)]
    assert {products.dtype for products in chunks} == {torch.float32}
    assert len({products.untyped_storage()._cdata for products in chunks}) == 1


# ---- errors -------------------------------------------------------------------------------------


GOOD = {"b": 4, "k": 9, "d": 5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a tensor"),
        ({"features": torch.ones(4)}, ValueError, r"features must be 2-D \(got shape \(4,\)\)"),
        ({"features": torch.ones(4, 5, dtype=torch.int32)}, TypeError, "features must be float32"),
        ({"proxies": torch.ones(9, 4)}, ValueError, r"one width \(got 5 and 4\)"),
        ({"proxies": torch.ones(0, 5)}, ValueError, "at least one proxy"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 9, 2])}, IndexError, r"\[0, 9\) \(got 9 at batch pos"),
        ({"labels": torch.tensor([0, -1, 2, 2])}, IndexError, r"\[0, 9\) \(got -1 at batch pos"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0 \(got 0.0\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and > 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and > 0"),
        ({"beta": -0.1}, ValueError, r"beta must be finite and >= 0 \(got -0.1\)"),
        ({"kappa": 8.0}, ValueError, r"smaller than the number of negatives \(got 8 and 8\)"),
        ({"kappa": -1.0}, ValueError, "kappa must be finite and >= 0"),
        ({"kappa": torch.tensor([0.0, 0.0, 0.0, 8.5])}, ValueError, r"8.5 and 8 at batch pos.* 3"),
        (
            {"kappa": torch.tensor([0.0, -1.0, 0.0, 1.0])},
            ValueError,
            r"kappa must be >= 0 \(got -1",
        ),
        ({"kappa": torch.zeros(3)}, ValueError, "kappa must have shape"),
        ({"kappa": 0.5, "tau_plus": 0.1}, ValueError, "kappa or tau_plus, not both"),
        ({"tau_plus": 1.0}, ValueError, r"tau_plus must be in \[0, 1\)"),
        ({"positives": "max"}, ValueError, "positives must be 'each' or 'sum' or 'mean'"),
        ({"hardness_gradient": "no"}, ValueError, "'stop' or 'through'"),
        ({"reduction": "avg"}, ValueError, "'mean' or 'sum' or 'none'"),
        ({"precision": "half"}, ValueError, "'exact' or 'fast'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1"),
        ({"proxy_labels": torch.zeros(8, dtype=torch.int64)}, ValueError, "one per proxy"),
        ({"proxy_labels": torch.arange(9) + 2}, ValueError, "got none for batch position 0"),
        ({"exclude": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "exclude must have shape"),
        ({"exclude": torch.zeros(4, 2)}, TypeError, "exclude must be int64"),
        ({"exclude": torch.tensor([[0], [1], [-1], [9]])}, IndexError, r"\[-1, 9\) \(got 9 .* 3\)"),
        (
            {"exclude": torch.tensor([[0], [-2], [-1], [8]])},
            IndexError,
            r"\(got -2 .* position 1\)",
        ),
        ({"exclude": (torch.zeros(4, dtype=torch.int64),)}, ValueError, "a pair of groups"),
    ],
)
def test_errors(change, error, message):
    f, c, *_ = case(**GOOD)
    arguments = {"features": f, "proxies": c, "labels": torch.arange(4), **change}
    with pytest.raises(error, match=f"debiased_contrastive_loss: .*{message}"):
        debiased_contrastive_loss(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    f, c, labels, *_ = case(**GOOD)
    f[2, 3] = value
    with pytest.raises(ValueError, match=r"features must be finite .*row 2"):
        debiased_contrastive_loss(f, c, labels)
    f, c, labels, *_ = case(**GOOD)
    for column in (int(labels[0]), (int(labels[0]) + 1) % 9):
        bad = c.clone()
        bad[column, 1] = value
        with pytest.raises(ValueError, match=rf"proxies must be finite .*row {column}"):
            debiased_contrastive_loss(f[:1].abs(), bad, labels[:1])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("debiased_contrastive_loss: similarities overflow float32", ValueError),
        ("CUDA out of memory. Tried to allocate 8 GiB", torch.OutOfMemoryError),
        ("something else", RuntimeError),
    ],
)
def test_what_cpp_raises_gets_its_kind_back(monkeypatch, message, error):
    def failing(*args):
        raise RuntimeError(message)

    f, c, labels, *_ = case(**GOOD)
    monkeypatch.setattr(streaming, "contrastive", failing)
    for features in (f, f.clone().requires_grad_()):
        with pytest.raises(error, match=message) as raised:
            debiased_contrastive_loss(features, c, labels)
        assert raised.type is error


def test_features_of_other_norms_warn_once(monkeypatch):
    monkeypatch.setattr(module, "_norm_seen", False)
    f, c, labels, *_ = case(**GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        debiased_contrastive_loss(f, c, labels)
    f[1] *= 3
    with pytest.warns(UserWarning, match=r"norm 1 \(got a norm of 3\)"):
        debiased_contrastive_loss(f, c, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        debiased_contrastive_loss(f, c, labels)


# ---- CUDA ---------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_fast_precision_is_within_its_stated_error(beta):
    f, c, labels, *_ = case(64, 3000, 512)
    truth = f.clone().requires_grad_()
    expected = debiased_contrastive_loss(truth, c, labels, kappa=0.2, beta=beta, reduction="none")
    expected.sum().backward()
    x = f.float().cuda().requires_grad_()
    losses, stats = debiased_contrastive_loss(
        x, c.float().cuda(), labels.cuda(), kappa=0.2, beta=beta, reduction="none",
        precision="fast", return_stats=True,
    )  # fmt: skip
    losses.sum().backward()
    assert (losses.cpu().double() - expected).abs().max() < 1.5e-3
    error = (x.grad.cpu().double() - truth.grad).norm() / truth.grad.norm()
    assert error < 2e-3
    hardest = ((f @ c.t()) / 0.05).scatter(1, labels[:, None], -math.inf).amax(1)
    assert (stats.hardest_negative.cpu() - hardest).abs().max() < 1.5e-3


@needs_cuda
def test_on_streams_and_in_graphs_without_synchronisation():
    f, c, labels, *_ = (t.cuda() for t in case(16, 300, 32)[:3])
    f, c = f.float(), c.float()
    debiased_contrastive_loss(f, c, labels)

    def run():
        x = f.clone().requires_grad_()
        debiased_contrastive_loss(x, c, labels, kappa=0.3, beta=0.1, chunk_size=64).backward()
        return x.grad

    expected = run()
    checks.on_side_stream(run, expected)
    checks.no_host_synchronisation(run)
    x = f.clone().requires_grad_()
    out = torch.zeros_like(f)

    def captured():
        loss = debiased_contrastive_loss(x, c, labels, kappa=0.3, beta=0.1, chunk_size=64)
        out.copy_(torch.autograd.grad(loss, x)[0])

    graph = checks.captured_in_graph(captured)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert checks.same_bits(out, expected)


def test_every_op_is_listed():
    assert OPS == [
        "contrastive",
        "contrastive_backward",
        "contrastive_finish",
        "contrastive_scale_rows",
        "contrastive_slopes_",
        "contrastive_stream_",
        "contrastive_weigh_",
    ]
    assert dhcl_ops.debiased_contrastive_loss is debiased_contrastive_loss
