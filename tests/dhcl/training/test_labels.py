import pytest
import torch
from dhcl.config import EPS_GAP, LabelOptions
from dhcl.training.labels import pseudo_labels

from dhcl_ops import camera_neighbours, cluster, dbscan, jaccard_graph, self_paced_labels


@pytest.fixture(scope="module")
def features():
    """60 people with 5 images each, not all of them apart."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(60, 1, 16, generator=generator)
    images = people + 0.45 * torch.randn(60, 5, 16, generator=generator)
    return torch.nn.functional.normalize(images.flatten(0, 1), dim=1)


CAMERAS = torch.arange(300) % 3


def found(features, options, *, loose=False, threshold=None):
    def progress(stage, done, total):
        stages.add(stage)

    stages = set()
    result = pseudo_labels(
        features, CAMERAS, options, loose=loose, threshold=threshold, progress=progress
    )
    assert stages
    assert result.seconds.keys() == {"neighbours", "jaccard", "dbscan"}
    return result


def test_labels_are_those_of_the_ops(features):
    options = LabelOptions(k1=12, k2=4, eps=0.5, min_samples=3)
    result = found(features, options)
    expected = cluster(features, k1=12, k2=4, eps=0.5, min_samples=3).labels
    assert torch.equal(result.labels, expected)
    assert 10 < expected.max() < 60
    assert (result.loose, result.threshold) == (None, None)


@pytest.mark.parametrize("self_paced", [False, True])
def test_loose_labels_and_the_threshold_are_of_one_graph(features, self_paced):
    options = LabelOptions(k1=12, k2=4, eps=0.5, min_samples=3, self_paced=self_paced)
    result = found(features, options, loose=True)
    graph = jaccard_graph(features, k1=12, k2=4, eps=0.5 + EPS_GAP)
    radii = (0.5 - EPS_GAP, 0.5, 0.5 + EPS_GAP)
    tight, labels, loose = (dbscan(graph, radius, 3) for radius in radii)
    assert torch.equal(result.loose, loose)
    if not self_paced:
        assert torch.equal(result.labels, labels)
        assert result.threshold is None
        return
    chosen = self_paced_labels(labels, tight, loose)
    assert torch.equal(result.labels, chosen.labels)
    assert not torch.equal(result.labels, labels)
    assert result.threshold == chosen.threshold
    # A limit from an earlier epoch is kept; nothing is as independent as none at all.
    later = found(features, options, threshold=0.0)
    assert later.threshold == 0.0
    assert later.loose is None
    assert torch.equal(later.labels, self_paced_labels(labels, tight, loose, 0.0).labels)


def test_neighbours_of_the_own_camera_are_asked_for(features):
    options = LabelOptions(k1=12, k1_own=4, k2=4, eps=0.6, min_samples=3)
    ranks = camera_neighbours(features, CAMERAS, 12, 4)
    expected = cluster(features, k1=12, k2=4, eps=0.6, min_samples=3, ranks=ranks).labels
    result = found(features, options)
    assert torch.equal(result.labels, expected)
    without = found(features, LabelOptions(k1=12, k2=4, eps=0.6, min_samples=3))
    assert not torch.equal(result.labels, without.labels)
