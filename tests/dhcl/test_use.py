"""What docs/use.md shows of a finished model runs in an empty folder, from top to bottom."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from dhcl.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)


def run_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_page_shows_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "use.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, text in blocks:
        if language == "python":
            assert run_python(text, tmp_path)
            continue
        for line in text.replace("\\\n", "").strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "dhcl", line
            assert main(words[1:]) == 0, f"{line}\n{capfd.readouterr().err}"
    assert {"found.html", "lists.npz", "labels.csv"} <= {path.name for path in tmp_path.iterdir()}
