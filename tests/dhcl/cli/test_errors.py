"""Whatever goes wrong in a command is a message that names it, and an exit status."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dhcl import ReID
from dhcl.cli import main
from dhcl.cli.table import COMMANDS, Command
from dhcl.config import ConfigError, TrainConfig, load_config, read_run, with_changes
from dhcl.data import image_files, load_data
from dhcl.errors import DataError, as_path
from dhcl.inference.features import read_features
from dhcl.inference.index import Index
from dhcl.models.weights import read_states
from dhcl.training.record import read_record
from PIL import Image

RAISED = {
    "of a library": (ValueError("one\ntwo"), 1, "dhcl: cluster: ValueError: one; --debug shows"),
    "without words": (KeyError(), 1, "dhcl: cluster: KeyError: KeyError; --debug shows where"),
    "of memory": (MemoryError("8 GiB"), 1, "dhcl: cluster: there is not enough memory (8 GiB); "),
    "too deep": (RecursionError("deep"), 1, "dhcl: cluster: RecursionError: deep"),
    "an assertion": (AssertionError(), 1, "dhcl: cluster: AssertionError"),
    "of ours": (DataError("images: none\nat all"), 2, "dhcl: images: none\nat all\n"),
    "of the system": (OSError(errno.ENOSPC, "Full", "a\nb"), 1, "dhcl: Full: a\\nb\n"),
    "of two files": (OSError(errno.EXDEV, "Far", "a", None, "b"), 1, "dhcl: Far: a, b\n"),
    "of a name in bytes": (OSError(errno.EIO, "Bad", b"\xff"), 1, "dhcl: Bad: \\udcff\n"),
    "of a number": (OSError(errno.EBADF, "Closed", 3), 1, "dhcl: Closed\n"),
    "of the system without words": (TimeoutError(), 1, "dhcl: TimeoutError\n"),
    "a missing library": (ModuleNotFoundError("x", name="faiss"), 2, "`dhcl cluster` needs faiss"),
    "a missing module of ours": (
        ModuleNotFoundError("No module named 'dhcl.x'", name="dhcl.x"),
        1,
        "dhcl: cluster: ModuleNotFoundError: No module named 'dhcl.x'",
    ),
    "an interrupt": (KeyboardInterrupt(), 130, "dhcl: stopped\n"),
}


@pytest.fixture
def failing(monkeypatch):
    """Has the command ``cluster`` raise."""

    def install(error):
        def fail(self, name, words):
            assert "--debug" not in words
            raise error

        monkeypatch.setattr(Command, "__call__", fail)

    monkeypatch.delenv("DHCL_DEBUG", raising=False)
    return install


@pytest.mark.parametrize("case", RAISED)
def test_every_error_is_a_message_and_a_status(case, failing, monkeypatch, capsys):
    error, status, message = RAISED[case]
    failing(error)
    assert main(["cluster", "x"]) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("dhcl: ")
    assert "Traceback" not in told
    if case != "of ours":
        assert told.count("\n") == 1
    for debug, words in (("0", ["--debug"]), ("1", [])):
        monkeypatch.setenv("DHCL_DEBUG", debug)
        assert main(["cluster", *words, "x"]) == status
        traced = capsys.readouterr().err
        assert "Traceback" in traced
        assert type(error).__name__ in traced
        assert traced.endswith(told)
    monkeypatch.setenv("DHCL_DEBUG", "0")
    assert main(["cluster", "x"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_the_list_of_commands_says_how_to_see_more(capsys):
    assert main(["--help"]) == 0
    assert "--debug" in capsys.readouterr().out
    assert main(["doctor", "--help", "--debug"]) == 0


def test_a_process_ends_in_one_line(tmp_path):
    """A file that is no folder where one belongs, in a process of its own."""
    (tmp_path / "file").touch()
    np.save(tmp_path / "f.npy", np.eye(6, dtype=np.float32))
    words = ["cluster", str(tmp_path / "f.npy"), "--k1", "4", "--k2", "2", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "dhcl", *words, str(tmp_path / "file" / "labels.csv")],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "DHCL_DEBUG"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dhcl: ")
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


# ---- what is no path, and numbers too long ------------------------------------------------------

TAKES = {
    "run": (ReID.load, read_run, read_record),
    "features": (read_features,),
    "index": (Index.open,),
    "root": (lambda root: load_data("folder", root), lambda root: load_data("market1501", root)),
    "images": (image_files,),
    "config": (load_config,),
    "weights": (read_states,),
}


@pytest.mark.parametrize("wrong", [["x"], None, 3, b"x", {"a": 1}], ids=repr)
@pytest.mark.parametrize("name", TAKES)
def test_what_is_no_path_is_said_in_our_words(name, wrong):
    for function in TAKES[name]:
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=rf"^{name}: must be a path \(got {kind}\)$"):
            function(wrong)


def test_paths_of_every_kind_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("x", "~/a") == tmp_path / "a"
    assert as_path("x", tmp_path) == tmp_path
    with os.scandir(tmp_path.parent) as entries:
        assert as_path("x", next(entries)).parent == tmp_path.parent
    with pytest.raises(ConfigError, match=r"^root: must be a path \(got \['x'\]\)$"):
        with_changes(TrainConfig(), {"root": ["x"]})


@pytest.mark.parametrize("digits", [18, 19, 30, 200])
@pytest.mark.parametrize("place", ["identity", "camera"])
def test_long_runs_of_digits_in_names(digits, place, tmp_path):
    """Up to 18 digits are a number; more are no name of a published layout, elsewhere a text."""
    long = "1" * digits
    name = f"{long}_c1s1_0.jpg" if place == "identity" else f"0002_c{long}s1_0.jpg"
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / folder).mkdir()
        for each in ("0001_c1s1_0.jpg", "0001_c2s1_0.jpg"):
            Image.new("RGB", (8, 16)).save(tmp_path / folder / each)
    Image.new("RGB", (8, 16)).save(tmp_path / "bounding_box_train" / name)
    if digits > 18:
        with pytest.raises(DataError, match=f"market1501: .*{long[:18]}"):
            load_data("market1501", tmp_path)
    else:
        train = load_data("market1501", tmp_path).train
        assert int(long) in (train.ids if place == "identity" else train.cameras + 1)
    pattern = r"(?P<id>\d+)_c(?P<camera>\d+)"
    found = load_data("folder", tmp_path / "bounding_box_train", pattern=pattern).train
    assert len(set(found.ids.tolist())) == 2
    assert len(set(found.cameras.tolist())) == (2 if place == "identity" else 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_missing_is_in_the_extras_that_are_named(name, monkeypatch, capsys):
    def run(self, *_):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(Command, "__call__", run)
    assert main([name]) == 2
    said = capsys.readouterr().err
    extras = COMMANDS[name].extras
    assert said == f"dhcl: `dhcl {name}` needs pyarrow: pip install 'dhcl[{extras}]'\n"
    known = Path(__file__).parents[3].joinpath("pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in known for extra in extras.split(","))
    assert ("index" in extras) == (name in ("index", "search", "serve"))
