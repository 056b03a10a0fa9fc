import numpy as np
import pytest
import torch

from dhcl_ops import _ops, reciprocal
from dhcl_ops.knn import knn
from tests.ops.jaccard_data import (
    REGIMES,
    dense_expansion,
    dense_weights,
    expanded,
    features_like,
)
from tests.ops.stages import equals_reference_on_samples


def test_op_equals_its_reference_on_the_sample():
    equals_reference_on_samples("reciprocal")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("k1", "k2"), [(15, 4), (12, 1)])
@pytest.mark.parametrize("convention", ["spcl", "zhong"])
def test_sets_and_weights_follow_the_definition(regime, k1, k2, convention):
    x = features_like(regime, 150)
    k, half, _ = reciprocal.list_width("test", len(x), k1, k2, convention)
    ranks = knn(x, k)
    rows = reciprocal.encode("test", x, k1, 1, convention, ranks, None).rows
    for i in range(len(x)):
        members = expanded(ranks.indices.numpy(), i, k, half)
        begin, end = rows.offsets[i : i + 2].tolist()
        np.testing.assert_array_equal(rows.columns[begin:end].numpy(), members)
    squares = 2 - 2 * (x.double() @ x.double().T).numpy()
    weights = dense_weights(ranks.indices.numpy(), squares, k1, convention)
    expected = dense_expansion(weights, ranks.indices.numpy(), k2)
    rows = reciprocal.encode("test", x, k1, k2, convention, ranks, None).rows
    row = torch.arange(len(x)).repeat_interleave(rows.offsets.diff())
    got = np.zeros_like(expected)
    got[row.numpy(), rows.columns.numpy()] = rows.values.numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_ops_check_what_they_index_with():
    """Pointers must not leave their arrays; in PyTorch indexing itself looks."""
    outside = torch.tensor([[0], [3], [1]], dtype=torch.int32)
    if not _ops.OPS["reciprocal_positions"].compiled("cpu"):
        with pytest.raises(IndexError):
            torch.ops.dhcl.reciprocal_positions(outside)
        return
    with pytest.raises(RuntimeError, match=r"ranks must be in \[0, 3\) \(got 3 in row 1\)"):
        torch.ops.dhcl.reciprocal_positions(outside)
