import numpy as np
import pytest
import torch
from dhcl.errors import ConfigError
from dhcl.metrics import RANKS, agreement, by_name, check_ranks, table
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from dhcl_ops import evaluate_ranking

NUMBERS = st.integers(-2, 5)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40))
def test_agreement_is_scikit_learns(pairs):
    """An image in no cluster is a cluster of its own; one of no known identity does not count."""
    ids = np.array([one for one, _ in pairs], dtype=np.int64)
    labels = np.array([max(other, -1) for _, other in pairs], dtype=np.int64)
    found = agreement(ids, torch.from_numpy(labels))
    labels, ids = labels[ids >= 0], ids[ids >= 0]
    if not len(ids):
        assert found == {}
        return
    apart = np.where(labels < 0, 100 + np.arange(len(labels)), labels)
    expected = {
        "ari": adjusted_rand_score(ids, apart),
        "nmi": normalized_mutual_info_score(ids, apart),
    }
    if (inside := labels >= 0).any():
        table = contingency_matrix(ids[inside], labels[inside])
        expected["purity"] = table.max(axis=0).sum() / inside.sum()
    assert found == pytest.approx(expected, abs=1e-12)


def test_agreement_of_known_cases():
    ids = np.array([7, 7, 3, 3, -1])
    assert agreement(ids, np.array([1, 1, 0, 0, 0])) == {"ari": 1.0, "nmi": 1.0, "purity": 1.0}
    assert agreement(ids, np.array([0, 0, 0, 0, 0])) == {"ari": 0.0, "nmi": 0.0, "purity": 0.5}
    assert agreement(ids, np.full(5, -1)) == {"ari": 0.0, "nmi": pytest.approx(2 / 3)}
    assert agreement(np.full(5, -1), ids) == {}


def test_a_table_has_the_ranks_of_its_rows():
    distance = torch.rand(6, 30, generator=torch.Generator().manual_seed(0))
    found = evaluate_ranking(distance, torch.arange(6), torch.arange(30) % 6)
    assert [*by_name(found)] == ["mAP", "rank1", "rank5", "rank10", "mINP", "queries"]
    row = by_name(found, (1, 20))
    assert row["rank20"] == found.cmc[19] > row["rank1"]
    lines = table({"a": row, "longer": row}).splitlines()
    assert lines[0] == "|        |    mAP |  rank1 | rank20 |   mINP |"
    assert lines[3].startswith(f"| longer | {100 * found.mAP:6.1f} | ")
    assert len(lines) == 4


def test_ranks_are_checked():
    check_ranks(RANKS)
    for ranks, got in (((), "none"), ((1, 0), "1 0"), ((-5,), "-5"), ((10**7,), "10000000")):
        with pytest.raises(ConfigError, match=rf"ranks: must be numbers from 1 to .*got {got}\)"):
            check_ranks(ranks)
