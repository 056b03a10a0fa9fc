"""JaccardDBSCAN from scikit-learn's side: its checks, pipelines and searches; what it finds."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the extra train is not installed")
from dhcl import JaccardDBSCAN
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import DBSCAN
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from dhcl_ops import cluster, dbscan, jaccard_distance, jaccard_graph

NOT_APPLICABLE = {
    "check_estimators_dtypes": "its integers have a row of zeros, which has no direction",
}


@parametrize_with_checks(
    [JaccardDBSCAN(), JaccardDBSCAN(eps=[0.4, 0.6]), JaccardDBSCAN(self_paced=True, k1=8, k2=2)],
    expected_failed_checks=lambda estimator: NOT_APPLICABLE,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def crops(people=12, each=8, width=24, noise=0.8, seed=0):
    """Features (N, d) float32 that are not of length 1, and who they are of."""
    draw = np.random.default_rng(seed)
    ids = np.arange(people).repeat(each)
    rows = draw.normal(size=(people, width))[ids] + noise * draw.normal(size=(people * each, width))
    return (rows * draw.uniform(0.5, 9, (len(rows), 1))).astype(np.float32), ids


ROWS, IDS = crops()
UNIT = torch.nn.functional.normalize(torch.from_numpy(ROWS))
SMALL = {"k1": 10, "k2": 3, "eps": 0.55, "min_samples": 3}


def test_it_finds_what_dbscan_finds_on_the_dense_matrix():
    distances = jaccard_distance(UNIT, 10, 3).numpy()
    theirs = DBSCAN(eps=0.55, min_samples=3, metric="precomputed").fit(distances)
    ours = JaccardDBSCAN(**SMALL).fit(ROWS)
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    assert ours.core_sample_indices_.tolist() == theirs.core_sample_indices_.tolist()
    assert 0 < len(ours.core_sample_indices_) < len(ROWS)
    assert (ours.n_features_in_, ours.labels_.dtype) == (24, np.int64)
    assert adjusted_rand_score(IDS, ours.labels_) > 0.8


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda rows: rows.tolist(), id="lists"),
        pytest.param(lambda rows: rows.astype(np.float64), id="float64"),
        pytest.param(np.asfortranarray, id="columns first"),
        pytest.param(lambda rows: np.repeat(rows, 2, axis=1)[:, ::2], id="strided"),
        pytest.param(torch.from_numpy, id="tensor"),
        pytest.param(lambda rows: torch.from_numpy(rows).double(), id="double tensor"),
        pytest.param(lambda rows: torch.from_numpy(rows).requires_grad_(), id="with gradient"),
        pytest.param(lambda rows: rows.astype(np.float64) * 1e200, id="very long rows"),
        pytest.param(lambda rows: rows.astype(np.float64) * 1e-200, id="very short rows"),
    ],
)
def test_rows_of_every_kind_and_length_give_the_same_labels(kind):
    expected = cluster(UNIT, **SMALL).labels
    assert JaccardDBSCAN(**SMALL).fit_predict(kind(ROWS)).tolist() == expected.tolist()


def test_a_bfloat16_tensor_is_taken_as_it_is_rounded():
    rows = torch.from_numpy(ROWS).bfloat16()
    expected = JaccardDBSCAN(**SMALL).fit_predict(rows.float())
    assert JaccardDBSCAN(**SMALL).fit_predict(rows).tolist() == expected.tolist()


def test_several_eps_are_fitted_at_once():
    radii = [0.55, 0.3, 0.7]
    found = JaccardDBSCAN(**SMALL | {"eps": radii}).fit(ROWS)
    expected = dbscan(jaccard_graph(UNIT, 10, 3, 0.7), radii, 3)
    assert found.labels_by_eps_.tolist() == expected.tolist()
    alone = JaccardDBSCAN(**SMALL).fit(ROWS)
    assert found.labels_.tolist() == alone.labels_.tolist() == expected[0].tolist()
    assert found.core_sample_indices_.tolist() == alone.core_sample_indices_.tolist()
    assert alone.labels_by_eps_.shape == (1, len(ROWS))


def test_the_self_paced_choice():
    paced = JaccardDBSCAN(**SMALL, self_paced=True, eps_gap=0.1).fit(ROWS)
    expected = cluster(UNIT, **SMALL, self_paced=True, eps_gap=0.1).labels
    assert paced.labels_.tolist() == expected.tolist()
    plain = JaccardDBSCAN(**SMALL).fit(ROWS)
    assert (paced.labels_ < 0).sum() > (plain.labels_ < 0).sum(), "it leaves something out"
    assert {*paced.core_sample_indices_} < {*plain.core_sample_indices_}
    assert (paced.labels_[paced.core_sample_indices_] >= 0).all()


def test_a_pipeline_and_a_search_for_eps():
    pipeline = make_pipeline(StandardScaler(), PCA(12, random_state=0), JaccardDBSCAN(**SMALL))
    labels = pipeline.fit_predict(ROWS)
    by_hand = PCA(12, random_state=0).fit_transform(StandardScaler().fit_transform(ROWS))
    assert labels.tolist() == JaccardDBSCAN(**SMALL).fit_predict(by_hand).tolist()
    assert adjusted_rand_score(IDS, labels) > 0.7

    def agreement(estimator, X, y):
        return adjusted_rand_score(y, estimator.fit_predict(X))

    grid = {"jaccarddbscan__eps": [0.05, 0.55], "jaccarddbscan__k1": np.array([10])}
    search = GridSearchCV(pipeline, grid, scoring=agreement, cv=[(np.arange(96), np.arange(96))])
    assert search.fit(ROWS, IDS).best_params_["jaccarddbscan__eps"] == 0.55


def test_it_is_an_estimator_like_any_other():
    one = JaccardDBSCAN(0.4, k1=7)
    assert isinstance(one, BaseEstimator)
    assert one.get_params() == {
        **{"eps": 0.4, "min_samples": 4, "k1": 7, "k2": 6, "convention": "spcl"},
        **{"self_paced": False, "eps_gap": 0.02},
    }
    other = clone(one.fit(ROWS)).set_params(k1=5, self_paced=True)
    assert (one.k1, other.k1, other.self_paced) == (7, 5, True)
    assert not hasattr(other, "labels_")
    assert pickle.loads(pickle.dumps(one)).labels_.tolist() == one.labels_.tolist()
    assert repr(one) == "JaccardDBSCAN(eps=0.4, k1=7)"
    with pytest.raises(ValueError, match="Invalid parameter 'epsilon'"):
        one.set_params(epsilon=1)


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ({"eps": 1.5}, ValueError, r"JaccardDBSCAN: eps must be in \(0, 1\) \(got 1.5\)"),
        ({"eps": [0.4, 0]}, ValueError, r"JaccardDBSCAN: eps must be in \(0, 1\) \(got 0\)"),
        ({"eps": "0.5"}, TypeError, r"JaccardDBSCAN: eps must be a number \(got str\)"),
        ({"eps": []}, ValueError, "JaccardDBSCAN: eps must be a number or several"),
        ({"eps": [0.4, 0.5], "self_paced": True}, ValueError, "self_paced goes with one eps"),
        ({"k1": 0}, ValueError, r"JaccardDBSCAN: k1 must be >= 1 \(got 0\)"),
        ({"k2": 2.5}, TypeError, "JaccardDBSCAN: k2 must be an integer"),
        ({"min_samples": 0}, ValueError, "JaccardDBSCAN: min_samples must be >= 1"),
        ({"convention": "other"}, ValueError, "JaccardDBSCAN: convention must be"),
        ({"eps": 0.99, "self_paced": True}, ValueError, "JaccardDBSCAN: eps -/\\+ eps_gap"),
    ],
)
def test_wrong_parameters_are_named_when_it_is_fitted(parameters, kind, message):
    with pytest.raises(kind, match=message):
        JaccardDBSCAN(**parameters).fit(ROWS)


def test_rows_without_a_direction_are_named():
    rows = ROWS.copy()
    rows[[5, 9]] = 0
    with pytest.raises(ValueError, match=r"zeros in row 5, 2 such rows"):
        JaccardDBSCAN(**SMALL).fit(rows)
