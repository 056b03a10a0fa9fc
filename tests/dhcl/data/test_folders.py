import os
import shutil

import pytest
from dhcl.data import DataError, image_files, load_data

from tests.dhcl.data.layouts import FOLDER, folder, jpeg, market, names


def test_folder(tmp_path):
    data = load_data("folder", folder(tmp_path))
    assert [p.relative_to(tmp_path).as_posix() for p in data.train.paths] == sorted(FOLDER)
    assert set(data.train.ids.tolist()) == set(data.train.cameras.tolist()) == {-1}
    assert (len(data.query), len(data.gallery)) == (0, 0)
    assert not data.has_identities
    assert not data.can_evaluate
    assert "No identities are known" in data.description
    assert "No cameras are known" in data.description


def test_folder_with_a_pattern(tmp_path):
    data = load_data("folder", folder(tmp_path), pattern=r"(?P<camera>cam\d+)/(?P<id>[^/]+)/")
    known = {
        p.relative_to(tmp_path).as_posix(): (int(i), int(c))
        for p, i, c in zip(data.train.paths, data.train.ids, data.train.cameras, strict=True)
    }
    assert known == {
        "cam10/Ärger/b 1.JPG": (13, 0),  # a text is numbered after the numbers
        "cam2/007/a.png": (7, 1),
        "cam2/7/x.webp": (7, 1),
        "cam2/12/c.jpeg": (12, 1),
        "cam2/-1/junk.bmp": (-1, 1),
        "somewhere/张伟.tif": (-1, -1),
    }
    assert "1 images do not match the pattern, the first 'somewhere/张伟.tif'" in data.description


def test_numeric_cameras_are_sorted_as_numbers(tmp_path):
    for camera in ("10", "9", "101"):
        jpeg(tmp_path / camera / "a.jpg")
    data = load_data("folder", tmp_path, pattern=r"^(?P<camera>\d+)/")
    by_folder = {
        p.parent.name: int(c) for p, c in zip(data.train.paths, data.train.cameras, strict=True)
    }
    assert by_folder == {"9": 0, "10": 1, "101": 2}


def test_optional_groups_and_huge_numbers(tmp_path):
    for name in ("1_a.jpg", "99999999999999999999_b.jpg", "x.jpg"):
        jpeg(tmp_path / name)
    data = load_data("folder", tmp_path, pattern=r"^(?:(?P<id>\d+)_)?")
    assert dict(zip(names(data.train), data.train.ids.tolist(), strict=True)) == {
        "1_a.jpg": 1,
        "99999999999999999999_b.jpg": 2,
        "x.jpg": -1,
    }


def test_folder_splits(tmp_path):
    pattern = r"(?P<id>-?\d+)_c(?P<camera>\d+)"
    data = load_data("folder", market(tmp_path), pattern=pattern)
    named = load_data("market1501", tmp_path)
    for split in ("train", "query", "gallery"):
        ours, theirs = getattr(data, split), getattr(named, split)
        assert ours.paths == theirs.paths
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.cameras.tolist() == theirs.cameras.tolist()
    assert data.can_evaluate
    shutil.rmtree(tmp_path / "bounding_box_train")
    without = load_data("folder", tmp_path, pattern=pattern)
    assert len(without.train) == 0
    assert without.can_evaluate


def test_a_single_split_folder_is_just_a_folder(tmp_path):
    jpeg(tmp_path / "train" / "a.jpg")
    jpeg(tmp_path / "b.jpg")
    assert len(load_data("folder", tmp_path).train) == 2


SPLITS = [
    ("train", "query", "gallery"),
    ("train", "query", "test"),
    ("train", "probe", "gallery"),
    ("train", "probe", "test"),
    ("train_all", "query", "gallery"),
    ("Train", "Query", "Gallery"),
    ("image_train", "image_query", "image_test"),
    ("train", "test/query", "test/gallery"),
]
PATTERN = r"(?P<id>-?\d+)_c(?P<camera>\d+)"


@pytest.mark.parametrize("above", ["", "pytorch", "données 数据"])
@pytest.mark.parametrize("folders", SPLITS, ids=" ".join)
def test_splits_by_the_names_that_others_use(tmp_path, folders, above):
    """Also where the root is one level too high."""
    home = market(tmp_path / "root" / above, folders=folders)
    data = load_data("folder", tmp_path / "root", pattern=PATTERN)
    expected = load_data("market1501", market(tmp_path / "market"))
    for split, place in zip(("train", "query", "gallery"), folders, strict=True):
        ours, theirs = getattr(data, split), getattr(expected, split)
        assert names(ours) == names(theirs)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.cameras.tolist() == theirs.cameras.tolist()
        assert {path.parent for path in ours.paths} == {home / place}
    assert data.can_evaluate
    assert ("The splits are" in data.description) == bool(above)
    assert " image in " not in data.description


def test_train_and_test_without_queries(tmp_path):
    market(tmp_path, folders=("train", "query", "test"))
    shutil.rmtree(tmp_path / "query")
    data = load_data("folder", tmp_path, pattern=PATTERN)
    assert (len(data.train), len(data.query), len(data.gallery)) == (4, 0, 6)


def test_images_outside_of_the_splits_are_counted(tmp_path):
    """As layumi's prepared Market-1501, which holds the training images twice."""
    home = market(tmp_path / "pytorch", folders=("train_all", "query", "gallery"))
    shutil.copytree(home / "train_all", home / "train")
    jpeg(home / "val" / "0002" / "a.jpg")
    jpeg(tmp_path / "gt_bbox" / "b.jpg")
    jpeg(tmp_path / "c.jpg")
    data = load_data("folder", tmp_path, pattern=PATTERN)
    assert len(data.train) == 4
    assert (
        "The splits are pytorch/train_all/, pytorch/query/, pytorch/gallery/." in data.description
    )
    assert (
        "Left out: 1 image in the root itself, 1 image in gt_bbox/, 4 images in pytorch/train/, "
        "1 image in pytorch/val/." in data.description
    )
    same = load_data("folder", home, pattern=PATTERN)
    assert names(same.train) == names(data.train)
    assert "Left out: 4 images in train/, 1 image in val/." in same.description


def test_several_data_sets_in_a_root_are_named(tmp_path):
    for name in ("one", "two"):
        market(tmp_path / name, folders=("train", "query", "test"))
    data = load_data("folder", tmp_path)
    assert len(data.train) == 28
    assert "one/ and two/ have splits each" in data.description


def test_files_of_other_kinds_are_counted(tmp_path):
    for name in ("a.jpg", "b/c.png"):
        jpeg(tmp_path / name)
    for name in ("a.gif", "b.GIF", "b/c.avif", "d.ppm", "e.jfif", "f.jp2", "g.heic", "plain"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".hidden.gif").write_bytes(b"x")
    text = load_data("folder", tmp_path).description
    kinds = ".avif 1, .gif 2, .heic 1, .jfif 1, .jp2 1, .ppm 1, without suffix 1"
    assert f"Left out: 8 files of other kinds ({kinds})." in text
    jpeg(tmp_path / "query" / "a.jpg")
    jpeg(tmp_path / "train" / "a.jpg")
    (tmp_path / "query" / "b.avif").write_bytes(b"x")
    text = load_data("folder", tmp_path).description
    assert "Left out: 1 file of other kinds (.avif 1)." in text
    for name in ("a.jpg", "b/c.png", "query/a.jpg", "train/a.jpg"):
        (tmp_path / name).unlink()
    for look in (lambda root: load_data("folder", root), image_files):
        with pytest.raises(DataError, match=r"none|no images") as caught:
            look(tmp_path)
        assert ".gif 2" in str(caught.value) or ".avif 1" in str(caught.value)


def test_published_data_sets_count_other_kinds_too(tmp_path):
    (market(tmp_path) / "query" / "a.avif").write_bytes(b"x")
    text = load_data("market1501", tmp_path).description
    assert "Left out: 2 files of other kinds (.avif 1, .db 1)." in text


def test_folder_follows_links_once(tmp_path):
    folder(tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "link")
    os.symlink(tmp_path, tmp_path / "real" / "loop")
    assert len(load_data("folder", tmp_path / "link").train) == len(FOLDER)


def test_names_that_are_not_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    shutil.copy(jpeg(tmp_path / "a.jpg"), path)
    data = load_data("folder", tmp_path, pattern="(?P<id>a)")
    assert len(data.train) == 2
    data.description.encode()
    os.rename(path, os.fsencode(market(tmp_path / "named")) + b"/query/\xff.jpg")
    with pytest.raises(DataError, match="must begin like") as caught:
        load_data("market1501", tmp_path / "named")
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "must be a regular expression"),
        (r"(\d+)_c(\d+)", "must have a group"),
        (r"(?P<id>nobody)", "must match some path"),
        (r"(?P<id>-\d+)|x", "must be at least -1"),
    ],
)
def test_bad_patterns(tmp_path, pattern, message):
    jpeg(tmp_path / "-7" / "x.jpg")
    with pytest.raises(DataError, match=message):
        load_data("folder", tmp_path, pattern=pattern)


def test_a_pattern_is_for_folders(tmp_path):
    with pytest.raises(DataError, match="a pattern is for 'folder' only"):
        load_data("market1501", market(tmp_path), pattern="(?P<id>a)")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no images in"):
        load_data("folder", tmp_path)
