"""fp32 products made of fp16 numbers: how far they can be off, and what is made of them.

A GPU's fp16 product with fp32 sums is one of exact products; here the sums are fp32's or fp64's.
"""

import pytest
import torch
from torch.nn.functional import normalize

from dhcl_ops import _products, evaluate_ranking
from dhcl_ops import ranking as ranking_module
from dhcl_ops._products import SplitProducts, pieces_of, split_rows

UNIT = 2.0**-23


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
def test_products_are_off_by_no_more_than_the_bound(kind, d):
    left, right = draw(17, d, 0, kind), draw(23, d, 1, kind)
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

    monkeypatch.setattr(ranking_module, "pays_to_split", split)
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


def test_one_number_orders_ranks_of_any_size():
    ranks = torch.tensor([5, 2**31, 0, 3, 7, 1])
    ordered = ranking_module._ordered(ranks, torch.tensor([0, 3, 3, 6]))
    assert ordered.ranks.tolist() == [5, 2**31, 1, 3, 7]
    assert ordered.hits.tolist() == [1, 2, 1, 2, 3]
    assert ordered.counts.tolist() == [2, 0, 3]
