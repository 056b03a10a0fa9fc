"""Models as folders that are sent: what is in them, where they can be read, what is refused."""

import json
import shutil
import subprocess
import sys

import dhcl
import pytest
import torch
import yaml
from dhcl import ReID
from dhcl.cli import main
from dhcl.config import ConfigError
from dhcl.data import DataError, image_files
from dhcl.errors import CheckpointError, UnavailableWeights
from dhcl.files import write_together
from dhcl.inference.hub import CARD_MARK
from dhcl.models import build_model
from dhcl.models.tensors import read_safetensors, safetensors_bytes
from dhcl.training.checkpoint import load_checkpoint, save_checkpoint
from safetensors import safe_open

from tests.dhcl.toy import make_run

FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("hub") / "people")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def names(folder):
    return {path.name for path in folder.iterdir()}


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- there and back -----------------------------------------------------------------------------


def test_a_folder_gives_the_model_back_wherever_it_lies(model, run, folder, pictures, tmp_path):
    assert names(folder) == FILES
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "ä 人")
    other = ReID.from_pretrained(moved, device="cpu")
    files = image_files(pictures / "query")
    assert other.id == model.id
    assert torch.equal(other.features(files), model.features(files))
    assert torch.equal(other.features(files, [1] * 16), model.features(files, [1] * 16))
    assert other.num_cameras == 2
    assert other.metrics == json.loads((run / "metrics.json").read_text())["last"]
    train = pictures / "bounding_box_train"
    assert torch.equal(other.cluster(train).labels, model.cluster(train).labels)
    assert other.camera_indices([1, 2, 9, -1]) == [0, 1, -1, -1]
    again = other.save_pretrained(tmp_path / "again")
    for name in FILES - {"README.md"}:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_another_process_reads_it_without_run_data_or_network(folder, pictures, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    picture = image_files(pictures / "query")[0]
    code = f"""
import socket
def refuse(*args, **options):
    raise AssertionError("no network")
socket.socket.connect = refuse
from dhcl import ReID
model = ReID.from_pretrained("moved", device="cpu")
print(model.id, tuple(model.features({str(picture)!r}).shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=moved.parent, check=True
    )
    told = json.loads((folder / "config.json").read_text())
    assert done.stdout.split()[0] == told["fingerprint"]
    assert done.stdout.strip().endswith(f"(1, {told['dim']})")


def test_a_repository_is_read_from_the_cache_of_the_hub(model, folder, tmp_path):
    """As `hf download owner/people` leaves it."""
    home, commit = tmp_path / "models--owner--people", "c" * 40
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    found = ReID.from_pretrained(
        "owner/people", cache_dir=tmp_path, local_files_only=True, device="cpu"
    )
    assert found.id == model.id
    for name, revision in (("owner/other", None), ("owner/people", "v2")):
        with pytest.raises(UnavailableWeights, match=f"no folder {name}, and the repository"):
            ReID.from_pretrained(
                name, cache_dir=str(tmp_path), local_files_only=True, revision=revision
            )


def test_commands_take_the_folder_for_a_run(model, folder, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    query = str(image_files(pictures / "query")[0])
    gallery = str(pictures / "bounding_box_test")
    few = ["--workers", "0", "--device", "cpu"]
    assert main(["index", gallery, "--run", str(folder), "--out", "index", *few]) == 0
    assert main(["search", "index", query, "--topk", "2", "--json"]) == 0
    assert main(["export", str(folder), "--pretrained", "again", "--device", "cpu"]) == 0
    assert "with metrics" in capsys.readouterr().out
    assert ReID.load("again", device="cpu").id == model.id
    assert names(tmp_path / "again") == FILES


def test_weights_of_a_folder_and_of_a_file_start_a_training(folder, run, pictures, tmp_path):
    options = {"pretrained": False, "image_size": (32, 16), "num_cameras": 2}
    for given in (folder, folder / "model.safetensors"):
        report = build_model("small", weights=given, **options).weights
        assert not report.missing
        assert not report.unused
    make_run(pictures, tmp_path / "next", weights=folder)
    out = tmp_path / "plain.safetensors"
    assert main(["export", str(run), "--weights", str(out), "--device", "cpu"]) == 0
    report = build_model("small", weights=out, image_size=(32, 16)).weights
    assert not report.missing
    assert main(["export", str(run), "--weights", str(tmp_path / "own.pt")]) == 0
    own = torch.load(tmp_path / "own.pt", weights_only=True)
    assert {n: t.tolist() for n, t in own.items()} == {
        n: t.tolist() for n, t in read_safetensors(out).items()
    }


# ---- what is in the files -----------------------------------------------------------------------


def test_the_card_says_what_was_measured_and_nothing_else(model, folder, run):
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    stored = json.loads((run / "metrics.json").read_text())["last"]
    [result] = head["model-index"][0]["results"]
    values = {each["type"]: each["value"] for each in result["metrics"]}
    assert values["mAP"] == pytest.approx(100 * stored["mAP"], abs=0.01)
    assert values["rank1"] == pytest.approx(100 * stored["rank1"], abs=0.01)
    assert result["dataset"]["name"] == "market1501"
    assert f"{stored['queries']} queries" in card
    assert "# people" in card
    assert model.id in card


def test_no_place_of_this_machine_is_told(folder, run, pictures):
    for name in ("config.json", "README.md"):
        text = (folder / name).read_text()
        assert str(pictures) not in text
        assert str(run) not in text
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_metrics_of_another_model_are_not_told(model, run, tmp_path):
    """Of a run that was trained further and not evaluated since, and of one that never was."""
    further = shutil.copytree(run, tmp_path / "further")
    file = further / "checkpoints" / "last.pt"
    state = load_checkpoint(file)
    state["progress"]["epoch"] += 1
    save_checkpoint(file, state)
    none = shutil.copytree(run, tmp_path / "none")
    (none / "metrics.json").unlink()
    for folder in (further, none):
        loaded = ReID.load(folder, device="cpu")
        assert loaded.metrics == {}
        card = (loaded.save_pretrained(tmp_path / f"of {folder.name}") / "README.md").read_text()
        assert "Nothing: no evaluation" in card
        assert "model-index" not in card


def test_another_protocol_is_told(run, tmp_path):
    """Where matches within the camera count, the figures mean something else."""
    changed = shutil.copytree(run, tmp_path / "changed")
    file = changed / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "protocol": "within the camera"}))
    saved = ReID.load(changed, device="cpu").save_pretrained(tmp_path / "saved")
    assert "Protocol: within the camera." in (saved / "README.md").read_text()


def test_metrics_of_the_best_are_its_own(pictures, tmp_path):
    run = make_run(pictures, tmp_path / "run", epochs=2, eval_every=1)
    best = ReID.load(run, "best", device="cpu")
    looked = load_checkpoint(run / "checkpoints" / "best.pt")["metrics"]
    assert best.metrics["epoch"] == looked["epoch"]
    card = (best.save_pretrained(tmp_path / "best") / "README.md").read_text()
    assert "The epoch was chosen by test mAP" in card
    assert ReID.from_pretrained(tmp_path / "best", device="cpu").which == "best"


def test_cameras_that_are_not_known_any_more(run, tmp_path):
    alone = shutil.copytree(run, tmp_path / "alone")
    text = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(text.replace("data: market1501", "data: folder"))
    saved = ReID.load(alone, device="cpu").save_pretrained(tmp_path / "saved")
    with pytest.raises(DataError, match=r"config\.json does not say those of the training$"):
        ReID.from_pretrained(saved, device="cpu").camera_indices([1])


# ---- writing ------------------------------------------------------------------------------------


def test_other_files_and_a_card_of_ones_own_stay(model, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "model.safetensors").write_bytes(b"old")
    (copy / "README.md").write_text(f"{CARD_MARK}\nold")
    model.save_pretrained(copy)
    assert "mAP" in (copy / "README.md").read_text()
    (copy / "README.md").write_text("# My own words")
    model.save_pretrained(copy)
    assert (copy / "README.md").read_text() == "# My own words"
    assert (copy / "notes.txt").read_text() == "mine"
    assert names(copy) == FILES | {"notes.txt"}
    assert ReID.from_pretrained(copy, device="cpu").id == model.id


def test_models_of_others_are_not_written_over(model, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"holds a config\.json that is not of a dhcl model"):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json"}
    with pytest.raises(ConfigError, match="must be a folder"):
        model.save_pretrained(tmp_path / "config.json")


def test_files_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    old = tmp_path / "old"
    write_together(old, {"a": b"1", "b": b"1"})
    (tmp_path / "plain").mkdir()
    assert old.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def full(path, data):
        if path.name == "b":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("dhcl.files.write_atomic", full)
    for folder in (old, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            write_together(folder, {"a": b"2", "b": b"2"})
    assert (old / "a").read_bytes() == b"1"
    assert names(old) == {"a", "b"}
    assert not (tmp_path / "new").exists()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), ConfigError, r"no config\.json \(it holds README"),
        (lambda f: (f / "model.safetensors").unlink(), ConfigError, r"has no model\.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), ConfigError, "can't be read"),
        (lambda f: (f / "config.json").write_text("[]"), ConfigError, "not of a dhcl model"),
        (lambda f: change(f, library_name="timm"), ConfigError, "not of a dhcl model"),
        (lambda f: change(f, format=9), ConfigError, "format 9, of another version"),
        (lambda f: change(f, options={"kapa": 1}), ConfigError, r"config\.json: option"),
        (lambda f: change(f, metrics=3), ConfigError, "must hold options"),
        (lambda f: change(f, options={"backbone": "resnet18"}), CheckpointError, "not those that"),
        (lambda f: change(f, fingerprint="0" * 64), CheckpointError, "expected 000000000000"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github"),
            CheckpointError,
            "Git LFS pointer",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            CheckpointError,
            r"expected a whole \.safetensors file",
        ),
    ],
)
def test_folders_that_are_none(copy, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message):
        ReID.from_pretrained(copy, device="cpu")


def test_weights_of_another_model_are_seen(model, folder, copy, tmp_path):
    """As a crash between two renames, or a file copied by hand, would leave them."""
    state = read_safetensors(folder)
    state["neck.weight"] = state["neck.weight"] + 1
    (copy / "model.safetensors").write_bytes(safetensors_bytes(state))
    with pytest.raises(CheckpointError, match=r"not those that config\.json describes"):
        ReID.from_pretrained(copy, device="cpu")
    model.save_pretrained(copy)
    assert ReID.from_pretrained(copy, device="cpu").id == model.id


def test_names_that_are_neither_folder_nor_repository(tmp_path):
    for name in (tmp_path / "none", "a b/c", "../x/y", "none", "a/b/c"):
        with pytest.raises(ConfigError, match="must be a folder, or a repository of the hub"):
            ReID.from_pretrained(name)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="got a file at"):
        ReID.from_pretrained(tmp_path / "file")
    assert dhcl.ReID is ReID


# ---- weights in parts ---------------------------------------------------------------------------


@pytest.fixture
def parts(copy):
    """The weights in three files and an index, as large models have them."""
    state = read_safetensors(copy)
    (copy / "model.safetensors").unlink()
    places = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        some = dict(list(state.items())[number::3])
        (copy / name).write_bytes(safetensors_bytes(some))
        places.update(dict.fromkeys(some, name))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return copy


def test_weights_in_parts_are_the_same(model, parts):
    assert ReID.from_pretrained(parts, device="cpu").id == model.id
    index = parts / "model.safetensors.index.json"
    assert not build_model("small", weights=index, image_size=(32, 16)).weights.missing


def test_an_index_that_does_not_fit_its_files(parts):
    index = parts / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = sorted(good)[0]
    for content, message in (
        ({**good, "more": good[first]}, "1 tensors that .* are in none of its files, more"),
        ({**good, first: "absent.safetensors"}, "files that .* are not there, absent"),
        ({**good, first: "../model.safetensors"}, "must name files beside it"),
        ({}, "must name files beside it"),
        (3, "must be JSON with a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": content}))
        with pytest.raises(CheckpointError, match=message):
            ReID.from_pretrained(parts, device="cpu")
