"""Finite numbers that are too large are named as what they are, or are taken."""

import pytest
import torch

from dhcl_ops import (
    MemoryBank,
    debiased_contrastive_loss,
    self_paced_labels,
    suspected_false_negatives,
)

UNIT = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
LABELS = torch.arange(8) // 2
HUGE = 2**63 - 1


def test_a_finite_feature_whose_norm_overflows_is_not_called_infinite():
    features = UNIT.clone()
    features[3] = 1e20
    with pytest.raises(ValueError, match=r"norms of features must be finite .* at row 3\)"):
        debiased_contrastive_loss(features, UNIT, LABELS)
    features[3] = torch.inf
    with pytest.raises(ValueError, match=r"features must be finite \(got one that is not at row 3"):
        debiased_contrastive_loss(features, UNIT, LABELS)


def spread(labels):
    """The same partition under numbers as hashes are, in the same order."""
    return torch.where(labels < 0, labels, HUGE - 40 + 7 * labels)


def test_huge_labels_are_labels_like_others():
    labels = torch.tensor([0, 0, 1, 1, -1, 2, 2, 2])
    tight = torch.tensor([0, 0, 1, -1, -1, 2, 2, 2])
    loose = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2])
    expected = self_paced_labels(labels, tight, loose)
    found = self_paced_labels(spread(labels), spread(tight), spread(loose))
    assert found.threshold == expected.threshold
    for one, other in zip(found, expected, strict=True):
        assert one == other if isinstance(one, float) else torch.equal(one, other)

    bank = MemoryBank(8, 4)
    bank.init(UNIT)
    bank.set_labels(labels)
    for given in (loose, torch.full((8,), -1), torch.where(loose == 2, -1, loose)):
        plain = suspected_false_negatives(bank, given)
        huge = suspected_false_negatives(bank, spread(given))
        assert torch.equal(huge.others, plain.others)
        together = [s.groups[:, None] == s.groups for s in (huge, plain)]
        assert torch.equal(*together)
