"""Numbers that are too large, too small or none: a right value, or an error which names them."""

import math

import numpy as np
import pytest
import torch

import dhcl_ops
from dhcl_ops import compat
from tests.checks import same_bits
from tests.ops.fuzzing import both, unit

ROWS = unit(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
QUERY, GALLERY = ROWS[:4], ROWS[4:]
DISTANCES = [torch.cdist(a, b) for a, b in ((QUERY, GALLERY), (QUERY, QUERY), (GALLERY, GALLERY))]


@pytest.mark.parametrize("factor", [2.0**66, 2.0**120, 2.0**-45, 2.0**-90])
def test_reranking_depends_on_the_relation_of_distances_alone(factor):
    """Their squares lie outside fp32."""
    scaled = [matrix * factor for matrix in DISTANCES]
    expected = dhcl_ops.rerank_distances(*DISTANCES, 4, 2)
    assert same_bits(dhcl_ops.rerank_distances(*scaled, 4, 2), expected)
    assert (compat.torchreid.re_ranking(*scaled, 4, 2) == expected.numpy()).all()


@pytest.mark.parametrize("which", range(3))
def test_one_distance_of_1e20(which):
    changed = [matrix.clone() for matrix in DISTANCES]
    changed[which][1, 2] = 1e20
    assert dhcl_ops.rerank_distances(*changed, 4, 2).isfinite().all()
    assert np.isfinite(compat.torchreid.re_ranking(*changed, 4, 2)).all()


@pytest.mark.parametrize("which", range(3))
def test_a_distance_beyond_float32(which):
    changed = [matrix.double() for matrix in DISTANCES]
    changed[which][1, 2] = 1e300
    name = ("q_g", "q_q", "g_g")[which]
    with pytest.raises(ValueError, match=rf"{name} must be finite in float32 .got 1e\+300 in row"):
        dhcl_ops.rerank_distances(*changed, 4, 2)
    with pytest.raises(ValueError, match=f"re_ranking: {name}_dist must be finite in float32"):
        compat.torchreid.re_ranking(*changed, 4, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kappa_of_a_row_that_is_no_number(value):
    kappa = torch.tensor([0.1, value])
    with pytest.raises(ValueError, match=rf"kappa must be finite \(got {value} at .*position 1\)"):
        dhcl_ops.debiased_contrastive_loss(ROWS[:2], ROWS, torch.tensor([0, 1]), kappa=kappa)


@pytest.mark.parametrize("beta", [1e-300, 1e-45, 1e-39])
def test_a_hardness_below_float32_is_none(beta):
    exclude = torch.tensor([[3], [4]])
    calls = [
        dhcl_ops.debiased_contrastive_loss(
            ROWS[:2], ROWS, torch.tensor([0, 1]), beta=b, exclude=exclude
        )
        for b in (beta, 0.0)
    ]
    assert same_bits(*calls)


@pytest.mark.parametrize("positives", ["each", "sum"])
def test_a_loss_beyond_the_exponential_of_float64(positives):
    """At a small temperature it passes 709, the largest number that has an exponential."""
    labels = torch.tensor([1, 1, 0, 0])
    options = {"proxy_labels": torch.arange(8) % 2, "positives": positives, "kappa": 0.5}

    def gradients(dtype):
        rows = [x.to(dtype, copy=True).requires_grad_() for x in (QUERY, GALLERY)]
        loss = dhcl_ops.debiased_contrastive_loss(
            *rows, labels, temperature=2e-4, reduction="none", **options
        )
        loss.sum().backward()
        return loss.detach().double(), *(leaf.grad.double() for leaf in rows)

    compiled, reference = both(lambda: gradients(torch.float32))
    expected = gradients(torch.float64)
    assert expected[0].max() > 709
    for a, b, c in zip(compiled, reference, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-2)


def test_similarities_that_overflow_are_named():
    """The proxies themselves are finite, so there is none to name."""
    proxies = ROWS.clone()
    proxies[5] *= 3e38
    with pytest.raises(ValueError, match="similarities overflow float32"):
        dhcl_ops.debiased_contrastive_loss(ROWS[:2], proxies, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        dhcl_ops.debiased_contrastive_loss(ROWS[:2], ROWS, torch.tensor([0, 1]), temperature=1e-300)


def test_numbers_larger_than_any_float():
    with pytest.raises(ValueError, match=r"beta must be finite and >= 0 \(got inf\)"):
        dhcl_ops.debiased_contrastive_loss(ROWS[:2], ROWS, torch.tensor([0, 1]), beta=10**400)
    with pytest.raises(ValueError, match="eps must be finite in float32"):
        dhcl_ops.momentum_update_(ROWS.clone(), ROWS[:1], torch.tensor([0]), 0.2, eps=1e300)
    with pytest.raises(ValueError, match=r"k must be <= 9223372036854775807 \(got one of 1329 bi"):
        dhcl_ops.knn(ROWS, 10**400)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": ROWS[:3].numpy()}, TypeError, "features must be a tensor"),
        ({"features": ROWS[:3, :5]}, ValueError, r"features must have shape \(3, 8\)"),
        ({"features": ROWS[:3].long()}, TypeError, "features must be float32"),
        ({"features": ROWS[:3] * math.nan}, ValueError, "got nan at batch position 0, with row 1"),
        ({"bank": ROWS * 1e38 * 1e38}, ValueError, "similarities must be finite"),
        ({"bank": ROWS[0]}, ValueError, "bank must be 2-D"),
        ({"indices": torch.tensor([1, 1, 12])}, IndexError, r"\[0, 12\) \(got 12 at .*position 2"),
        ({"indices": torch.tensor([1, -1, 2])}, IndexError, r"\(got -1 at batch position 1\)"),
        ({"indices": torch.tensor([1, 2])}, ValueError, "indices must have shape"),
        ({"indices": torch.tensor([1, 2, 3]).int()}, TypeError, "indices must be int64"),
    ],
)
def test_errors_of_least_similar(change, error, message):
    arguments = {"features": ROWS[:3], "indices": torch.tensor([1, 1, 2]), "bank": ROWS, **change}
    with pytest.raises(error, match=f"least_similar: .*{message}"):
        dhcl_ops.least_similar(**arguments)


def test_large_identities_are_not_merged():
    """As floats, in which NumPy joins signed and unsigned numbers, these three are equal."""
    people = [2**63 + 1, 2**63, 2**63 - 1]
    distance = np.array([[0.3, 0.2, 0.1]])
    for dtype in (object, np.uint64):
        gallery = np.array(people, dtype)
        for query, rank in ((np.array([2**63 - 1], np.int64), 1), (gallery[:1], 3)):
            found = compat.torchreid.evaluate_rank(distance, query, gallery, [0], [1, 1, 1])
            assert found[0].tolist() == [float(k >= rank) for k in (1, 2, 3)]
    with pytest.raises(TypeError, match=r"query_ids must be int64 .*got uint64"):
        dhcl_ops.evaluate_ranking(
            torch.from_numpy(distance), np.array(people[:1], np.uint64), np.arange(3)
        )


def test_identities_of_any_size_are_told_apart():
    people = torch.tensor([-(2**63), 2**63 - 1, 2**62])
    distance = torch.tensor([[0.1, 0.2, 0.3]])
    found = dhcl_ops.evaluate_ranking(distance, people[1:2], people)
    assert found.cmc[:3].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("numbers", [[0, 2**62], [5, 2**63 - 1], [10**6, 10**9]])
def test_labels_with_gaps(numbers):
    """Only which rows are together counts, and no memory is taken for the numbers between."""
    tight = torch.arange(12) // 3
    plain = torch.arange(12) // 6
    gaps = torch.tensor(numbers)[plain]
    expected = dhcl_ops.self_paced_labels(tight, tight, plain)
    for found in (
        dhcl_ops.self_paced_labels(tight, tight, gaps),
        dhcl_ops.self_paced_labels(torch.tensor([*numbers, 3, 4])[tight], tight, plain),
    ):
        assert same_bits(found.independence, expected.independence)
    memory = dhcl_ops.MemoryBank(12, 8)
    memory.init(ROWS)
    memory.set_labels(tight)
    suspects = dhcl_ops.suspected_false_negatives(memory, gaps)
    assert suspects.groups.tolist() == [0, 0, 1, 1]
    assert suspects.others.tolist() == [1, 1, 1, 1]


def test_sizes_that_no_memory_holds():
    with pytest.raises(MemoryError, match=r"prototypes: .* number the classes without gaps"):
        dhcl_ops.prototypes(ROWS, torch.tensor([0] * 11 + [2**39]))
    with pytest.raises(ValueError, match="prototypes: labels must be class numbers"):
        dhcl_ops.prototypes(ROWS, torch.tensor([0] * 11 + [2**62]))
    with pytest.raises(MemoryError, match="MemoryBank: a dense matrix of 1099511627776 x 8"):
        dhcl_ops.MemoryBank(2**40, 8)


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e38])
def test_means_of_long_rows_are_normalised(scale):
    labels = torch.arange(12) % 3
    long = dhcl_ops.prototypes(ROWS * scale, labels, normalize=True)
    torch.testing.assert_close(long, dhcl_ops.prototypes(ROWS, labels, normalize=True))


def test_a_graph_with_nan_is_refused():
    graph = dhcl_ops.jaccard_graph(ROWS, 4, 2, 0.6)
    graph.values()[graph.crow_indices()[3]] = math.nan
    with pytest.raises(ValueError, match=r"dbscan: distances must not be NaN .got one in row 3"):
        dhcl_ops.dbscan(graph, 0.5, 2)


def test_arrays_of_the_other_byte_order():
    foreign = ROWS.numpy().astype(ROWS.numpy().dtype.newbyteorder())
    found = dhcl_ops.knn(foreign, 3)
    assert (found.indices == dhcl_ops.knn(ROWS, 3).indices.numpy()).all()
    with pytest.raises(ValueError, match="bank is changed in place and must have this machine's"):
        dhcl_ops.momentum_update_(foreign, ROWS[:1], torch.tensor([0]), 0.2)
