"""What docs/use.md and the README show of a finished model runs, in order, in an empty folder."""

import glob
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from dhcl.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("use")


def run_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_runs_in_order(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    blocks = BLOCK.findall((ROOT / "docs" / "use.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, text in blocks:
        if language == "python":
            assert run_python(text, folder)
            continue
        for line in text.replace("\\\n", "").strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "dhcl", line
            assert main(words[1:]) == 0, f"{line}\n{capfd.readouterr().err}"
    assert {"found.html", "lists.npz", "labels.csv"} <= {path.name for path in folder.iterdir()}


def test_the_readmes_example_runs(folder):
    assert glob.glob(str(folder / "runs" / "people")), "made by the page's test"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [code for language, code in BLOCK.findall(text) if "ReID.load" in code]
    assert run_python(code, folder)
