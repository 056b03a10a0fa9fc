import numpy as np
import pytest
from dhcl.data import DataError, load_data

from tests.dhcl.data.layouts import jpeg, market, msmt, names, vehicleid

# ---- Market-1501 and its kin ---------------------------------------------------------------------


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


# ---- MSMT17 --------------------------------------------------------------------------------------


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


# ---- VehicleID -----------------------------------------------------------------------------------


def test_vehicleid(tmp_path):
    data = load_data("vehicleid-2400", vehicleid(tmp_path))
    assert data.name == "vehicleid-2400"
    assert data.train.ids.tolist() == [5, 5, 9, 5]
    assert names(data.gallery) == ["0000001.jpg", "0000003.jpg"]
    assert names(data.query) == ["0000002.jpg", "0000004.jpg"]
    assert set(data.train.cameras.tolist()) == {-1}
    assert data.train.num_cameras == 0
