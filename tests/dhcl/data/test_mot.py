import os

import numpy as np
import pytest
from dhcl.cli import main
from dhcl.data import DataError, load_data
from dhcl.data.mot import CROP_PATTERN, Box, read_mot, write_crops
from dhcl.data.tracks import Tracklets
from PIL import Image

from tests.dhcl.data.walks import SIZE, pixels, write_walk


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"), people=(0, 1, 2), frames=4)


def test_boxes_of_a_ground_truth_and_of_a_tracker(tmp_path):
    file = tmp_path / "gt.txt"
    file.write_text(
        "1, 3, 10, 20, 30, 60, 1, 1, 0.5\n\n2,3,11.5,-4,30,60,0.9,-1,-1,-1\n2,4,0,0,1,1,0,1,1\n"
    )
    assert read_mot(file) == [Box(1, 3, 10, 20, 30, 60), Box(2, 3, 11.5, -4, 30, 60)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n", "must be frame,track,left,top,width,height"),
        ("1,2,3,4,5,6\n1,2,a,4,5,6\n", "got '1,2,a,4,5,6' in line 2"),
        ("1.5,2,3,4,5,6\n", "in line 1"),
        ("1,2,nan,4,5,6\n", "in line 1"),
        ("1,inf,3,4,5,6\n", "in line 1"),
        ("1,2,3,4,5,6,x\n", "in line 1"),
        ("1,-1,3,4,5,6,0.9\n", "must have a track number .* through a tracker first"),
        ("", "there are none"),
        ("1,2,3,4,5,6,0\n", "there are none"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    (tmp_path / "boxes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_mot(tmp_path / "boxes.txt")
    with pytest.raises(DataError, match="no such file"):
        read_mot(tmp_path / "none.txt")


def test_crops_are_the_pixels_in_the_boxes_with_their_numbers(walk, tmp_path):
    report = write_crops(read_mot(walk / "boxes.txt"), walk / "img1", tmp_path / "crops")
    assert (report.crops, report.tracks, report.frames, report.without_pixels) == (12, 3, 4, 1)
    files = sorted((tmp_path / "crops" / "c1").iterdir())
    assert len(files) == 12
    crop = pixels(tmp_path / "crops" / "c1" / "0002_c1_f000003.png")
    frame = pixels(walk / "img1" / "000003.png")
    assert np.array_equal(crop, frame[13 : 13 + SIZE[0], 43 : 43 + SIZE[1]])
    images = load_data("folder", tmp_path / "crops", pattern=CROP_PATTERN).train
    found = Tracklets.of_list(images)
    assert len(found) == 3
    assert found.apart.tolist() == [[0, 1], [0, 2], [1, 2]]


def test_boxes_are_cut_at_the_border(walk, tmp_path):
    boxes = [Box(1, 1, -10, -10, 30, 40), Box(1, 2, 120.4, 80, 500, 500)]
    write_crops(boxes, walk / "img1", tmp_path, camera=7)
    frame = pixels(walk / "img1" / "000001.png")
    assert np.array_equal(pixels(tmp_path / "c7" / "0001_c7_f000001.png"), frame[:30, :20])
    assert np.array_equal(pixels(tmp_path / "c7" / "0002_c7_f000001.png"), frame[80:, 120:])


def test_cameras_share_a_folder_and_nothing_is_written_over(walk, tmp_path, capsys):
    given = [
        "crops",
        str(walk / "boxes.txt"),
        "--frames",
        str(walk / "img1"),
        "--out",
        str(tmp_path),
    ]
    assert main(given) == 0
    assert main([*given, "--camera", "2", "--every", "2"]) == 0
    told = capsys.readouterr().out
    assert "12 images of 3 tracks from 4 frames of camera 1; 1 boxes have no pixels" in told
    assert "6 images of 3 tracks from 2 frames of camera 2" in told
    assert CROP_PATTERN in told
    assert main(given) == 2
    assert "crops of camera 1 in" in capsys.readouterr().err
    mode = tmp_path / "plain"
    mode.mkdir()
    assert (tmp_path / "c1").stat().st_mode == mode.stat().st_mode


def test_what_goes_wrong_leaves_nothing(walk, tmp_path):
    boxes = read_mot(walk / "boxes.txt")
    (tmp_path / "file.avi").write_text("no video")
    (tmp_path / "names").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "names" / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    for wrong, message in (
        ((boxes, tmp_path / "none"), "neither a folder nor a video"),
        ((boxes, tmp_path / "names"), "no numbers in its names"),
        (([*boxes, Box(9, 1, 0, 0, 4, 4)], walk / "img1"), "no frame 9 .* has 1 to 4"),
        (([Box(1, 1, 900, 0, 4, 4)], walk / "img1"), "none of 1 has pixels"),
        ((boxes, tmp_path / "file.avi"), "needs OpenCV|can't be read as a video"),
    ):
        with pytest.raises(DataError, match=message):
            write_crops(*wrong, out)
    with pytest.raises(DataError, match="every and camera"):
        write_crops(boxes, walk / "img1", out, every=0)
    assert os.listdir(out) == []


def test_a_video_gives_the_same_crops_as_its_frames(walk, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    frames = sorted((walk / "img1").iterdir())
    height, width = pixels(frames[0]).shape[:2]
    video = tmp_path / "walk.avi"
    # A codec without loss, so that pixels can be compared.
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"FFV1"), 25, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(pixels(frame)[:, :, ::-1]))
    writer.release()
    boxes = read_mot(walk / "boxes.txt")
    write_crops(boxes, video, tmp_path / "of video", every=2)
    write_crops(boxes, walk / "img1", tmp_path / "of frames", every=2)
    files = sorted((tmp_path / "of frames" / "c1").iterdir())
    assert len(files) == 6
    for file in files:
        other = pixels(tmp_path / "of video" / "c1" / file.name)
        assert np.abs(other.astype(int) - pixels(file)).max() <= 3  # through YUV
    with pytest.raises(DataError, match="ends before frame 5, at 4"):
        write_crops([Box(5, 1, 0, 0, 9, 9)], video, tmp_path / "beyond")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,1,0,0,9,9\n" + "9" * 200_000, "field larger than field limit .* after line 1"),
        ("1e300,1,0,0,9,9\n", "a line must be frame"),
        ("1,9007199254740992,0,0,9,9\n", "a line must be frame"),
    ],
)
def test_cells_and_numbers_have_limits(tmp_path, text, why):
    (tmp_path / "b.txt").write_text(text)
    with pytest.raises(DataError, match=why):
        read_mot(tmp_path / "b.txt")
