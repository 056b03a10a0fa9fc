"""Runs are used from other working directories, moved, and parted from their images."""

import shutil
from pathlib import Path

import dhcl.training.runs
import pytest
import torch
import yaml
from dhcl import ReID
from dhcl.cli import main
from dhcl.config import flat_options, read_run
from dhcl.data import DataError
from dhcl.training.evaluation import Evaluator
from dhcl.training.runs import evaluate_run

from tests.dhcl.toy import command_line, make_run, options, write_images

SMALL = {"epochs": 1, "iterations": 2, "warmup_epochs": 0, "camera_bn": True, "report": False}


@pytest.fixture
def tree(run, tmp_path, monkeypatch):
    """A folder that holds data and a run of it, which was made by relative paths in it."""
    home = tmp_path / "home"
    write_images(home / "people", people=4)
    shutil.copy(run / "checkpoints" / "last.pt", home / "start.pt")
    monkeypatch.chdir(home)
    config = options(Path("people"), Path("runs/toy"), weights=Path("start.pt"), **SMALL)
    assert main(["train", *command_line(config)]) == 0
    return home


def use(run, tmp_path, capsys):
    """All commands that need a run's model or images."""
    assert main(["eval", str(run), "--workers", "0"]) == 0
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(page), "--workers", "0"]) == 0
    assert "What this report does not have" not in page.read_text()
    gallery = read_run(Path(run)).data.root / "bounding_box_test"
    index = tmp_path / "index"
    pattern = r"(?P<id>\d+)_c(?P<camera>\d)"
    given = ["index", str(gallery), "--run", str(run), "--out", str(index), "--workers", "0"]
    assert main([*given, "--pattern", pattern, "--trained-cameras"]) == 0
    shutil.rmtree(index)
    assert main(["train", "--resume", str(run), "--workers", "0", "--no-rerank"]) == 0


def test_a_run_by_relative_paths_works_from_elsewhere(tree, tmp_path, monkeypatch, capsys):
    kept = yaml.safe_load((tree / "runs" / "toy" / "config.yaml").read_text())
    assert kept["data"]["root"] == "../../people"
    assert kept["model"]["weights"] == "../../start.pt"
    assert kept["out"] == str(tree / "runs" / "toy")
    monkeypatch.chdir(tmp_path)
    use("home/runs/toy", tmp_path, capsys)
    use(tree / "runs" / "toy", tmp_path, capsys)
    monkeypatch.chdir(tree / "runs" / "toy" / "checkpoints")
    use("..", tmp_path, capsys)


def test_a_tree_of_data_and_runs_can_be_moved(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "far" / "away"
    moved.parent.mkdir()
    tree.rename(moved)
    config = read_run(moved / "runs" / "toy")
    assert config.data.root == moved / "people"
    assert config.model.weights == moved / "start.pt"
    use(moved / "runs" / "toy", tmp_path, capsys)
    # The run has gone on there, and says so.
    kept = yaml.safe_load((moved / "runs" / "toy" / "config.yaml").read_text())
    assert kept["out"] == str(moved / "runs" / "toy")
    assert kept["data"]["root"] == "../../people"


def test_a_run_that_is_moved_alone_finds_what_stayed(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "archive" / "of" / "runs" / "toy"
    run.parent.mkdir(parents=True)
    (tree / "runs" / "toy").rename(run)
    assert read_run(run).data.root == tree / "people"
    use("archive/of/runs/toy", tmp_path, capsys)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["data"]["root"] == str(tree / "people")  # it is not near the run any more


def test_what_is_far_from_the_run_is_known_by_its_absolute_path(tree, tmp_path):
    far = tmp_path / "elsewhere" / "shared" / "people"
    shutil.copytree(tree / "people", far)
    run = make_run(far, Path("runs/far"))
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["data"]["root"] == str(far)
    shutil.move(run, tmp_path / "far")
    assert read_run(tmp_path / "far").data.root == far


def test_data_that_was_moved_is_said_how_to_be_named(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tree / "runs" / "toy"
    before = evaluate_run(read_run(run), run)
    moved = tmp_path / "pictures"
    (tree / "people").rename(moved)
    (tree / "start.pt").unlink()
    capsys.readouterr()
    for command in (["eval", str(run)], ["train", "--resume", str(run)]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"got nothing at {tree / 'people'}" in told
        assert "--root FOLDER says where they are now" in told
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(page), "--workers", "0"]) == 0
    assert "--root FOLDER says where they are now" in page.read_text()
    there = ["--root", str(moved), "--workers", "0"]
    assert main(["eval", str(run), *there]) == 0
    # The same data set, so the statistics per camera count.
    assert f"{100 * before['mAP']:6.1f}" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(page), *there]) == 0
    assert "What this report does not have" not in page.read_text()
    assert main(["train", "--resume", str(run), *there, "--epochs", "2"]) == 0
    assert read_run(run).data.root == moved


def test_moved_data_are_told_from_others_by_the_training_images(tree, tmp_path, monkeypatch):
    told = []

    class Watched(Evaluator):
        def __init__(self, *given, same_cameras, **others):
            super().__init__(*given, same_cameras=same_cameras, **others)
            told.append(same_cameras)

    monkeypatch.setattr(dhcl.training.runs, "Evaluator", Watched)
    (tree / "people").rename(tmp_path / "moved")
    write_images(tmp_path / "other", people=5)
    for name in ("moved", "other"):
        given = ["eval", str(tree / "runs" / "toy"), "--root", str(tmp_path / name)]
        assert main([*given, "--workers", "0"]) == 0
    assert told == [True, False]


def test_cameras_of_a_folder_that_is_gone(tree, tmp_path):
    pattern = r"_c(?P<camera>\d)"
    root = Path("people/bounding_box_train")
    run = make_run(root, Path("runs/folder"), data="folder", pattern=pattern)
    model = ReID.load(run, device="cpu")
    assert model.camera_indices([2, 1, 7]) == [1, 0, -1]
    (tree / "people").rename(tree / "others")
    with pytest.raises(DataError, match=r"root in runs/folder/config\.yaml says where"):
        ReID.load(run, device="cpu").camera_indices([1])


def test_runs_of_earlier_versions_are_read_where_they_were_started(tree, tmp_path, monkeypatch):
    """Their files have no sections, and paths as they were given."""
    run = Path("runs/toy")
    flat = flat_options(read_run(run))
    flat.update(root="people", weights="start.pt", out="runs/toy")
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}
    (run / "config.yaml").write_text(yaml.safe_dump(plain))
    config = read_run(run)
    assert config.data.root == tree / "people"
    assert config.model.weights == tree / "start.pt"
    assert evaluate_run(config, run)["queries"] == 8
    monkeypatch.chdir(tmp_path)
    assert read_run(tree / "runs" / "toy").data.root == tree / "runs" / "toy" / "people"


def test_weights_may_go_once_there_is_a_checkpoint(tree):
    (tree / "start.pt").unlink()
    assert main(["train", "--resume", "runs/toy", "--epochs", "2", "--workers", "0"]) == 0
    state = torch.load("runs/toy/checkpoints/last.pt", weights_only=True)
    assert state["progress"]["epoch"] == 2
