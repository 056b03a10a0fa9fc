"""What docs/use.md, and the README if it does, show of a finished model runs in an empty folder."""

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


def test_the_page_and_then_what_the_readme_shows_run(tmp_path, monkeypatch, capfd):
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
    readme = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    for language, text in readme:
        if language == "python" and "ReID.load" in text:
            assert run_python(text, tmp_path)
