"""The runner of paired trainings: tiny ones, made once, and the table of their figures."""

import json

import pytest
import torch
import yaml
from dhcl.data import load_data
from dhcl.synth import render_dataset

from benchmarks import evidence, evidence_table, imagenet
from benchmarks.beds import Bed, root_of

TINY = {
    "starts": {
        "drawn": {"ids": 8, "cameras": 2, "image_size": [32, 16], "epochs": 1, "iterations": 1}
    },
    "beds": {
        "people": {
            "drawn": {"ids": 8, "cameras": 2, "image_size": [32, 16], "images_per_camera": 2},
            "start": "drawn",
            "options": {
                "backbone": "small",
                "pretrained": False,
                "image_size": [32, 16],
                "camera_bn": True,
                "epochs": 1,
                "iterations": 1,
                "classes_per_batch": 2,
                "images_per_class": 2,
                "k1": 8,
                "min_samples": 2,
                "cluster_on": "extracted",
            },
        },
        "photos, reversed": {"photographs": "reversed", "options": {}},
    },
    "settings": {"warm": {"temperature": 0.1}, "cold": {"temperature": 0.05}},
    "comparisons": [["warm", "cold"]],
    "seeds": [0],
}


def written(folder, **changes):
    path = folder / "runs.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return str(path)


def test_runs_are_made_once_and_compared(tmp_path, capsys, monkeypatch):
    words = [written(tmp_path), "--out", str(tmp_path / "out"), "--only", "people"]
    assert evidence.main([*words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "people/warm-seed0: 0 minutes of one core" in said
    assert "start drawn-seed0" in said
    assert evidence.main(words) == 0
    said = capsys.readouterr().out
    table = said[said.index(evidence_table.BEGIN) :].strip()
    assert "| warm less cold | +" in table
    config = yaml.safe_load((tmp_path / "out/runs/people/warm-seed0/config.yaml").read_text())
    assert config["loss"]["temperature"] == 0.1
    assert "starts/drawn-seed0" in config["model"]["weights"]

    # All of it is there, so nothing is trained again, and the page has what was said.
    monkeypatch.setattr(evidence, "make_run", None)
    monkeypatch.setattr(evidence, "make_start", None)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{evidence_table.BEGIN}\n{evidence_table.END}\nafter\n")
    monkeypatch.setattr(evidence, "PAGE", page)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "evidence.json")
    assert evidence.main([*words, "--write"]) == 0
    assert page.read_text() == f"before\n{table}\nafter\n"
    kept = json.loads((tmp_path / "evidence.json").read_text())
    assert evidence_table.section(kept) == table
    assert str(tmp_path) not in json.dumps(kept)
    assert evidence.main([*words, "--plan"]) == 0
    assert "people/warm-seed0: done" in capsys.readouterr().out


def test_a_run_that_fails_does_not_keep_the_others_from_theirs(tmp_path, capsys, monkeypatch):
    made = []

    def make(work, run):
        made.append(run.setting)
        if run.setting == "warm":
            raise ValueError("no\nmore")

    monkeypatch.setattr(evidence, "make_run", make)
    monkeypatch.setattr(evidence, "make_start", lambda *given: None)
    monkeypatch.setattr(evidence, "root_of", lambda *given: tmp_path)
    assert evidence.main([written(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert made == ["warm", "cold"] * 2
    assert "evidence: photos-reversed/warm-seed0: no\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": [["warm", "hot"]]}, "comparisons: 'hot' is not in settings"),
        ({"starts": {}}, "starts from 'drawn', which is not in starts"),
        ({"beds": {"empty": {"options": {}}}}, "empty must have either drawn or photographs"),
        ({"settings": {"warm": {"temprature": 1}}, "comparisons": []}, "did you mean"),
        ({"seeds": ["x"]}, "seeds"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_before_anything_runs(tmp_path, capsys, changes, message):
    words = [written(tmp_path, **changes), "--out", str(tmp_path / "out")]
    assert evidence.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_photographs_are_reversed(tmp_path):
    there = tmp_path / "there"
    render_dataset(there, ids=6, cameras=2, images_per_camera=3, image_size=(32, 16), junk=0,
                   distractors=0)  # fmt: skip
    bed = Bed({}, photographs="reversed")
    root = root_of(bed, "back", tmp_path / "out", there)
    before, after = load_data("market1501", there), load_data("market1501", root)
    assert len(after.train) == len(before.query) + len(before.gallery)
    assert len(after.query) + len(after.gallery) == len(before.train)
    names = {path.name for path in before.train.paths}
    assert {path.name for path in (*after.query.paths, *after.gallery.paths)} == names
    seen = list(zip(after.query.ids.tolist(), after.query.cameras.tolist(), strict=True))
    assert len(seen) == len(set(seen)) == 6
    assert root_of(Bed({}, photographs="forward"), "forth", tmp_path, there) == there


def test_the_plan_that_is_committed_can_be_read(tmp_path):
    plan = evidence.read_plan(evidence.PLAN)
    work = evidence.Work(plan, tmp_path, None, 1)
    runs = evidence.runs_of(plan, ["drawn/"])
    assert {work.config(run, None).data.data for run in runs} == {"market1501"}


def test_imagenet_weights_get_their_names_by_their_order():
    state = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    names = {"x": torch.zeros(2, 3), "y": torch.zeros(4)}
    assert imagenet.renamed(state, names) == {"x": state["a"], "y": state["b"]}
    with pytest.raises(ValueError, match=r"layer by layer .not y"):
        imagenet.renamed(state, {**names, "y": torch.zeros(5)})
    with pytest.raises(ValueError, match="not their number"):
        imagenet.renamed(state, {**names, "z": torch.zeros(5)})


def test_the_table_has_differences_of_pairs_and_how_many_agree():
    def run(value):
        return {"mAP": value, "rank1": 2 * value}

    figures = {"bed": {"a": {"0": run(0.3), "1": run(0.2), "2": run(0.4)},
                       "b": {"0": run(0.2), "1": run(0.25), "5": run(0.9)}}}  # fmt: skip
    results = evidence_table.results_of(figures, [("a", "b"), ("b", "c")], {})
    lines = evidence_table.section(results).splitlines()
    none = evidence_table.NONE
    assert f"| a | 30.0 ± 10.0 | 60.0 ± 20.0 | {none} | {none} | 0, 1, 2 |" in lines
    assert f"| a less b | +2.5 ± 10.6, 1 of 2 | +5.0 ± 21.2, 1 of 2 | {none} | {none} |" in lines
    assert not any("b less c" in line for line in lines)
    with pytest.raises(ValueError, match="the page must have the markers"):
        evidence_table.between_markers("no markers", "text")
