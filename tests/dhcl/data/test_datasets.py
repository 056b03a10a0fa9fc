import shutil

import pytest
from dhcl.data import DATASETS, DataError, load_data

from tests.dhcl.data.layouts import as_tuple, folder, jpeg, market, msmt, vehicleid

# ---- what is printed, what is refused ------------------------------------------------------------


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


def test_a_root_one_level_too_high_is_entered(tmp_path):
    home = market(tmp_path / "market copy")
    assert load_data("market1501", tmp_path).root == home
    # Data of another name in the same layout is another data set.
    market(tmp_path / "dukemtmc")
    assert load_data("market1501", tmp_path).root == home
    market(tmp_path / "second copy")
    with pytest.raises(DataError, match=r"one data set \(got market copy and second copy in"):
        load_data("market1501", tmp_path)


def test_boxes_that_nothing_tells_apart_are_to_be_named(tmp_path):
    home = market(tmp_path / "boxes")
    with pytest.raises(DataError, match="name cuhk03-np-detected or cuhk03-np-labeled"):
        load_data("cuhk03-np", home)
    assert len(load_data("cuhk03-np-labeled", home).train) == 4


def test_missing_folders_name_what_is_there(tmp_path):
    market(tmp_path, folders=("train_all", "query", "gallery"))
    with pytest.raises(DataError) as caught:
        load_data("market1501", tmp_path)
    assert "There are gallery/, query/, train_all/; --data folder reads" in str(caught.value)


def only_to_evaluate(name, home):
    if "msmt17" in name:
        msmt(home, 2 if "v2" in name else 1)
        for place in (*home.glob("list_train.txt"), *home.glob("list_val.txt")):
            place.unlink()
        shutil.rmtree(home / ("mask_train_v2" if "v2" in name else "train"))
    elif "vehicleid" in name:
        vehicleid(home)
        (home / "train_test_split" / "train_list.txt").unlink()
    else:
        veri = ("image_train", "image_query", "image_test")
        cameras = (3, 12) if name == "personx" else (1, 2)
        market(home, cameras=cameras, folders=veri if name == "veri776" else None)
        shutil.rmtree(home / ("image_train" if name == "veri776" else "bounding_box_train"))


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_nothing_to_train_on_is_needed_to_evaluate(tmp_path, name):
    home = tmp_path / ("labeled" if "labeled" in name else "detected" if "cuhk" in name else name)
    only_to_evaluate(name, home)
    with pytest.raises(DataError, match="missing in"):
        load_data(name, home)
    data = load_data(name, home, training=False)
    assert data.can_evaluate
    assert len(data.train) == 0
    assert all(path.is_file() for path in data.query.paths + data.gallery.paths)


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


# ---- identities can't reach training -------------------------------------------------------------


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
