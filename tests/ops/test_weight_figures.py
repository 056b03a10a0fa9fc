"""The figures of kappa and beta show what the formulas of docs/method.md say."""

import math

import pytest
import torch

from docs.figures.weights import NEGATIVES, TEMPERATURE, negative_similarities, posterior, slopes
from docs.figures.weights import weights as weights_of


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_weights_are_the_softmax_of_one_plus_beta_times_the_logits(beta):
    negatives = negative_similarities()
    expected = ((1 + beta) * negatives / TEMPERATURE).softmax(0)
    torch.testing.assert_close(weights_of(beta, negatives), expected)


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0, 70.0])
def test_the_scale_is_that_of_the_formula_up_to_the_clamp(kappa):
    negatives = negative_similarities()
    end = 1 / (1 + kappa)
    for cosine in torch.linspace(0.2, 0.9, 29, dtype=torch.float64).tolist():
        share = posterior(cosine, negatives)
        row = slopes(cosine, negatives, kappa=kappa)
        assert row.clamped == (share > end)
        if not row.clamped:
            ratio = (1 - share) / share
            rest = 1 - kappa / NEGATIVES
            expected = ratio / (rest + ratio - kappa)
            assert math.isclose(-float(row.positive), expected, rel_tol=1e-5)
        else:
            assert -float(row.positive) < 1e-3
            assert not row.negatives.any()
