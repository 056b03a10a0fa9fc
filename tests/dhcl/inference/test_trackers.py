"""A model as the appearance part of trackers: with theirs where they are installed, and alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dhcl.inference.trackers import Embedder
from PIL import Image

HEIGHT, WIDTH = 64, 32


@pytest.fixture
def embedder(model):
    return Embedder(model)


def person(who, time):
    """A picture (64, 32, 3) in BGR of someone in clothes of their own, with new noise each time."""
    colours = np.random.default_rng(1000 + who).uniform(0, 1, (4, 2, 3))
    noise = np.random.default_rng([who, time]).normal(0, 0.05, (HEIGHT, WIDTH, 3))
    picture = colours.repeat(16, 0).repeat(16, 1) + noise
    return (picture.clip(0, 1) * 255).astype(np.uint8)[:, :, ::-1]


def scene(places, time):
    """A frame (100, 200, 3) in BGR with people 1, 2, ... at these columns, and their boxes."""
    frame = np.full((100, 200, 3), 120, np.uint8)
    boxes = np.zeros((len(places), 4), np.float32)
    for number, left in enumerate(places):
        frame[20 : 20 + HEIGHT, left : left + WIDTH] = person(number + 1, time)
        boxes[number] = left, 20, left + WIDTH, 20 + HEIGHT
    return frame, boxes


def swapped(apart):
    """Frames and boxes: two stand beside each other, can't be seen, and have changed places."""
    here, there = (60, 60 + apart), (60 + apart, 60)
    return [scene(at, time) for time, at in enumerate([here] * 8 + [()] * 3 + [there] * 5)]


# ---- without a tracker --------------------------------------------------------------------------


def test_features_are_those_of_the_crops_in_rgb(embedder, model):
    frame, boxes = scene((10, 90), 0)
    crops = np.stack([person(1, 0), person(2, 0)])[..., ::-1]
    expected = model.features(crops.copy()).numpy()
    got = embedder.get_features(boxes, frame)
    assert got.dtype == np.float32
    assert got.shape == (2, model.dim)
    assert np.allclose(got, expected, atol=1e-6)
    wrong_way_round = embedder.get_features(boxes, frame[..., ::-1])
    assert not np.allclose(wrong_way_round, expected, atol=1e-2)
    as_rgb = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
    for same in (
        embedder.get_features(boxes.tolist(), as_rgb),
        embedder.get_features(boxes.astype(int), np.asfortranarray(frame)),
        embedder.get_features(torch.from_numpy(boxes), frame),
        embedder.predict([person(1, 0), person(2, 0)]),
        embedder.get_features(boxes + 0.4, frame),
    ):
        assert np.allclose(same, got, atol=1e-6)
    assert np.allclose(embedder.get_features(boxes[0], frame), got[:1], atol=1e-6)


def test_no_boxes_have_no_features(embedder, model):
    frame, _ = scene((), 0)
    for none in ([], np.zeros((0, 4)), np.zeros((0, 5)), np.array([])):
        assert embedder.get_features(none, frame).shape == (0, model.dim)
    assert embedder.predict([]) == []
    assert embedder.without_pixels == 0


def test_boxes_are_cut_at_the_border(embedder, model):
    frame, _ = scene((0,), 0)
    got = embedder.get_features([[-50, 20, WIDTH, 20 + HEIGHT], [150, -9, 1e9, 1e30]], frame)
    parts = [frame[20 : 20 + HEIGHT, :WIDTH], frame[:, 150:]]
    expected = model.features([np.ascontiguousarray(part[..., ::-1]) for part in parts])
    assert np.allclose(got, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "box",
    [
        (300, 20, 340, 80),
        (-40, 20, -10, 80),
        (10, 20, 10, 80),
        (50, 80, 20, 30),
        (10.1, 20, 10.3, 80),
        (np.nan, 20, 40, 80),
        (10, 20, np.inf, 80),
    ],
)
def test_a_box_without_pixels_is_like_nobody_and_harms_no_other(embedder, model, box):
    frame, boxes = scene((10, 90), 0)
    got = embedder.get_features(np.vstack([boxes[:1], [box], boxes[1:]]), frame)
    assert embedder.without_pixels == 1
    assert np.allclose(got[[0, 2]], embedder.get_features(boxes, frame), atol=1e-6)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    zeros = torch.zeros(1, 3, *model.image_size)
    assert np.allclose(got[1], model.model(zeros)[0].numpy(), atol=0.05)
    assert np.allclose(got[1], embedder.predict([frame[:0]])[0], atol=1e-6)


def test_batches_do_not_show_and_cameras_do(model):
    frame, boxes = scene((0, 40, 80, 120, 160), 0)
    expected = Embedder(model).get_features(boxes, frame)
    assert np.allclose(
        Embedder(model, batch_size=2).get_features(boxes, frame), expected, atol=1e-6
    )
    other = Embedder(model, camera=0).get_features(boxes, frame)
    assert not np.allclose(other, expected, atol=1e-3)
    with pytest.raises(ValueError, match="batch_size: must be at least 1"):
        Embedder(model, batch_size=0)


def test_detections_get_features_of_their_own(embedder):
    frame, boxes = scene((10, 90), 0)
    detections = SimpleNamespace(xyxy=boxes, data={"class_name": ["person"] * 2})
    assert embedder.describe(detections, frame) is detections
    assert np.array_equal(detections.data["features"], embedder.get_features(boxes, frame))
    assert detections.data["class_name"] == ["person"] * 2
    with pytest.raises(TypeError, match=r"detections: must have boxes xyxy .* \(got ndarray\)"):
        embedder.describe(boxes, frame)


def test_other_forms_are_refused_by_name(embedder):
    frame, boxes = scene((10,), 0)
    for wrong, message in (
        (np.zeros((2, 5)), r"boxes: must be \(N, 4\) numbers.*\(2, 5\).*rotated boxes"),
        (np.zeros((2, 3)), r"boxes: must be \(N, 4\) numbers"),
        (["abcd"], r"boxes: must be \(N, 4\) numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            embedder.get_features(wrong, frame)
    for wrong in (frame[..., 0], frame / 255.0, frame.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"img: must be \(H, W, 3\) uint8, BGR"):
            embedder.get_features(boxes, wrong)
    with pytest.raises(TypeError, match=r"img: must be a BGR array or a PIL image \(got str\)"):
        embedder.get_features(boxes, "frame.jpg")
    with pytest.raises(ValueError, match=r"crops\[1\]: must be"):
        embedder.predict([frame, frame[0]])


# ---- with trackers ------------------------------------------------------------------------------


def test_boxmot_knows_people_again_who_have_changed_places(model):
    boxmot = pytest.importorskip("boxmot", reason="boxmot is not installed")

    def tracks(tracker):
        """Track numbers from left to right, at the first and the last sight."""
        seen = []
        for frame, boxes in swapped(40):
            scores = np.tile(np.float32([0.9, 0]), (len(boxes), 1))
            rows = np.asarray(tracker.update(np.hstack([boxes, scores]), frame))
            seen.append([int(row[4]) for row in sorted(rows.tolist())] if rows.size else [])
        return seen[7], seen[-1]

    before, after = tracks(boxmot.HybridSort(reid_model=Embedder(model)))
    assert len(set(before)) == 2
    assert after == before[::-1]
    # By motion alone, each gets the other's number.
    before, after = tracks(boxmot.HybridSort(use_embeddings=False))
    assert after == before


@pytest.mark.parametrize("name", ["BotSort", "DeepOcSort", "StrongSort"])
def test_trackers_of_boxmot_go_on_past_bad_boxes(model, name):
    boxmot = pytest.importorskip("boxmot", reason="boxmot is not installed")
    embedder = Embedder(model)
    tracker = getattr(boxmot, name)(reid_model=embedder)
    for time in range(5):
        frame, boxes = scene((20 + 2 * time, 120 - 2 * time), time)
        outside = np.float32([[210, 20, 240, 84]])
        boxes = np.vstack([boxes, outside]) if time == 2 else boxes
        scores = np.tile(np.float32([0.9, 0]), (len(boxes), 1))
        rows = np.asarray(tracker.update(np.hstack([boxes, scores]), frame))
    assert embedder.without_pixels == 1
    assert sorted(int(row[4]) for row in rows)[:2] == [0, 1]


def test_deep_sort_realtime_takes_it_as_its_embedder(model):
    deep_sort = pytest.importorskip(
        "deep_sort_realtime.deepsort_tracker", reason="deep-sort-realtime is not installed"
    )
    tracker = deep_sort.DeepSort(embedder=None, n_init=1)
    tracker.embedder = Embedder(model)
    for time in range(6):
        frame, boxes = scene((20 + 4 * time, 140 - 4 * time), time)
        found = [([left, top, right - left, bottom - top], 0.9, "person")
                 for left, top, right, bottom in boxes.tolist()]  # fmt: skip
        tracks = tracker.update_tracks(found, frame=frame)
    features = [track.get_feature() for track in tracks]
    assert np.allclose(features, tracker.embedder.get_features(boxes, frame), atol=1e-6)
    assert [track.track_id for track in tracks] == ["1", "2"]
    assert tracker.update_tracks([], frame=frame)


def test_detections_of_supervision_keep_their_features(embedder):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    frame, boxes = scene((10, 60, 120), 0)
    confidence = np.array([0.9, 0.2, 0.8])
    detections = supervision.Detections(xyxy=boxes, confidence=confidence)
    sure = embedder.describe(detections, frame)[detections.confidence > 0.5]
    expected = embedder.get_features(boxes[[0, 2]], frame)
    assert np.allclose(sure.data["features"], expected, atol=1e-6)
    empty = embedder.describe(supervision.Detections.empty(), frame)
    assert empty.data["features"].shape == (0, embedder.model.dim)
