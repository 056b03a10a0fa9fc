import numpy as np
import pytest
import torch
from dhcl.data import DataError, ImageList, load_data
from dhcl.data.tracks import Tracklets

PATTERN = r"^(?P<camera>\w)/(?P<track>\d+)_(?P<frame>\d+)"


def write(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


# ---- from numbers -------------------------------------------------------------------------------


def test_images_belong_together_by_camera_and_track():
    found = Tracklets.of_images(
        [5, 5, 5, -1, -1, 7, 5], [0, 1, 0, 0, 0, 0, 1], ids=[3, 4, 3, 1, 1, 2, 4]
    )
    assert found.of.tolist() == [0, 1, 0, 2, 3, 4, 1]
    assert found.cameras.tolist() == [0, 1, 0, 0, 0]
    assert found.ids.tolist() == [3, 4, 1, 1, 2]
    assert len(found) == 5
    assert found.apart.shape == (0, 2)


def test_what_a_camera_sees_at_once_is_apart():
    tracks = [1, 2, 3, 1, 2, -1, 1, 1]
    cameras = [0, 0, 0, 0, 1, 0, 0, 0]
    frames = [7, 7, 8, 8, 7, 7, -1, 8]
    found = Tracklets.of_images(tracks, cameras, frames=frames)
    assert found.of.tolist() == [0, 1, 2, 0, 3, 4, 0, 0]
    # In frame 7 of camera 0 tracks 1, 2 and one without number; in 8 tracks 3 and 1.
    assert found.apart.tolist() == [[0, 1], [0, 2], [0, 4], [1, 4]]


def test_pooled_features_are_means_of_length_1():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator))
    found = Tracklets.of_images([1, 2, 1, 2, 2, -1])
    pooled = found.pool(features)
    for row, images in enumerate(([0, 2], [1, 3, 4], [5])):
        mean = features[images].double().mean(0)
        assert torch.allclose(pooled[row].double(), mean / mean.norm(), atol=1e-6)
    with pytest.raises(ValueError, match="must have 6 rows, one per image"):
        found.pool(features[:5])


def test_labels_go_to_all_images_and_lone_tracklets_stay_together():
    found = Tracklets.of_images([1, 1, 2, 2, 3, -1, 4, 4])
    labels = torch.tensor([0, -1, 0, -1, -1])
    assert found.spread(labels).tolist() == [0, 0, -1, -1, 0, -1, -1, -1]
    assert found.spread(labels, alone=True).tolist() == [0, 0, 1, 1, 0, -1, 2, 2]
    none = torch.full((5,), -1)
    assert found.spread(none, alone=True).tolist() == [0, 0, 1, 1, -1, -1, 2, 2]


def test_numbers_that_do_not_fit():
    for wrong in ([[1, 2]], [1.0, 2.0], ["a"]):
        with pytest.raises(ValueError, match=r"tracks: must be \(N,\) whole numbers"):
            Tracklets.of_images(wrong)
    with pytest.raises(ValueError, match=r"frames: must be \(2,\) whole numbers"):
        Tracklets.of_images([1, 2], frames=[1])
    with pytest.raises(DataError, match=r"one identity \(got 4 and 3 in tracklet 7 of camera 0"):
        Tracklets.of_images([7, 7], [0, 0], ids=[3, 4])


# ---- from paths ---------------------------------------------------------------------------------


def test_a_pattern_reads_tracks_and_frames_within_a_camera(tmp_path):
    names = ["a/01_1.png", "a/1_02.png", "a/2_2.png", "b/1_2.png", "b/2_3.png", "else.png"]
    data = load_data("folder", write(tmp_path, names), pattern=PATTERN)
    images = data.train
    by_name = {p.relative_to(tmp_path).as_posix(): i for i, p in enumerate(images.paths)}
    at = [by_name[name] for name in names]
    tracks, frames = images.tracks[at], images.frames[at]
    assert tracks[0] == tracks[1]  # 01 is 1
    assert len(set(tracks[[0, 2, 3, 4]])) == 4
    assert frames[1] == frames[2]  # 02 is 2
    assert frames[3] != frames[2]  # of another camera
    assert tracks[5] == frames[5] == -1
    found = Tracklets.of_list(images)
    assert len(found) == 5
    pairs = [{int(found.of[at[1]]), int(found.of[at[2]])}]
    assert [set(pair) for pair in found.apart.tolist()] == pairs
    assert "Tracklets: 4 of train." in data.description
    assert "one camera saw in one frame are different people" in data.description


def test_frames_of_unknown_cameras_say_nothing(tmp_path):
    root = write(tmp_path, ["t1_f1.png", "t2_f1.png", "a_t3_f1.png", "a_t4_f1.png"])
    optional = r"^(?:(?P<camera>a)_)?t(?P<track>\d+)_f(?P<frame>\d+)"
    found = Tracklets.of_list(load_data("folder", root, pattern=optional).train)
    assert len(found) == 4
    assert len(found.apart) == 1
    alone = load_data("folder", root, pattern=r"t(?P<track>\d+)_f(?P<frame>\d+)").train
    assert len(Tracklets.of_list(alone).apart) == 6


def test_lists_without_tracks_are_as_before(tmp_path):
    root = write(tmp_path, ["1_c1.png", "2_c1.png"])
    data = load_data("folder", root, pattern=r"(?P<id>\d+)_c(?P<camera>\d+)")
    assert Tracklets.of_list(data.train) is None
    assert data.train.tracks.tolist() == [-1, -1]
    assert "racklets" not in data.description
    given = ImageList(data.train.paths, data.train.ids, data.train.cameras)
    assert given.frames.tolist() == [-1, -1]


def test_a_selection_keeps_tracks_and_frames(tmp_path):
    names = ["a/1_1.png", "a/1_2.png", "a/2_2.png"]
    images = load_data("folder", write(tmp_path, names), pattern=PATTERN).train
    chosen = images.select([2, 0])
    assert np.array_equal(chosen.tracks, images.tracks[[2, 0]])
    assert np.array_equal(chosen.frames, images.frames[[2, 0]])
    with pytest.raises(ValueError, match="tracks must be 1 integers"):
        ImageList(images.paths[:1], images.ids[:1], images.cameras[:1], images.tracks)
