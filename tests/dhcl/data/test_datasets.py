import os
import shutil

import numpy as np
import pytest
from dhcl.data import DATASETS, DataError, ImageList, load_data
from PIL import Image


def jpeg(path, colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), colour).save(path)
    return path


def market(home, suffix=".jpg", cameras=(1, 2), *, folders=None):
    """Two identities to train on, two others to find, one distractor and one junk box."""
    train, query, gallery = folders or ("bounding_box_train", "query", "bounding_box_test")
    for camera in cameras:
        for one in ("0002", "0007"):
            jpeg(home / train / f"{one}_c{camera}s1_000451_03{suffix}")
        for one in ("0001", "0003"):
            jpeg(home / query / f"{one}_c{camera}s1_000001_00{suffix}")
            jpeg(home / gallery / f"{one}_c{camera}s1_000002_00{suffix}")
    jpeg(home / gallery / f"0000_c{cameras[0]}s1_000002_00{suffix}")
    jpeg(home / gallery / f"-1_c{cameras[0]}s1_000003_00{suffix}")
    (home / train / "Thumbs.db").write_bytes(b"\0")
    return home


def msmt(home, version=1):
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    lists = {"train": [], "val": [], "query": [], "gallery": []}
    for one in range(2):
        for camera in (1, 15):
            name = f"{one:04}/{one:04}_00{one}_{camera:02}_0303morning_0008_{camera}.jpg"
            jpeg(home / train / name)
            jpeg(home / test / name)
            lists["train" if camera == 1 else "val"].append((name, one))
            lists["query" if camera == 1 else "gallery"].append((name, one))
    for name, pairs in lists.items():
        (home / f"list_{name}.txt").write_text("".join(f"{p} {i}\n" for p, i in pairs))
    return home


def vehicleid(home, lines=("0000001 5", "0000002 5", "0000003 9", "0000004 5")):
    (home / "train_test_split").mkdir(parents=True, exist_ok=True)
    for line in lines:
        jpeg(home / "image" / f"{line.split()[0]}.jpg")
    for name in ("train_list", "test_list_800", "test_list_1600", "test_list_2400"):
        (home / "train_test_split" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return home


def names(images):
    return [path.name for path in images.paths]


# ---- Market-1501 and its kin ----


def test_market(tmp_path):
    data = load_data("market1501", market(tmp_path))
    assert (data.name, data.root) == ("market1501", tmp_path)
    assert names(data.train) == [
        "0002_c1s1_000451_03.jpg",
        "0002_c2s1_000451_03.jpg",
        "0007_c1s1_000451_03.jpg",
        "0007_c2s1_000451_03.jpg",
    ]
    assert data.train.ids.tolist() == [2, 2, 7, 7]
    assert data.train.cameras.tolist() == [0, 1, 0, 1]
    assert data.query.ids.tolist() == [1, 1, 3, 3]
    assert sorted(data.gallery.ids.tolist()) == [-1, 0, 1, 1, 3, 3]
    assert (data.train.num_ids, data.train.num_cameras, data.gallery.num_ids) == (2, 2, 3)
    assert data.has_identities
    assert data.can_evaluate
    assert data.train.ids.dtype == data.train.cameras.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("market1501", "Market-1501-v15.09.15"),
        ("market1501", "market1501/Market-1501-v15.09.15"),
        ("Market-1501", "market1501"),
        ("DukeMTMC", "dukemtmc-reid/DukeMTMC-reID"),
        ("personx", "PersonX"),
        ("CUHK03_NP", "cuhk03-np/detected"),
        ("cuhk03-np-labeled", "CUHK03-NP/labeled"),
        ("veri776", "VeRi"),
        ("msmt17", "MSMT17_V1"),
        ("msmt17_v2", "msmt17/MSMT17_V2"),
        ("vehicleid", "VehicleID_V1.0"),
    ],
)
def test_usual_folders_are_found(tmp_path, name, home):
    place = tmp_path / "données 数据" / home
    if "msmt" in name:
        msmt(place, 2 if "v2" in name else 1)
    elif name == "vehicleid":
        vehicleid(place)
    elif name == "veri776":
        market(place, folders=("image_train", "image_query", "image_test"))
    else:
        market(place, cameras=(3, 12) if name == "personx" else (1, 2))
    data = load_data(name, tmp_path / "données 数据")
    assert data.root == place
    assert len(data.train) == 4
    assert data.can_evaluate
    assert all(path.is_file() for path in data.train.paths + data.query.paths + data.gallery.paths)
    same = load_data(name, place)
    assert same.train.paths == data.train.paths


def test_relative_root(tmp_path, monkeypatch):
    market(tmp_path / "labeled")
    monkeypatch.chdir(tmp_path / "labeled")
    assert load_data("cuhk03-np", ".").name == "cuhk03-np-labeled"


def test_personx_cameras_are_renumbered(tmp_path):
    data = load_data("personx", market(tmp_path, cameras=(3, 4, 8, 10, 11, 12)))
    assert data.train.cameras.tolist() == [3, 4, 5, 0, 1, 2] * 2  # names sort as text
    assert data.train.num_cameras == 6
    market(tmp_path / "other", cameras=(1, 2))
    with pytest.raises(DataError, match=r"cameras one of \(3, 4, 8.*0002_c1s1"):
        load_data("personx", tmp_path / "other")


def test_cuhk03_kinds(tmp_path):
    market(tmp_path / "labeled", ".png")
    assert load_data("cuhk03-np", tmp_path).name == "cuhk03-np-labeled"
    with pytest.raises(DataError, match="missing"):
        load_data("cuhk03-np-detected", tmp_path)
    with pytest.raises(DataError, match="missing"):
        load_data("cuhk03-np-detected", tmp_path / "labeled")
    market(tmp_path / "detected", ".png")
    data = load_data("cuhk03-np", tmp_path)
    assert data.name == "cuhk03-np-detected"
    assert "labeled boxes are here too: cuhk03-np-labeled" in data.description
    assert load_data("cuhk03-np-labeled", tmp_path).root == tmp_path / "labeled"
    market(tmp_path / "mine")
    assert load_data("cuhk03-np-labeled", tmp_path / "mine").name == "cuhk03-np-labeled"


def test_veri_names_what_its_lists_leave_out(tmp_path):
    market(tmp_path, cameras=(1, 20), folders=("image_train", "image_query", "image_test"))
    (tmp_path / "name_train.txt").write_text("0002_c1s1_000451_03.jpg\n0002_c20s1_000451_03.jpg\n")
    data = load_data("veri776", tmp_path)
    assert len(data.train) == 4
    assert data.train.num_cameras == 20
    assert "2 images of image_train are not in name_train.txt" in data.description


def test_names_that_do_not_fit(tmp_path):
    market(tmp_path)
    jpeg(tmp_path / "query" / "wer weiß.jpg")
    with pytest.raises(DataError, match=r"got 1 that do not, the first .*wer weiß\.jpg"):
        load_data("market1501", tmp_path)


def test_hidden_files_and_leftovers_of_macos_are_skipped(tmp_path):
    market(tmp_path)
    jpeg(tmp_path / "query" / "._0001_c1s1_000001_00.jpg")
    jpeg(tmp_path / "query" / "__MACOSX" / "x.jpg")
    jpeg(tmp_path / "query" / ".cache" / "y.jpg")
    assert len(load_data("market1501", tmp_path).query) == 4


# ---- MSMT17 ----


@pytest.mark.parametrize("version", [1, 2])
def test_msmt17(tmp_path, version):
    data = load_data("msmt17", msmt(tmp_path, version))
    assert data.name == f"msmt17_v{version}"
    assert f"MSMT17 V{version}" in data.description
    assert "list_train.txt and list_val.txt" in data.description
    assert data.train.ids.tolist() == [0, 1, 0, 1]
    assert data.train.cameras.tolist() == [0, 0, 14, 14]
    assert data.query.cameras.tolist() == [0, 0]
    assert data.gallery.cameras.tolist() == [14, 14]
    folder = "train" if version == 1 else "mask_train_v2"
    assert data.train.paths[0].relative_to(tmp_path).parts[0] == folder
    assert load_data(f"msmt17_v{version}", tmp_path).name == data.name
    with pytest.raises(DataError, match=rf"must be MSMT17 V{3 - version} \(got MSMT17 V{version}"):
        load_data(f"msmt17_v{3 - version}", tmp_path)


def test_msmt17_in_both_versions_must_be_named(tmp_path):
    msmt(tmp_path / "MSMT17_V1", 1)
    msmt(tmp_path / "MSMT17_V2", 2)
    with pytest.raises(DataError, match="both versions are there; name msmt17_v1 or msmt17_v2"):
        load_data("msmt17", tmp_path)
    assert load_data("msmt17_v2", tmp_path).root == tmp_path / "MSMT17_V2"


def test_msmt17_folders_in_another_case(tmp_path):
    msmt(tmp_path, 2)
    (tmp_path / "mask_train_v2").rename(tmp_path / "mask_train_V2")
    data = load_data("msmt17", tmp_path)
    assert all(path.is_file() for path in data.train.paths)


def test_msmt17_repacked(tmp_path):
    market(tmp_path / "MSMT17_V1")
    data = load_data("msmt17", tmp_path)
    assert data.name == "msmt17_v1"
    assert "Repacked" in data.description
    with pytest.raises(DataError, match="must be MSMT17 V2"):
        load_data("msmt17_v2", tmp_path)


def test_msmt17_without_its_validation_list(tmp_path):
    msmt(tmp_path)
    (tmp_path / "list_val.txt").unlink()
    assert len(load_data("msmt17", tmp_path).train) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [("no number", "line 3 of .*list_train.txt"), ("0000/x.jpg 4", "names must be like")],
)
def test_msmt17_bad_lines(tmp_path, line, message):
    msmt(tmp_path)
    with open(tmp_path / "list_train.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_data("msmt17", tmp_path)


# ---- VehicleID ----


def test_vehicleid(tmp_path):
    data = load_data("vehicleid-2400", vehicleid(tmp_path))
    assert data.name == "vehicleid-2400"
    assert data.train.ids.tolist() == [5, 5, 9, 5]
    assert names(data.gallery) == ["0000001.jpg", "0000003.jpg"]
    assert names(data.query) == ["0000002.jpg", "0000004.jpg"]
    assert set(data.train.cameras.tolist()) == {-1}
    assert data.train.num_cameras == 0


# ---- what is printed, what is refused ----


def test_description_marks_what_differs(tmp_path):
    text = load_data("market1501", market(tmp_path)).description
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:5]}
    assert rows["train"] == ["train", "*", "4", "12,936", "2", "751", "2"]
    assert rows["gallery"] == ["gallery", "*", "5", "15,913", "3", "751", "2"]
    assert "* differs from the published count" in text
    assert "2 cameras where 6 are published" in text
    assert "1 junk images" in text


def test_description_says_when_counts_are_as_published(tmp_path):
    """VehicleID's lists can be forged at full size, since no image is opened."""
    vehicleid(tmp_path)
    train = [f"{i:07} {i % 13164}" for i in range(113346)]
    test = [f"{i:07} {i % 800}" for i in range(6493)]
    (tmp_path / "train_test_split" / "train_list.txt").write_text("\n".join(train))
    (tmp_path / "train_test_split" / "test_list_800.txt").write_text("\n".join(test))
    text = load_data("vehicleid", tmp_path).description
    assert "All counts are as published." in text
    assert "differs" not in text
    assert "113,346" in text


@pytest.mark.parametrize(
    ("name", "near"),
    [("market150", "market1501"), ("msmt", "msmt17"), ("duke", "dukemtmc"), ("floder", "folder")],
)
def test_unknown_names(tmp_path, name, near):
    with pytest.raises(DataError, match=f"did you mean '{near}'") as caught:
        load_data(name, tmp_path)
    assert all(each in str(caught.value) for each in DATASETS)


def test_a_name_like_no_other(tmp_path):
    with pytest.raises(DataError, match="no such name") as caught:
        load_data("zzz", tmp_path)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_missing_folders_print_the_tree(tmp_path, name):
    (tmp_path / "query").mkdir()
    with pytest.raises(DataError) as caught:
        load_data(name, tmp_path)
    text = str(caught.value)
    first = {
        "veri776": "image_train/",
        "msmt17_v2": "mask_train_v2/",
        "msmt17": "train/",
        "msmt17_v1": "train/",
    }.get(name, "image/" if "vehicleid" in name else "bounding_box_train/")
    assert f"\n    {first}" in text
    assert f"missing in {tmp_path}" in text
    assert " query/" not in text.splitlines()[0]


def test_missing_names_only_what_is_missing(tmp_path):
    shutil.rmtree(market(tmp_path / "market1501") / "query")
    with pytest.raises(DataError, match=r"market1501: query/ missing in .*market1501\n"):
        load_data("market1501", tmp_path)


def test_roots_that_are_no_folder(tmp_path):
    with pytest.raises(DataError, match="got nothing at"):
        load_data("market1501", tmp_path / "none")
    with pytest.raises(DataError, match="got a file at"):
        load_data("folder", jpeg(tmp_path / "a.jpg"))


def test_an_empty_training_folder(tmp_path):
    market(tmp_path)
    shutil.rmtree(tmp_path / "bounding_box_train")
    (tmp_path / "bounding_box_train").mkdir()
    with pytest.raises(DataError, match="no images to train on"):
        load_data("market1501", tmp_path)


# ---- folder ----

FOLDER = [
    "cam10/Ärger/b 1.JPG",
    "cam2/007/a.png",
    "cam2/7/x.webp",
    "cam2/12/c.jpeg",
    "cam2/-1/junk.bmp",
    "somewhere/张伟.tif",
]


def folder(root):
    for name in FOLDER:
        jpeg(root / name)
    jpeg(root / ".hidden" / "d.jpg")
    jpeg(root / "cam2" / ".e.jpg")
    (root / "notes.txt").write_text("not an image")
    return root


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


# ---- identities can't reach training ----


def as_tuple(images):
    return images.paths, images.ids.tolist(), images.cameras.tolist()


def test_shuffled_identities_change_nothing_for_training(tmp_path):
    home = msmt(tmp_path / "msmt17")
    before = as_tuple(load_data("msmt17", home).unlabeled)
    for name in ("train", "val"):
        lines = (home / f"list_{name}.txt").read_text().splitlines()
        mixed = [f"{line.split()[0]} {7 - int(line.split()[1])}" for line in lines]
        (home / f"list_{name}.txt").write_text("\n".join(mixed))
    data = load_data("msmt17", home)
    assert data.train.ids.tolist() == [7, 6, 7, 6]
    assert as_tuple(data.unlabeled) == before
    assert set(before[1]) == {-1}


def test_patterns_with_and_without_identity_train_on_the_same(tmp_path):
    folder(tmp_path)
    camera = r"(?P<camera>cam\d+)"
    patterns = [camera, camera + r"/(?P<id>[^/]+)", camera + r"/.*(?P<id>.)\."]
    seen = [load_data("folder", tmp_path, pattern=p) for p in patterns]
    assert seen[1].train.ids.tolist() != seen[2].train.ids.tolist()
    assert as_tuple(seen[0].unlabeled) == as_tuple(seen[1].unlabeled) == as_tuple(seen[2].unlabeled)


def test_unlabeled_shares_no_memory_with_identities(tmp_path):
    data = load_data("market1501", market(tmp_path))
    data.unlabeled.ids[:] = 5
    assert data.train.ids.tolist() == [2, 2, 7, 7]


# ---- ImageList ----


def test_select(tmp_path):
    images = load_data("market1501", market(tmp_path)).train
    for chosen in ([3, 0], np.array([3, 0])):
        assert as_tuple(images.select(chosen)) == (
            (images.paths[3], images.paths[0]),
            [7, 2],
            [1, 0],
        )
    assert as_tuple(images.select(images.ids == 7))[1] == [7, 7]
    assert len(images.select([])) == 0
    assert images.select([]).num_cameras == 0
    with pytest.raises(IndexError):
        images.select([4])


@pytest.mark.parametrize("ids", [np.zeros(1, np.int64), np.zeros(2), np.zeros((2, 1), np.int64)])
def test_image_list_refuses_what_does_not_fit(tmp_path, ids):
    with pytest.raises(ValueError, match="ids must be 2 integers"):
        ImageList((tmp_path / "a", tmp_path / "b"), ids, np.zeros(2, np.int64))
