import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from dhcl import ReID
from dhcl.cli import main
from dhcl.cli.table import COMMANDS
from dhcl.demo import called_as

from dhcl_ops import cluster
from tests.dhcl.toy import command_line, options, write_images


def command(name, config):
    return [sys.executable, "-m", "dhcl", name, *command_line(config)]


def test_train_then_eval(pictures, tmp_path, capsys):
    config = options(pictures, tmp_path / "run", epochs=1)
    assert main(["train", *command_line(config)]) == 0
    out = capsys.readouterr().out
    assert "kappa: 0.0" in out  # the options are printed
    assert "| last epoch |" in out
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert main(["eval", str(tmp_path / "run"), "--rerank", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert f"{100 * stored['last']['mAP']:6.1f}" in out
    assert "re-ranked" in out
    other = [
        "--data",
        "folder",
        "--root",
        str(pictures),
        "--pattern",
        r"(?P<id>\d+)_c(?P<camera>\d)",
    ]
    assert main(["eval", str(tmp_path / "run"), "--workers", "0", *other]) == 0
    capsys.readouterr()
    given = ["eval", str(tmp_path / "run"), "--workers", "0"]
    assert main([*given, "--ranks", "1", "20", "--ap", "trapezoid"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert head.split("|")[2:5] == ["    mAP ", "  rank1 ", " rank20 "]
    assert f" {100 * stored['last']['rank1']:.1f} " in row
    assert main([*given, "--ranks", "0"]) == 2
    assert "ranks: must be numbers from 1 to 1000000 (got 0)" in capsys.readouterr().err


def test_resume_takes_what_decides_nothing_only(pictures, tmp_path, capsys):
    config = options(pictures, tmp_path / "run", epochs=1)
    assert main(["train", *command_line(config)]) == 0
    again = ["train", "--resume", str(tmp_path / "run")]
    assert main([*again, "--epochs", "2", "--workers", "1"]) == 0
    capsys.readouterr()
    assert main([*again, "--lr", "1"]) == 2
    assert "lr and resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "none")]) == 2
    assert "must be the folder of a run (got nothing at" in capsys.readouterr().err


MISTAKES = {
    "no root": ([], "root: where the images lie must be given"),
    "no folder": (["--root", "/nowhere/at/all"], "root must be a folder"),
    "no such data": (["--root", ".", "--data", "market1502"], "market1501"),
    "no such backbone": (["--backbone", "resnet51"], "resnet5"),
    "no weights": (["--weights", "/none.pth"], "/none.pth"),
    "contradiction": (["--camera-bn", "--samples-per-bn", "16"], "samples_per_bn and camera_bn"),
    "no such option": (["--kapa", "1"], "--kappa"),
    "wrong value": (["--kappa", "many"], "--kappa"),
    "wrong image size": (["--image-size", "2", "2"], "2 x 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message_and_status_2(mistake, pictures, tmp_path, capsys):
    extra, message = MISTAKES[mistake]
    root = [] if mistake in ("no root", "no folder", "no such data") else ["--root", str(pictures)]
    small = ["--backbone", "small", "--image-size", "32", "16"]
    given = [*small, "--data", "market1501", "--out", str(tmp_path / "run"), *root, *extra]
    assert main(["train", *given]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_bad_images_are_refused_or_skipped(pictures, tmp_path, capsys):
    root = write_images(tmp_path / "pictures", people=4)
    bad = root / "bounding_box_train" / "0001_c1s1_000000_00.png"
    bad.write_bytes(bad.read_bytes()[:40])
    config = options(root, tmp_path / "run", epochs=1)
    assert main(["train", *command_line(config)]) == 2
    assert bad.name in capsys.readouterr().err
    skipping = options(root, tmp_path / "run", epochs=1, on_bad="skip")
    assert main(["train", *command_line(skipping)]) == 0
    assert bad.name in capsys.readouterr().out


def test_commands_and_their_help(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"dhcl {name}" in capsys.readouterr().out


def test_eval_of_what_is_no_run(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "is not the folder of a run, it has no config.yaml" in capsys.readouterr().err


def test_eval_needs_nothing_to_train_on(pictures, run, tmp_path, capsys):
    assert main(["eval", str(run), "--workers", "0"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| last")]
    for name, query, gallery in (
        ("published", "query", "bounding_box_test"),
        ("own", "probe", "test"),
    ):
        shutil.copytree(pictures / "query", tmp_path / name / query)
        shutil.copytree(pictures / "bounding_box_test", tmp_path / name / gallery)
    given = ["eval", str(run), "--workers", "0", "--root"]
    assert main([*given, str(tmp_path / "published")]) == 0
    said = capsys.readouterr().out
    assert "statistics of all cameras together" in said
    pattern = ["--data", "folder", "--pattern", r"(?P<id>\d+)_c(?P<camera>\d+)"]
    assert main([*given, str(tmp_path / "own"), *pattern]) == 0
    same = capsys.readouterr().out
    rows = [[x for x in text.splitlines() if x.startswith("| last")] for text in (said, same)]
    assert rows[0] == rows[1]
    assert len(table) == len(rows[0]) == 1


@pytest.mark.parametrize(
    ("folders", "pattern", "message"),
    [
        (["."], True, "must hold the folders query/ and gallery/ (got 0 queries and 0 images"),
        (["train", "gallery"], True, "must hold the folders query/ and gallery/"),
        (["query", "gallery"], False, "--pattern says where they stand, in a group named id"),
    ],
)
def test_eval_says_what_a_folder_needs(pictures, run, tmp_path, capsys, folders, pattern, message):
    for folder in folders:
        shutil.copytree(pictures / "query", tmp_path / "root" / folder)
    given = ["eval", str(run), "--data", "folder", "--root", str(tmp_path / "root")]
    known = ["--pattern", r"(?P<id>\d+)_c(?P<camera>\d+)"] if pattern else []
    assert main([*given, *known, "--workers", "0"]) == 2
    assert message in capsys.readouterr().err


def test_cluster_of_a_folder_is_the_runs_clustering(pictures, tmp_path, capsys):
    config = options(pictures, tmp_path / "run", epochs=1, iterations=1, k1_own=3, self_paced=True)
    assert main(["train", *command_line(config)]) == 0
    folder, out = pictures / "bounding_box_train", tmp_path / "labels.csv"
    given = ["cluster", str(folder), "--out", str(out), "--workers", "0"]
    capsys.readouterr()
    assert main([*given, "--run", str(config.run)]) == 0
    assert "k1_own 3, self_paced True" in capsys.readouterr().out
    labels = ReID.load(config.run, device="cpu").cluster(folder).labels.tolist()
    assert [int(row.rsplit(",", 1)[1]) for row in out.read_text().splitlines()[1:]] == labels
    # Names without a camera.
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, plain / f"{number}.png")
    given[1] = str(plain)
    assert main([*given, "--run", str(config.run)]) == 0
    assert "Neighbours are taken from all images alike" in capsys.readouterr().err
    assert main([*given, "--run", str(config.run), "--k1-own", "2"]) == 2
    assert "k1_own: two cameras at least must be known" in capsys.readouterr().err


def test_cluster_of_saved_features_by_camera(tmp_path, capsys):
    noise = np.random.default_rng(0)
    ids = np.arange(8).repeat(6)
    rows = noise.normal(size=(8, 16))[ids] + 0.4 * noise.normal(size=(48, 16))
    cameras = np.array(["north", "02"])[np.arange(48) % 2]
    np.savez(tmp_path / "f.npz", features=rows.astype(np.float32), cameras=cameras)
    given = ["cluster", str(tmp_path / "f.npz"), "--out", str(tmp_path / "l.csv")]
    numbers = {"k1": 8, "k2": 3, "k1_own": 4, "self_paced": True}
    words = ["--k1", "8", "--k2", "3", "--k1-own", "4", "--self-paced", "True"]
    assert main([*given, *words]) == 0
    unit = torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)))
    expected = cluster(unit, cameras=torch.arange(48) % 2, **numbers).labels.tolist()
    lines = (tmp_path / "l.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[1]) for line in lines] == expected


def test_commands_count_files_of_other_kinds(pictures, run, tmp_path, capsys):
    shutil.copytree(pictures / "query", tmp_path / "crops")
    for name in ("a.gif", "b.avif"):
        (tmp_path / "crops" / name).write_bytes(b"x")
    crops = str(tmp_path / "crops")
    for given in (
        ["index", crops, "--run", str(run), "--out", str(tmp_path / "index")],
        ["search", str(tmp_path / "index"), crops],
        ["cluster", crops, "--run", str(run), "--out", str(tmp_path / "labels.csv")],
        ["export", str(run), "--features", crops, "--out", str(tmp_path / "f.npz")],
    ):
        assert main([*given, "--workers", "0"]) == 0
        assert "2 files of other kinds (.avif 1, .gif 1)" in capsys.readouterr().err


def test_without_the_extra_the_package_imports_and_says_what_to_install(tmp_path):
    """In a process that can't find torchvision, tyro and the like."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "timm", "tyro", "accelerate", "yaml", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import dhcl
from dhcl.cli import main
print(dhcl.__version__, main(["train", "--root", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" 2\n")
    assert "pip install 'dhcl[train]'" in done.stderr


def test_doctor_lists_the_libraries():
    environment = {**os.environ, "DHCL_BUILD": "off"}
    done = subprocess.run(
        [sys.executable, "-m", "dhcl", "doctor"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "dhcl::dbscan" in done.stdout
    assert "timm" in done.stdout
    assert "not installed" not in done.stdout.split("trainer")[-1]


def test_synth_draws_and_refuses_to_replace(tmp_path, capsys):
    small = ["--ids", "4", "--cameras", "2", "--images-per-camera", "2", "--image-size", "32", "16"]
    out, sheet = tmp_path / "data", tmp_path / "sheet.png"
    given = ["synth", str(out), *small, "--workers", "1", "--sheet", str(sheet)]
    assert main(given) == 0
    assert sheet.exists()
    assert "dhcl train --data market1501" in capsys.readouterr().out
    assert main(given) == 2
    assert "pass overwrite" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0
    assert main(["synth", str(tmp_path / "other"), "--ids", "1"]) == 2
    assert "ids must be" in capsys.readouterr().err


SMALL_DEMO = [
    "--ids",
    "8",
    "--cameras",
    "2",
    "--images-per-camera",
    "3",
    "--image-size",
    "32",
    "16",
    "--epochs",
    "1",
    "--iterations",
    "2",
]


def test_the_comparison_ends_with_a_table_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    given = ["demo", "--compare", "--out", str(tmp_path / "demo"), *SMALL_DEMO]
    assert main([*given, "--seeds", "0", "1"]) == 0
    assert "<h1>Run dhcl-seed0" in (tmp_path / "demo" / "report.html").read_text()
    assert "Comparison of 12 runs" in (tmp_path / "demo" / "compare.html").read_text()
    text = (tmp_path / "demo" / "results.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for name in ("untrained", "spcl", "cluster-contrast", "dhcl", "dhcl-hnm"):
        assert f"| {name} |" in text
    assert "±" in text
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert [len(metrics) for metrics in rows.values()] == [2] * 7
    before = (tmp_path / "demo" / "runs" / "spcl-seed0" / "log.jsonl").stat().st_mtime_ns
    assert main([*given, "--seeds", "0"]) == 0
    after = (tmp_path / "demo" / "runs" / "spcl-seed0" / "log.jsonl").stat().st_mtime_ns
    assert before == after
    again = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert again["untrained"][0] == rows["untrained"][0]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A demo in a folder with a name that a shell would take apart, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["demo", "--out", str(folder), *SMALL_DEMO]) == 0
    return folder, said.getvalue()


def test_the_demo_shows_scores_before_and_after_and_a_report(shown):
    folder, said = shown
    stages = [said.index(f"[{number}/5]") for number in range(1, 6)]
    assert stages == sorted(stages)
    untrained = said[stages[2] : stages[3]]  # the first scores there are, before the training
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert f"mAP {rows['untrained'][0]['mAP']:.1%}" in untrained
    assert "epoch 1/1" in said[stages[3] : stages[4]]
    assert list(rows) == ["untrained", "dhcl"]
    assert rows["dhcl"][0] == json.loads((folder / "seed0" / "metrics.json").read_text())["last"]
    assert (folder / "results.md").read_text().strip() in said
    page = (folder / "report.html").read_text()
    assert "<h1>Run seed0</h1>" in page
    assert "What this report does not have" not in page
    assert str(folder / "report.html") in said


def test_the_commands_that_the_demo_ends_with_work(shown, tmp_path):
    folder, said = shown
    lines = [line.strip() for line in said[said.index("Try next:") :].splitlines()[1:]]
    assert [shlex.split(line)[3] for line in lines] == ["report", "index", "search", "demo"]
    for line in lines[:3]:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "<h1>Run seed0</h1>" in (folder / "longer.html").read_text()
    assert (folder / "found.html").read_text().count('class="right"') > 0


def test_a_demo_goes_on_with_its_own_runs_only(shown, capsys):
    folder, _ = shown
    log = folder / "seed0" / "log.jsonl"
    before = log.stat().st_mtime_ns
    given = ["demo", "--out", str(folder), *SMALL_DEMO]
    assert main(given) == 0
    assert log.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*given, "--epochs", "2"]) == 2
    assert "with other options (epochs 1, not 2" in capsys.readouterr().err
    assert main([*given, "--ids", "10"]) == 2
    assert "with other options (ids 8, not 10)" in capsys.readouterr().err
    assert main([*given, "--seeds", "0", "1"]) == 2
    assert "several are for --compare" in capsys.readouterr().err
    assert log.stat().st_mtime_ns == before


def test_a_printed_command_names_the_program_as_it_was_called(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "dhcl"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    assert called_as() == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert called_as() == "dhcl"
    monkeypatch.setattr(sys, "argv", ["/x/dhcl/__main__.py", "demo"])
    assert called_as() == f"{shlex.quote(sys.executable)} -m dhcl"
