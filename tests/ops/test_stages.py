"""The stages from neighbour lists to the symmetric graph, each against its reference."""

import pytest

from dhcl_ops.knn import knn
from tests.checks import call, same_bits
from tests.ops.jaccard_data import REGIMES, features_like


@pytest.mark.parametrize("regime", REGIMES)
def test_every_stage_equals_its_reference(regime):
    x = features_like(regime, 150)
    found = knn(x, 20)
    ranks = found.indices.int()

    def both(name, *args):
        got, expected = (call(i, name, *args) for i in ("compiled", "reference"))
        tuples = isinstance(got, tuple)
        pairs = zip(got, expected, strict=True) if tuples else [(got, expected)]
        for a, b in pairs:
            assert same_bits(a, b), name
        return got

    positions = both("reciprocal_positions", ranks)
    offsets, columns = both("k_reciprocal", ranks, positions, 20, 11, 0, 150)
    part = both("k_reciprocal", ranks, positions, 20, 11, 40, 101)
    assert same_bits(part[1], columns[int(offsets[40]) : int(offsets[101])])
    both("pair_dots", x, ranks, None, offsets, columns, 0)
    dots = both("pair_dots", x, ranks, found.similarities, offsets, columns, 0)
    values = both("softmax_rows", offsets, 2 * dots - 2)
    rows = both("query_expand", ranks, offsets, columns, values, 6, 0, 150)
    for eps in (0.3, 0.6, 1.0):
        index = both("inverted_index", *rows, eps)
        both("jaccard_join", *rows, *index, eps, 0, 150)
        upper = both("jaccard_join", *rows, *index, eps, 33, 150)
        assert upper[0][0] == 0
    both("mirror_csr", *call("compiled", "jaccard_join", *rows, *index, 0.6, 0, 150))
    lists = (index[2], index[4], index[5])
    both("jaccard_rows", *rows, *lists, 0, 150)
    both("jaccard_rows", *rows, *lists, 20, 90)
