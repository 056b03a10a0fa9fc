"""Tracklets in training and evaluation: kept together, kept apart, each counted once."""

import dataclasses

import numpy as np
import pytest
import torch
from dhcl.config import LabelOptions
from dhcl.data import DataError, load_data
from dhcl.data.mot import CROP_PATTERN, read_mot, write_crops
from dhcl.data.tracks import Tracklets
from dhcl.metrics import cameras_apart
from dhcl.synth import render_crop
from dhcl.training.engine import Engine
from dhcl.training.evaluation import Evaluator
from dhcl.training.labels import pseudo_labels
from dhcl.training.network import make_model
from dhcl.training.record import read_record
from dhcl.training.runs import train

from dhcl_ops import cluster, evaluate_ranking
from tests.dhcl.data.walks import SIZE, write_walk
from tests.dhcl.toy import options

# As in the file names of MARS, whose tracklets are numbered within a person and a camera.
MARS = r"(?P<track>(?P<id>\d{4})C(?P<camera>\d)T\d{4})F"


def crowd(people=12, tracks=4, images=3, seed=0):
    """Features (N, d) of people with several tracklets, and the numbers of these."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, 1, 1, 64, generator=generator)
    noise = torch.randn(people, tracks, images, 64, generator=generator)
    features = torch.nn.functional.normalize((centres + 0.5 * noise).flatten(0, 2))
    return features, np.repeat(np.arange(people * tracks), images)


def labelled(features, tracklets, **changes):
    given = LabelOptions(**{"k1": 12, "k2": 3, "eps": 0.57, "min_samples": 2, **changes})
    cameras = torch.full((len(features),), -1)
    return pseudo_labels(
        features,
        cameras,
        given,
        loose=True,
        threshold=None,
        progress=lambda *_: None,
        tracklets=tracklets,
    )


def test_tracklets_are_clustered_by_their_pooled_features():
    features, tracks = crowd()
    tracklets = Tracklets.of_images(tracks)
    found = labelled(features, tracklets)
    rows = cluster(tracklets.pool(features), k1=12, k2=3, eps=0.57, min_samples=2, loose=True)
    assert rows.num_clusters > 6
    assert torch.equal(found.labels, tracklets.spread(rows.labels, alone=True))
    assert torch.equal(found.loose, tracklets.spread(rows.loose_labels, alone=True))
    for track in range(len(tracklets)):
        assert len(found.labels[tracklets.of == track].unique()) == 1
    assert {*found.seconds} == {"neighbours", "jaccard", "dbscan"}


def test_outliers_that_are_dropped_are_dropped_with_their_tracklet():
    features, tracks = crowd(people=30, tracks=2)
    tracklets = Tracklets.of_images(tracks)
    kept = labelled(features, tracklets, min_samples=3)
    dropped = labelled(features, tracklets, min_samples=3, outliers="drop")
    assert (kept.labels >= 0).all()
    assert (dropped.labels < 0).any()
    inside = dropped.labels >= 0
    assert torch.equal(kept.labels[inside], dropped.labels[inside])


@pytest.mark.parametrize("self_paced", [False, True])
def test_people_seen_at_once_never_share_a_cluster(self_paced):
    """Though they look alike: two halves of each person's tracklets are said to be two people."""
    features, tracks = crowd(tracks=6)
    together = labelled(features, Tracklets.of_images(tracks), self_paced=self_paced)
    # Tracklets 0 and 1 of each person share a frame, 2 and 3 another one.
    frames = np.where(tracks % 6 < 4, tracks // 2, -1)
    tracklets = Tracklets.of_images(tracks, frames=frames)
    assert len(tracklets.apart) == 24
    found = labelled(features, tracklets, self_paced=self_paced)
    rows = {t: int(np.flatnonzero(tracklets.of == t)[0]) for t in range(len(tracklets))}
    for labels in (found.labels, found.loose):
        for one, other in tracklets.apart.tolist():
            assert labels[rows[one]] != labels[rows[other]] or labels[rows[one]] == -1
    shared = [together.labels[rows[a]] == together.labels[rows[b]] for a, b in tracklets.apart]
    assert sum(map(bool, shared)) > 12
    assert (found.threshold is not None) == self_paced


# ---- a data set in the manner of MARS -----------------------------------------------------------


def write_mars(root, people=6, images=3):
    """Each person has a tracklet in each of two cameras, which are far from easy."""
    for who in range(people):
        for camera, split in ((1, "query"), (2, "gallery"), (1, "train"), (2, "train")):
            (root / split).mkdir(parents=True, exist_ok=True)
            for frame in range(images):
                number = who + people * (split == "train")
                crop = render_crop(0, number, camera, frame, SIZE)
                crop.save(root / split / f"{number:04d}C{camera}T0001F{frame:03d}.png")
    return root


@pytest.fixture(scope="module")
def mars(tmp_path_factory):
    return write_mars(tmp_path_factory.mktemp("mars"))


def test_evaluation_takes_each_tracklet_once(mars, tmp_path):
    config = options(mars, tmp_path / "run", data="folder", pattern=MARS)
    engine, data = Engine(config), load_data("folder", mars, pattern=MARS)
    model = make_model(config.model, 0, seed=0)
    evaluator = Evaluator(engine, data, model)
    query, gallery = evaluator.features(model)
    assert len(query) == len(gallery) == 18
    got = evaluator.metrics(query, gallery, reranked=True)
    means = [
        torch.stack([rows[3 * who : 3 * who + 3].mean(0) for who in range(6)])
        for rows in (query, gallery)
    ]
    means = [torch.nn.functional.normalize(rows) for rows in means]
    people = torch.arange(6)
    cameras = cameras_apart(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    expected = evaluate_ranking(tuple(means), people, people, *cameras)
    assert got["queries"] == 6
    assert got["mAP"] == pytest.approx(expected.mAP, abs=1e-6)
    assert got["rank1"] == pytest.approx(float(expected.cmc[0]))
    assert got["reranked"]["queries"] == 6
    by_image = dataclasses.replace(data, gallery=load_data("folder", mars).gallery)
    with pytest.raises(ValueError, match="no query"):
        Evaluator(engine, by_image, model).metrics(query, gallery)


def test_tracklets_of_two_people_are_named_before_training(mars, tmp_path):
    wrong = r"(?P<id>\d{4})C(?P<camera>\d)T(?P<track>\d{4})F"  # all are tracklet 1 of their camera
    given = options(mars, tmp_path / "run", data="folder", pattern=wrong)
    with pytest.raises(DataError, match="images of a tracklet must have one identity"):
        train(given, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- a training on crops of walks ---------------------------------------------------------------


def test_a_training_keeps_tracklets_together_and_those_seen_at_once_apart(tmp_path):
    for camera, people in ((1, (0, 1, 2, 3)), (2, (2, 3, 4, 5))):
        walk = write_walk(tmp_path / f"walk{camera}", people, camera)
        boxes = read_mot(walk / "boxes.txt")
        write_crops(boxes, walk / "img1", tmp_path / "crops", camera=camera)
    for memory in ("instances", "clusters"):
        small = {"memory": memory, "cluster_on": "extracted", "epochs": 2, "min_samples": 1}
        changes = {"data": "folder", "pattern": CROP_PATTERN, "eps": 0.9, **small}
        given = options(tmp_path / "crops", tmp_path / memory, **changes)
        trained = train(given, quiet=True)
        labels = read_record(tmp_path / memory).labels
        tracklets = Tracklets.of_list(trained.data.train)
        assert len(tracklets) == 8
        assert len(tracklets.apart) == 12
        for track in range(8):
            assert len(np.unique(labels[tracklets.of == track])) == 1
        first = labels[np.unique(tracklets.of, return_index=True)[1]]
        assert (first >= 0).all()
        assert all(first[a] != first[b] for a, b in tracklets.apart)
