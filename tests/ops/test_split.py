"""fp32 products made of fp16 numbers: how far they can be off, and what is made of them.

A GPU's fp16 product with fp32 sums is one of exact products; here the sums are fp32's or fp64's.
"""

import pytest
import torch
from torch.nn.functional import normalize

from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops import _contrastive_stream as streaming
from dhcl_ops import _ops, _products, debiased_contrastive_loss, evaluate_ranking
from dhcl_ops import ranking as ranking_module
from dhcl_ops._products import SplitProducts, pieces_of, split_rows
from tests import checks
from tests.conftest import needs_cuda

UNIT = 2.0**-23
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gamma(terms):
    return terms * UNIT / (1.0 - terms * UNIT)


def draw(n, d, seed, kind):
    """Rows (n, d) whose lengths, or elements, are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    if kind == "unit":
        return normalize(rows)
    if kind == "lengths":
        return rows * 10.0 ** torch.linspace(-16, 16, n)[:, None]
    if kind == "elements":
        return rows * 2.0 ** torch.randint(-40, 40, (n, d), generator=generator)
    if kind == "one sign":
        return rows.abs() + 1.0
    return torch.where(torch.rand(n, d, generator=generator) < 0.9, 0.0, rows)


def errors(found, left, right):
    """Differences from the fp64 product, over the lengths of the rows."""
    left, right = left.double(), right.double()
    lengths = left.norm(dim=1)[:, None] * right.norm(dim=1)
    return ((found.double() - left @ right.T).abs() / lengths.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("kind", ["unit", "lengths", "elements", "one sign", "sparse"])
@pytest.mark.parametrize("d", [1, 7, 129, 2048, 4096])
def test_products_are_off_by_no_more_than_the_bound(device, kind, d):
    left, right = (draw(n, d, seed, kind).to(device) for seed, n in enumerate((17, 23)))
    products = SplitProducts(left, right)
    found = products.tile(slice(0, 17))
    assert found.dtype == torch.float32
    assert errors(found, left, right) <= 1.01 * 2**-21 + 1.01 * gamma(3 * d) + UNIT
    # With exact sums what is left is what the pieces miss.
    sums = products.queries.double() @ products.features.double().T
    exact = sums * products.query_units[:, None].double() * products.feature_units.double()
    assert errors(exact, left, right) <= 1.01 * 2**-21


def test_typical_errors_are_those_of_fp32_products():
    left, right = draw(200, 2048, 0, "unit"), draw(300, 2048, 1, "unit")
    split = errors(SplitProducts(left, right).tile(slice(0, 200)), left, right)
    assert split <= 1.5 * errors(left @ right.T, left, right)
    # Rounded to fp16 alone they are far off.
    assert errors(left.half().float() @ right.half().float().T, left, right) > 10 * split


@pytest.mark.parametrize("kind", ["unit", "lengths", "elements"])
def test_pieces_are_off_by_no_more_than_their_bound(kind):
    rows = draw(50, 300, 2, kind)
    split = split_rows(rows)
    scaled = (rows / split.units[:, None]).abs().amax(1)
    assert bool(((scaled >= 2**13) & (scaled < 2**14)).all())
    sums = (split.pieces[0].double() + split.pieces[1].double()) * split.units[:, None].double()
    largest = rows.abs().amax(1, keepdim=True).double()
    bound = 2.0**-23 * rows.abs().double() + 2.0**-38 * largest
    assert bool(((sums - rows.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_are_one_piece(dtype):
    rows = draw(40, 300, 3, "unit").to(dtype)
    assert pieces_of(dtype) == 1
    assert pieces_of(torch.float32) == 2
    split = split_rows(rows.float(), 1)
    whole = split.pieces[0].float() * split.units[:, None]
    near = rows.float().abs() >= 2.0**-27 * rows.float().abs().amax(1, keepdim=True)
    assert torch.equal(whole[near], rows.float()[near])


@pytest.mark.parametrize("pieces", [(2, 2), (2, 1), (1, 2), (1, 1)])
def test_any_numbers_of_pieces(pieces):
    left, right = (
        rows.bfloat16().float() if count == 1 else rows
        for rows, count in zip(
            (draw(11, 200, 4, "unit"), draw(13, 200, 5, "unit")), pieces, strict=True
        )
    )
    products = SplitProducts(left, right, *pieces)
    terms = {(2, 2): 3, (2, 1): 2, (1, 2): 2, (1, 1): 1}[pieces]
    assert products.queries.shape == (11, 200 * terms)
    assert errors(products.tile(slice(3, 11)), left[3:], right) <= 2**-21 + gamma(3 * 200)


def test_rows_of_zeros_and_no_rows():
    left = torch.zeros(3, 5)
    assert torch.equal(SplitProducts(left, torch.ones(2, 5)).tile(slice(0, 3)), torch.zeros(3, 2))
    assert SplitProducts(left, torch.ones(0, 5)).tile(slice(0, 3)).shape == (3, 0)
    assert torch.equal(
        SplitProducts(torch.ones(2, 0), torch.ones(3, 0)).tile(slice(0, 2)), torch.zeros(2, 3)
    )


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    expected = torch.tensor([2.0**e for e in range(-126, 128)])
    assert torch.equal(_products.power_of_two(exponents), expected)


# ---- metrics -------------------------------------------------------------------------------------


def people(q, g, seed, *, levels):
    """Features and identities; with ``levels``, of few small integers, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 12, (n,), generator=generator) for n in (q, g)]
    cameras = [torch.randint(0, 3, (n,), generator=generator) for n in (q, g)]
    centres = torch.randn(12, 48, generator=generator)
    rows = [centres[i] + torch.randn(len(i), 48, generator=generator) for i in ids]
    if levels:
        rows = [(each * levels).round().clamp(-3, 3) for each in rows]
    rows[1][5] = rows[1][77]  # equal rows
    return tuple(rows), (*ids, *cameras)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("levels", [0, 1])
def test_metrics_from_split_products_are_those_from_fp32(monkeypatch, metric, levels):
    """Small integers have exact products either way, so equal distances stay equal to the bit."""
    features, labels = people(140, 300, 6, levels=levels)
    if metric == "cosine" and levels:
        # Rows of one length, whose normalised elements are exact.
        features = tuple(torch.sign(rows + 0.5).repeat(1, 2)[:, :64] for rows in features)
    expected = evaluate_ranking(features, *labels, metric=metric, per_query=True)
    seen = []

    def split(queries, rows):
        seen.append(len(queries))
        return True

    monkeypatch.setattr(_products, "pays_to_split", split)
    found = evaluate_ranking(features, *labels, metric=metric, per_query=True)
    assert seen == [140]
    assert torch.equal(found.cmc, expected.cmc)
    assert found[1:4] == expected[1:4]
    for ours, theirs in zip(found[4:], expected[4:], strict=True):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))


def test_a_product_is_split_where_that_pays():
    class On:
        """What is asked about a matrix on a GPU."""

        def __init__(self, rows, width, dtype=torch.float32, is_cuda=True):
            self.rows, self.width, self.dtype, self.is_cuda = rows, width, dtype, is_cuda

        def __len__(self):
            return self.rows

        def numel(self):
            return self.rows * self.width

    pays = _products.pays_to_split
    assert pays(On(3368, 2048), On(15913, 2048))
    assert not pays(On(64, 2048), On(1_000_000, 2048))
    assert not pays(On(200, 256), On(1000, 256))
    assert not pays(On(3368, 2048, torch.float64), On(15913, 2048, torch.float64))
    assert not pays(torch.zeros(3368, 8), torch.zeros(100, 8))


def test_a_product_is_split_where_there_is_room(monkeypatch):
    rows = torch.ones(4, 6)
    monkeypatch.setattr(_products, "pays_to_split", lambda queries, features: True)
    needed = 6 * 2 * 24
    for free, wanted in ((None, True), (2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(_products._checks, "available_bytes", lambda device, free=free: free)
        assert (_products.split_where_it_pays(rows, rows) is not None) == wanted


def test_one_number_orders_ranks_of_any_size():
    ranks = torch.tensor([5, 2**31, 0, 3, 7, 1])
    ordered = ranking_module._ordered(ranks, torch.tensor([0, 3, 3, 6]))
    assert ordered.ranks.tolist() == [5, 2**31, 1, 3, 7]
    assert ordered.hits.tolist() == [1, 2, 1, 2, 3]
    assert ordered.counts.tolist() == [2, 0, 3]


# ---- the loss ------------------------------------------------------------------------------------


def loss_in(b, k, d, dtypes, *, lengths=False):
    """Features of norm 1 and proxies, with ``lengths`` of very different ones, in these dtypes."""
    generator = torch.Generator().manual_seed(d)
    proxies = normalize(torch.randn(k, d, generator=generator))
    labels = torch.randint(k, (b,), generator=generator)
    noise = torch.randn(b, d, generator=generator)
    features = normalize(proxies[labels] + 0.7 * noise / d**0.5)
    if lengths:
        proxies = proxies * 2.0 ** torch.randint(-12, 3, (k, 1), generator=generator)
        features = features * 2.0 ** torch.randint(-8, 2, (b, 1), generator=generator)
    return features.to(dtypes[0]), proxies.to(dtypes[1]), labels


def loss_and_gradients(features, proxies, labels, *, learned=False, **options):
    features, proxies = (
        t.clone().requires_grad_(r) for t, r in ((features, True), (proxies, learned))
    )
    losses = debiased_contrastive_loss(features, proxies, labels, reduction="none", **options)
    losses.sum().backward()
    return [losses.detach(), *(t.grad for t in (features, proxies) if t.grad is not None)]


def on_split_products(monkeypatch):
    """The loss's loop in PyTorch, on the CPU, with the products that CUDA makes of pieces."""
    monkeypatch.setattr(streaming, "contrastive", _ops.OPS["contrastive"].reference)
    backward = _ops.OPS["contrastive_backward"].reference
    monkeypatch.setattr(streaming, "contrastive_backward", backward)
    monkeypatch.setattr(streaming, "pays_to_split", lambda features, proxies: True)


OPTIONS = {
    "one pass": {"kappa": 0.4, "beta": 0.3},
    "both gradients": {"learned": True},
    "second pass": {"learned": True, "beta": 0.3, "hardness_gradient": "through"},
}


@pytest.mark.filterwarnings("ignore:.*norm 1")
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("d", [3, 129, 2048])
def test_the_loss_from_split_products_is_as_exact_as_from_fp32(monkeypatch, kind, lengths, d):
    f32 = torch.float32
    features, proxies, labels = loss_in(24, 150, d, (f32, f32), lengths=lengths)
    options = {"chunk_size": 64, **OPTIONS[kind]}
    truth = loss_and_gradients(features.double(), proxies.double(), labels, **options)
    plain = loss_and_gradients(features, proxies, labels, **options)
    on_split_products(monkeypatch)
    found = loss_and_gradients(features, proxies, labels, **options)
    for got, fp32, true in zip(found, plain, truth, strict=True):
        assert got.dtype == torch.float32
        scale = true.abs().max().item()
        worst = (fp32.double() - true).abs().max().item()
        assert (got.double() - true).abs().max().item() <= 3 * worst + 1e-6 * scale


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_the_loss_of_mixed_formats(monkeypatch, dtypes):
    """16-bit operands have one piece, so that two products, or one, are as good as three."""
    features, proxies, labels = loss_in(24, 150, 200, dtypes)
    truth = loss_and_gradients(features.double(), proxies.double(), labels)
    on_split_products(monkeypatch)
    found = loss_and_gradients(features, proxies, labels, chunk_size=64)
    assert (found[0].double() - truth[0]).abs().max() <= 2e-5
    # The gradient is rounded to the features' format.
    rounding = torch.finfo(dtypes[0]).eps
    scale = truth[1].abs().max()
    assert (found[1].double() - truth[1]).abs().max() <= (rounding + 1e-5) * scale


@needs_cuda
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_large_losses_on_cuda_are_those_of_the_pytorch_form(dtypes, one_pass):
    """128 rows and 4096 proxies of 2048: split in C++ and in PyTorch, in several chunks."""
    features, proxies, labels = (t.cuda() for t in loss_in(128, 4133, 2048, dtypes))
    settings = kernels.Settings(
        torch.zeros(128, dtype=torch.float64).cuda(), False, kernels.SUM, 0.05, 0.2, False
    )
    how = streaming.Streaming(one_pass, False, 1500)
    roles = kernels.Roles(labels, None, None, None, None)
    flat = (features, proxies, *roles, *settings, *how)
    ours = streaming.Results(*checks.call("compiled", "contrastive", *flat))
    theirs = streaming.Results(*checks.call("reference", "contrastive", *flat))
    # In C++ a chunk's columns are padded to whole vectors, for which cuBLAS may sum otherwise.
    torch.testing.assert_close(ours.state, theirs.state, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.counts, theirs.counts)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-4, atol=1e-5)
    wide = (features.double(), proxies.double(), *roles, *settings, *how)
    truth = streaming.Results(*checks.call("compiled", "contrastive", *wide))
    same = dtypes[0] == dtypes[1]
    torch.testing.assert_close(ours.losses, truth.losses, rtol=0, atol=2e-4)
    if one_pass and (not same or dtypes[0] == torch.float32):
        scale = truth.gradient.abs().max().item()
        assert (ours.gradient.double() - truth.gradient).abs().max().item() <= 1e-4 * scale


def test_what_is_not_split(monkeypatch):
    """Equal 16-bit formats are multiplied as they are, fp64 as fp64, and speed goes before."""
    monkeypatch.setattr(streaming, "pays_to_split", lambda features, proxies: True)
    rows = torch.zeros(3, 4)
    how = streaming.Streaming(True, False, 0)
    assert isinstance(streaming._operands(rows, rows, how), streaming.SplitOperands)
    half = rows.half()
    for pair, fast in ((half, half), False), ((rows, rows), True), ((half, rows), True):
        made = streaming._operands(*pair, how._replace(fast=fast))
        assert isinstance(made, streaming.Operands)
    monkeypatch.undo()
    assert isinstance(streaming._operands(rows, rows, how), streaming.Operands)


def test_weights_of_short_rows_lose_no_more_than_said():
    """A long proxy in a chunk takes digits from the weights of short ones: 2^-40 of its own."""
    features, proxies = torch.eye(2, 4), torch.ones(3, 4)
    proxies[0] *= 2.0**20
    operands = streaming.SplitOperands(features, proxies, 0, weighted=True)
    _, _, chunk = next(operands.chunks())
    weights = operands.weights(3)
    weights.copy_(torch.tensor([[0.0, 1.0, 3e-5], [1.0, 0.25, 1 / 3]]) * operands.weight_scale)
    truth = weights.double() @ proxies.double() / operands.weight_scale
    found = operands.read_out(None, torch.ones(2), weights, chunk).double() / operands.weight_scale
    assert ((found - truth).abs() <= 2.0**-22 * truth + 3 * 2.0**-40 * 2.0**21).all()
