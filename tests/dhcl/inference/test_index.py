import fcntl
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from dhcl import ReID
from dhcl.cli import main
from dhcl.config import ConfigError
from dhcl.data import DataError, image_files
from dhcl.inference.gallery.schema import arrow_batch
from dhcl.inference.index import Index
from dhcl.inference.search import search
from dhcl.inference.update import add_images, create_index, remove_images
from PIL import Image

from tests.dhcl.toy import make_run

PATTERN = r"(?P<id>-?\d+)_c(?P<camera>\d+)"


@pytest.fixture(scope="module")
def other_run(pictures, tmp_path_factory):
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "other", seed=1)


@pytest.fixture
def gallery(pictures, tmp_path):
    """16 images, some of them in a folder with another kind of name."""
    folder = tmp_path / "gallery ä 人"
    shutil.copytree(pictures / "bounding_box_test", folder)
    (folder / "more images").mkdir()
    for file in image_files(folder)[:4]:
        file.rename(folder / "more images" / file.name)
    return folder


@pytest.fixture
def index(gallery, model, tmp_path):
    """The folder of an index of the gallery, and how many images the model saw since."""
    create_index(tmp_path / "index", [gallery], model, pattern=PATTERN)
    return tmp_path / "index"


@pytest.fixture
def seen(model, monkeypatch):
    """Names of the files whose features are extracted."""
    names = []
    real = model.batches

    def batches(images, *args, **options):
        names.extend(os.path.basename(path) for path in images)
        return real(images, *args, **options)

    monkeypatch.setattr(model, "batches", batches)
    return names


def paths(folder):
    index = Index.open(folder)
    return [index.path(row) for row in range(len(index))]


def same_features(folder):
    """Give all images of an index the features of the first one."""
    old = Index.open(folder)
    rows = np.arange(len(old))
    same = np.repeat(old.features[:1], len(old), axis=0)
    records, model = list(old.records), old.model
    with old.store.writing() as writer:
        start = writer.now.next_row
        writer.insert(iter([arrow_batch(start + rows, same, records, model)]))
        writer.delete(rows)


def check(folder, model):
    """Every row holds the features of its file, and the folder nothing that is not the index's."""
    index = Index.open(folder)
    files = [index.path(row) for row in range(len(index))]
    assert len(set(files)) == len(files)
    assert torch.allclose(torch.tensor(index.features), model.features(files), atol=1e-6)
    assert {file.name for file in folder.iterdir()} == {"index.json", ".lock", "rows.lance"}
    return index


def content(folder):
    """All that an index says."""
    index = Index.open(folder)
    return list(index.images()), index.features.tolist(), index.roots, index.generation


def test_an_index_holds_paths_features_and_what_the_pattern_knows(index, gallery, model):
    opened = check(index, model)
    assert sorted(paths(index)) == image_files(gallery)
    assert opened.model == model.id
    assert opened.roots == (str(gallery),)
    assert opened.records[0].path.startswith("0")
    for record in opened.records:
        identity, camera = os.path.basename(record.path).split("_")[:2]
        assert (record.id, record.camera) == (int(identity), int(camera[1]))


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("block", [3, 1000])
def test_search_is_exact_in_blocks_with_either_backend(
    backend, block, index, model, pictures, monkeypatch
):
    if backend == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr("dhcl.inference.search._BLOCK", block)
    opened = Index.open(index)
    query = model.features(pictures / "query")
    expected = search(query, torch.tensor(opened.features), 7)
    for row, found in enumerate(opened.search(query, 7, backend=backend)):
        assert torch.equal(found.indices, expected.indices[row])
        assert torch.allclose(found.similarities, expected.similarities[row], atol=1e-6)
    assert len(opened.search(query, 99, backend=backend)[0].indices) == 16


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equal_images_come_in_the_order_of_the_index(
    backend, pictures, model, tmp_path, monkeypatch
):
    if backend == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr("dhcl.inference.search._BLOCK", 3)
    folder = tmp_path / "same"
    folder.mkdir()
    source = image_files(pictures / "query")[0]
    for number in range(8):
        shutil.copy(source, folder / f"{number}.png")
    create_index(tmp_path / "index", [folder], model)
    # Where an image stands in its batch may show in the last bits of its features.
    same_features(tmp_path / "index")
    [found] = Index.open(tmp_path / "index").search(model.features([source]), 5, backend=backend)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]


def test_cameras_are_chosen_and_left_out(index, model, pictures):
    opened = Index.open(index)
    query = model.features(pictures / "query")
    cameras = np.array([record.camera for record in opened.records])
    features = torch.tensor(opened.features)
    only = np.flatnonzero(cameras == 2)
    expected = torch.from_numpy(only)[search(query, features[only], 5).indices]
    for row, found in enumerate(opened.search(query, 5, cameras=[2])):
        assert torch.equal(found.indices, expected[row])
    own = [1, 2] * 7 + [1, -1]
    for camera, found in zip(own, opened.search(query, 16, leave_out=own), strict=True):
        assert len(found.indices) == (16 if camera == -1 else 8)
        assert camera not in cameras[found.indices]
    assert len(opened.search(query[:1], 5, cameras=[2], leave_out=[2])[0].indices) == 0
    with pytest.raises(ConfigError, match=r"no 9 in .*, known are 1, 2"):
        opened.search(query, 5, cameras=[9])
    for written in ("2", "02", np.int64(2)):
        assert torch.equal(opened.search(query, 5, cameras=[written])[0].indices, expected[0])
        [left] = opened.search(query[:1], 16, leave_out=[written])
        assert 2 not in cameras[left.indices]


def test_reranked_search(index, model, pictures):
    opened = Index.open(index)
    query = model.features(pictures / "query")
    expected = search(query, torch.tensor(opened.features), 5, True)
    for row, found in enumerate(opened.search(query, 5, rerank=True)):
        assert torch.equal(found.indices, expected.indices[row])
        assert torch.equal(found.distances, expected.distances[row])


def test_queries_of_another_width_are_refused(index):
    with pytest.raises(
        ConfigError, match=r"must be \(Q, 512\), as the index has them \(got \(1, 3"
    ):
        Index.open(index).search(torch.ones(1, 3))


def test_added_and_changed_images_alone_are_extracted(index, gallery, model, pictures, seen):
    assert add_images(index, [gallery], model).unchanged == 16
    assert Index.open(index).generation == 1
    new = image_files(pictures / "query")[:2]
    for file in new:
        shutil.copy(file, gallery / f"new {file.name}")
    changed = image_files(gallery / "more images")[0]
    Image.open(changed).rotate(180).save(changed)
    update = add_images(index, [gallery], model)
    assert (update.added, update.changed, update.unchanged, update.total) == (2, 1, 15, 18)
    assert sorted(seen) == sorted([changed.name, *(f"new {file.name}" for file in new)])
    check(index, model)


def test_another_folder_can_be_added_and_removed(index, gallery, model, pictures, seen):
    update = add_images(index, [pictures / "query"], model)
    assert (update.added, update.total) == (16, 32)
    opened = check(index, model)
    assert opened.roots == (str(gallery), str(pictures / "query"))
    seen.clear()
    gone = image_files(gallery)[:3]
    assert remove_images(index, [pictures / "query", *gone]).removed == 19
    assert not seen
    check(index, model)
    assert set(paths(index)) == set(image_files(gallery)) - set(gone)
    with pytest.raises(ConfigError, match="has no image"):
        remove_images(index, [gone[0]])
    with pytest.raises(ConfigError, match="would be empty"):
        remove_images(index, [gallery])
    check(index, model)


def test_sync_removes_what_is_gone_below_the_folders_given(index, gallery, model, pictures):
    add_images(index, [pictures / "query"], model)
    image_files(gallery / "more images")[0].unlink()
    update = add_images(index, [gallery], model)
    assert (update.removed, update.total) == (0, 32)
    update = add_images(index, [gallery], model, sync=True)
    assert (update.removed, update.added, update.total) == (1, 0, 31)
    check(index, model)


def test_another_model_is_refused(index, gallery, other_run):
    other = ReID.load(other_run, device="cpu")
    with pytest.raises(ConfigError, match=r"was made by model .* features of two models"):
        add_images(index, [gallery], other)
    with pytest.raises(ConfigError, match="was made by model"):
        Index.open(index).load_model(other_run)
    assert Index.open(index).load_model().id != other.id


def test_statistics_per_camera_where_the_cameras_are_those_of_the_training(
    gallery, model, tmp_path
):
    options = {"pattern": PATTERN, "trained_cameras": True}
    create_index(tmp_path / "index", [gallery], model, **options)
    opened = Index.open(tmp_path / "index")
    cameras = [record.camera - 1 for record in opened.records]
    files = paths(tmp_path / "index")
    expected = model.features(files, cameras)
    assert torch.allclose(torch.tensor(opened.features), expected, atol=1e-6)
    assert not torch.allclose(model.features(files), expected, atol=1e-3)


def test_a_failure_leaves_the_index_as_it_was(index, gallery, model, monkeypatch):
    before = content(index)
    (gallery / "cut.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cut\.png"):
        add_images(index, [gallery], model)
    assert content(index) == before
    check(index, model)

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dhcl.inference.gallery.head.write_atomic", full)
        shutil.copy(image_files(gallery)[0], gallery / "good too.png")
        with pytest.raises(OSError, match="No space"):
            add_images(index, [gallery], model, on_bad="skip", batch_size=2)
    assert content(index) == before
    (gallery / "good too.png").unlink()
    check(index, model)
    shutil.copy(image_files(gallery)[0], gallery / "good.png")
    update = add_images(index, [gallery], model, on_bad="skip")
    assert (update.added, update.total) == (1, 17)
    assert "cut.png" in update.bad[0]
    check(index, model)


def test_a_changed_image_that_is_damaged_now_leaves_the_index(index, gallery, model):
    image_files(gallery)[0].write_bytes(b"damaged")
    update = add_images(index, [gallery], model, on_bad="skip")
    assert (update.added, update.changed, update.total, len(update.bad)) == (0, 0, 15, 1)
    check(index, model)


def test_an_index_that_fails_at_first_leaves_no_folder(gallery, model, tmp_path):
    (gallery / "cut.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        create_index(tmp_path / "new", [gallery], model)
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_place_for_an_index(index, gallery, model, tmp_path):
    with pytest.raises(ConfigError, match="is an index already"):
        create_index(index, [gallery], model)
    with pytest.raises(ConfigError, match="new or empty folder"):
        create_index(gallery, [gallery], model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="images: none in"):
        create_index(tmp_path / "new", [tmp_path / "empty"], model)
    with pytest.raises(DataError, match="regular expression"):
        create_index(tmp_path / "new", [gallery], model, pattern="(")
    assert not (tmp_path / "new").exists()


def test_two_writers_do_not_meet(index, gallery, model, pictures):
    with (index / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            add_images(index, [pictures / "query"], model)
    assert add_images(index, [pictures / "query"], model).added == 16


def test_what_an_interrupted_change_left_is_cleared(index, gallery, model, pictures):
    rows = index / "rows.lance"
    (rows / "data" / "0101.lance").write_bytes(b"half")
    shutil.copy(next((rows / "data").iterdir()), rows / "data" / "0110.lance")
    assert len(Index.open(index)) == 16
    add_images(index, [pictures / "query"], model)
    assert not {"0101.lance", "0110.lance"} & {file.name for file in rows.rglob("*.lance")}
    check(index, model)


def test_links_that_lead_nowhere_are_bad_images(index, gallery, model, tmp_path):
    (gallery / "9_c1_link.png").symlink_to("nowhere")
    (gallery / "9_c1_loop.png").symlink_to("9_c1_loop.png")
    with pytest.raises(DataError, match=r"2 can't be read\n(.*\n)*.*9_c1_link.png"):
        add_images(index, [gallery], model)
    done = add_images(index, [gallery], model, on_bad="skip")
    assert (done.unchanged, done.added, len(done.bad)) == (16, 0, 2)
    assert len(check(index, model)) == 16
    made = create_index(tmp_path / "new", [gallery], model, pattern=PATTERN, on_bad="skip")
    assert (made.added, made.total, len(made.bad)) == (16, 16, 2)
    known = image_files(gallery / "more images")[0]
    known.unlink()
    known.symlink_to("nowhere")
    assert len(add_images(index, [gallery], model, on_bad="skip").bad) == 3
    assert len(check(index, model)) == 15


def test_damaged_indexes_say_so(index, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Index.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no index\.json"):
        Index.open(tmp_path)
    [file] = (index / "rows.lance" / "data").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"damaged .*its checksum is another"):
        Index.open(index)
    file.unlink()
    with pytest.raises(DataError, match=r"damaged .*there is no"):
        Index.open(index)
    about = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(DataError, match=r"format 2 \(got 9\)"):
        Index.open(index)
    (index / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Index.open(index)


# ---- the commands -------------------------------------------------------------------------------


@pytest.fixture
def by_command(run, gallery, tmp_path):
    out = str(tmp_path / "index")
    made = ["index", str(gallery), "--run", str(run), "--out", out, "--pattern", PATTERN]
    assert main([*made, "--workers", "0"]) == 0
    return out


def test_search_prints_a_table_or_json(by_command, pictures, model, capsys):
    queries = image_files(pictures / "query")[:2]
    capsys.readouterr()
    given = ["search", by_command, *map(str, queries), "--topk", "3"]
    assert main(given) == 0
    table = capsys.readouterr().out
    assert f"{queries[0]}  (id 9, camera 1)" in table
    opened = Index.open(by_command)
    # The pattern is searched in the path as it is given: nothing else in it must match.
    found = opened.search(model.features(queries), 3)
    for one in found:
        for row in one.indices.tolist():
            assert str(opened.path(row)) in table
    assert main([*given, "--json", "--rerank"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == model.id
    assert [query["path"] for query in answer["queries"]] == [str(query) for query in queries]
    for query in answer["queries"]:
        assert [each["rank"] for each in query["results"]] == [1, 2, 3]
        for each in query["results"]:
            assert each["right"] == (each["id"] == query["id"])
            assert each["distance"] >= 0
    assert main([*given, "--json", "--other-cameras", "--backend", "torch"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {each["camera"] for each in answer["queries"][0]["results"]} == {2}
    assert main([*given, "--json", "--camera", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {each["camera"] for each in answer["queries"][1]["results"]} == {1}


def test_search_draws_pictures(by_command, gallery, pictures, tmp_path, capsys):
    gone = image_files(gallery)[0]
    gone.unlink()
    page, sheet = tmp_path / "new" / "ranked.html", tmp_path / "ranked.png"
    given = ["search", by_command, str(pictures / "query"), "--topk", "16"]
    assert main([*given, "--html", str(page), "--png", str(sheet)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 16
    assert text.count("data:image/jpeg;base64,") == 16 + 16 * 15  # one image is gone
    assert text.count("not there") == 16
    assert text.count('class="right"') == 16 * 2
    assert "http" not in text.replace("http-equiv", "")
    with Image.open(sheet) as picture:
        assert picture.width > 17 * 100
        colors = {color for _, color in picture.getcolors(1 << 24)}
    assert {(0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)} <= colors


def test_names_are_escaped_in_pages(model, run, pictures, tmp_path):
    folder = tmp_path / "gallery"
    folder.mkdir()
    shutil.copy(image_files(pictures / "query")[0], folder / "<b>&'\".png")
    create_index(tmp_path / "index", [folder], model)
    page = tmp_path / "ranked.html"
    assert main(["search", str(tmp_path / "index"), str(folder), "--html", str(page)]) == 0
    assert "<b>&" not in page.read_text()
    assert "&lt;b&gt;&amp;&#39;&#34;.png" in page.read_text()


def test_names_of_any_bytes(model, pictures, tmp_path, capsys):
    folder = tmp_path / "gallery"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9 1.png")
    try:
        shutil.copy(image_files(pictures / "query")[0], folder / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    create_index(tmp_path / "index", [folder], model)
    assert main(["search", str(tmp_path / "index"), str(folder)]) == 0
    assert r"caf\udce9 1.png" in capsys.readouterr().out
    assert main(["search", str(tmp_path / "index"), str(folder), "--json"]) == 0
    page = tmp_path / "ranked.html"
    assert main(["search", str(tmp_path / "index"), str(folder), "--html", str(page)]) == 0
    assert r"caf\udce9 1.png" in page.read_text()


def test_the_index_command_adds_and_removes(by_command, gallery, pictures, capsys):
    query = str(pictures / "query")
    assert main(["index", query, "--out", by_command, "--add", "--workers", "0"]) == 0
    assert "16 added, 16 unchanged; 32 images" in capsys.readouterr().out
    assert main(["index", query, "--out", by_command, "--remove"]) == 0
    assert "16 removed; 16 images" in capsys.readouterr().out
    assert main(["index", str(gallery), "--out", by_command, "--sync", "--workers", "0"]) == 0
    assert "16 unchanged; 16 images" in capsys.readouterr().out


MISTAKES = {
    "no run": (["index", "GALLERY", "--out", "NEW"], "run: the folder of a run"),
    "two ways": (["index", "GALLERY", "--out", "INDEX", "--add", "--remove"], "choose one"),
    "other pattern": (
        ["index", "GALLERY", "--out", "INDEX", "--add", "--pattern", "(?P<id>x)"],
        "x",
    ),
    "already there": (["index", "GALLERY", "--out", "INDEX", "--run", "RUN"], "--add"),
    "another model": (
        ["index", "GALLERY", "--out", "INDEX", "--run", "OTHER", "--add"],
        "two models",
    ),
    "nothing to add to": (["index", "GALLERY", "--out", "NEW", "--add"], "not an index"),
    "no pattern": (
        ["index", "GALLERY", "--out", "NEW", "--run", "RUN", "--trained-cameras"],
        "--pattern",
    ),
    "no index": (["search", "NEW", "QUERY"], "not an index"),
    "no query": (["search", "INDEX", "NEW.jpg"], "NEW.jpg: no such file"),
    "no such camera": (["search", "INDEX", "QUERY", "--camera", "7"], "known are 1, 2"),
    "topk": (["search", "INDEX", "QUERY", "--topk", "0"], "topk: must be at least 1"),
    "search by another": (["search", "INDEX", "QUERY", "--run", "OTHER"], "two models"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message_and_status_2(
    mistake, by_command, run, other_run, gallery, pictures, tmp_path, capsys
):
    arguments, message = MISTAKES[mistake]
    places = {"INDEX": by_command, "RUN": run, "OTHER": other_run, "GALLERY": gallery}
    places |= {
        "QUERY": pictures / "query",
        "NEW": tmp_path / "NEW",
        "NEW.jpg": tmp_path / "NEW.jpg",
    }
    assert main([str(places.get(each, each)) for each in arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "NEW").exists()
    assert len(Index.open(by_command)) == 16


def test_without_faiss_torch_is_taken(index, model, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    opened = Index.open(index)
    query = model.features(pictures / "query")
    assert len(opened.search(query, 3)) == 16
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        opened.search(query, 3, backend="faiss")


@pytest.mark.parametrize("pattern", [r"(?P<camera>cam\d)", r"(?P<id>nobody)|x(?P<camera>y)"])
def test_a_pattern_that_matches_nothing_is_refused(run, pictures, tmp_path, capsys, pattern):
    """By every command that reads paths."""
    gallery = str(pictures / "bounding_box_test")
    commands = [
        ["index", gallery, "--run", str(run), "--out", str(tmp_path / "index")],
        ["export", str(run), "--features", gallery, "--out", str(tmp_path / "f.npz")],
        ["cluster", gallery, "--run", str(run), "--out", str(tmp_path / "labels.csv")],
    ]
    for given in commands:
        assert main([*given, "--pattern", pattern, "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert f"pattern: must match some path below the folder (got {pattern!r}" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\rb\x0bc", "a\x1b[31mb", "a\u2028b", "a\x85b"])
def test_a_name_that_ends_a_line_does_not_end_a_search(index, pictures, tmp_path, capsys, name):
    crops = tmp_path / "crops"
    crops.mkdir()
    [first, *_] = sorted((pictures / "query").iterdir())
    shutil.copy(first, crops / f"{name}.png")
    given = ["search", str(index), str(crops), "--workers", "0"]
    assert main([*given, "--png", str(tmp_path / "f.png"), "--html", str(tmp_path / "f.html")]) == 0
    assert Image.open(tmp_path / "f.png").size[0] > 0
    capsys.readouterr()
    assert main(given) == 0
    said = capsys.readouterr().out
    assert name not in said
    assert len(said.splitlines()) == 1 + 16
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["path"] == str(crops / f"{name}.png")


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_features_are_written_to_a_file_and_indexed_again(
    by_command, run, other_run, gallery, tmp_path, kind, capsys
):
    file, again = tmp_path / f"features.{kind}", str(tmp_path / "again")
    assert main(["index", "--export", str(file), "--out", by_command]) == 0
    assert f"16 images written to {file}" in capsys.readouterr().out
    made = ["index", "--features", str(file), "--out", again]
    assert main([*made, "--run", str(other_run)]) == 2
    assert "features of two models can't be compared" in capsys.readouterr().err
    assert main([*made, "--run", str(run), "--pattern", PATTERN]) == 0
    old, new = Index.open(by_command), Index.open(again)
    assert np.array_equal(new.features, old.features)
    assert paths(again) == paths(by_command)
    assert [(r.id, r.camera) for r in new.records] == [(r.id, r.camera) for r in old.records]
    assert (new.model, new.pattern) == (old.model, old.pattern)
    assert main(["index", str(gallery), "--out", again, "--add", "--workers", "0"]) == 0
    assert "16 changed; 16 images" in capsys.readouterr().out


def test_features_that_make_no_index_are_refused_by_file_and_row(by_command, run, tmp_path, capsys):
    whole, file, out = tmp_path / "whole.npz", tmp_path / "bad.npz", tmp_path / "again"
    assert main(["index", "--export", str(whole), "--out", by_command]) == 0
    arrays = dict(np.load(whole))
    values, names = arrays["features"], list(arrays["paths"])
    changed = {
        "must have rows of a length above 0 (got 0 in row 2, 1 such rows)": {
            "features": values * (np.arange(len(values)) != 2)[:, None]
        },
        f"must have {values.shape[1]} columns, as many as the model gives (got 5)": {
            "features": values[:, :5]
        },
        **{
            f"must name images below its folder, or in full (got {name!r} in row 1)": {
                "paths": np.array([names[0], name, *names[2:]])
            }
            for name in ("", "../../a.png", "/a/../b.png", "a\0b.png")
        },
    }
    for message, change in changed.items():
        np.savez(file, **{**arrays, **change})
        assert main(["index", "--features", str(file), "--out", str(out), "--run", str(run)]) == 2
        assert f"dhcl: features: {file} {message}" in capsys.readouterr().err
        assert not out.exists()


def test_a_password_in_an_address_is_not_printed(capsys):
    address = "milvus://me:secret@localhost:19530/people"
    for given in (["--ann"], ["--compact"]):
        assert main(["index", "--store", address, *given]) == 2
        error = capsys.readouterr().err
        assert "is for indexes in folders (got milvus://localhost:19530/people)" in error


def test_images_are_chosen_by_identity_time_and_folder(gallery, model, run, tmp_path, capsys):
    folder = str(tmp_path / "timed")
    pattern = r"(?P<id>-?\d+)_c(?P<camera>\d+)s\d_(?P<time>\d+)"
    create_index(folder, [gallery], model, pattern=pattern)
    opened = Index.open(folder)
    records = list(opened.records)
    times = sorted(record.time for record in records)
    assert all(float(record.path.split("_")[2]) == record.time for record in records)
    query = model.features([opened.path(0)])

    def rows(**chosen):
        [found] = opened.search(query, 16, where=opened.where(**chosen))
        return set(found.indices.tolist())

    someone = records[3].id
    assert rows(ids=[f"0{someone}"]) == {n for n, r in enumerate(records) if r.id == someone}
    middle = rows(since=times[4], until=times[9])
    assert middle == {n for n, r in enumerate(records) if times[4] <= r.time <= times[9]}
    inner = rows(below=[gallery / "more images"])
    assert inner == {n for n, r in enumerate(records) if r.path.startswith("more images/")}
    assert rows(below=[opened.path(2), gallery / "more images"]) == {*inner, 2}
    assert rows(below=[gallery.parent]) == set(range(16))
    with pytest.raises(ConfigError, match=r"below: .* has nothing below /nowhere, its images"):
        opened.where(below=["/nowhere"])
    given = ["search", folder, str(opened.path(0)), "--json", "--id", str(someone)]
    assert main([*given, "--since", str(times[0])]) == 0
    [found] = json.loads(capsys.readouterr().out)["queries"]
    assert {each["id"] for each in found["results"]} == {someone}
    assert main([*given, "--since", "yesterday"]) == 2
    assert "since: must be seconds, or a time such as 2026-" in capsys.readouterr().err


def test_changes_keep_the_lists_of_neighbours_true(by_command, gallery, pictures, model, capsys):
    query = str(pictures / "query")
    given = ["index", query, "--out", by_command, "--workers", "0"]
    assert main([*given, "--add", "--neighbours"]) == 0
    assert "the nearest images of 32 images were found" in capsys.readouterr().out
    gone = image_files(gallery)[0]
    remove_images(by_command, [gone])
    assert len(Index.open(by_command).lists.ranks) == 31
    assert main(["index", str(gallery), "--out", by_command, "--add", "--workers", "0"]) == 0
    opened = Index.open(by_command)
    assert len(opened.lists.ranks) == 32
    [found] = opened.search(model.features([gone]), 5, rerank=True)
    expected = search(model.features([gone]), torch.from_numpy(opened.features), 5, True)
    assert torch.equal(found.indices, expected.indices[0])
    assert torch.allclose(found.distances, expected.distances[0], atol=2e-6)


def test_images_are_searched_with_as_their_features_are(by_command, pictures, model):
    opened = Index.open(by_command)
    files = image_files(pictures / "query")[:2]
    expected = opened.search(model.features(files), 3)
    for query in (files, [Image.open(file) for file in files], model.features(files).numpy()):
        for found, one in zip(opened.search(query, 3), expected, strict=True):
            assert torch.equal(found.indices, one.indices)
            assert torch.equal(found.similarities, one.similarities)


def test_an_approximate_search_says_its_recall_and_needs_what_is_built_for_it(
    by_command, pictures, capsys, tmp_path
):
    queries = ["search", by_command, str(pictures / "query"), "--workers", "0", "--topk", "3"]
    assert main([*queries, "--ann"]) == 2
    rule = f"has no index for approximate search; `dhcl index --ann --out {by_command}` builds one"
    assert rule in capsys.readouterr().err
    assert main(["index", "--ann", "--store", "milvus://127.0.0.1:1/x"]) == 2
    assert "ann: is for indexes in folders (got milvus://127.0.0.1:1/x)" in capsys.readouterr().err
    assert main(["index", "--ann", "--out", by_command]) == 0
    ready = "ready for approximate search, recall 1.000 on 16 of its images"
    assert ready in capsys.readouterr().out
    assert main(queries) == 0
    exact = capsys.readouterr().out
    page = tmp_path / "found.html"
    assert main([*queries, "--ann"]) == 0
    said = "approximate: recall 1.000 on 16 queries when built"
    assert capsys.readouterr().out == f"{exact}{said}\n"
    assert main([*queries, "--ann", "--json", "--html", str(page)]) == 0
    known = json.loads(capsys.readouterr().out)["approximate"]
    assert known == {"recall": 1.0, "queries": 16}
    assert f"A{said[1:]}." in page.read_text()
    assert main([*queries, "--ann", "--rerank"]) == 2
    assert "ann: --rerank compares all images" in capsys.readouterr().err


def test_an_index_adds_and_removes_and_stays_what_it_was(index, gallery, pictures, model, seen):
    opened = Index.open(index)
    done = opened.add(pictures / "query", model=model, workers=0)
    assert (done.added, done.total, len(seen)) == (16, 32, 16)
    assert len(opened) == 16
    again = Index.open(index)
    one = again.path(3)
    assert again.remove([one]).total == 31
    assert str(one) not in map(str, paths(index))
    assert Index.open(index).remove(str(pictures / "query")).removed == 16
    assert opened.add([gallery], sync=True).added == 1  # by the model it was made with
    with pytest.raises(ConfigError, match="has no image"):
        opened.remove("/nowhere")
    check(index, model)
