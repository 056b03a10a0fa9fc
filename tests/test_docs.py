"""The code blocks of README and docs run, and their shell commands name things that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    # tests/dhcl/test_use.py runs what needs a trained model.
    if page.name != "use.md" and "ReID.load" not in text
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:csrc|dhcl_ops|tests|benchmarks|docs|python)/[\w./]+)`", text):
        # Words such as csrc/family.h stand for any family.
        if "family" not in path and not path.startswith("dhcl_ops/csrc"):
            assert (ROOT / path.rstrip(".")).exists(), f"{page.name} names {path}"


def test_ci_calls_the_test_command_of_the_readme():
    [command] = re.findall(r"tests:\n\n```bash\n(.*?)\n```", (ROOT / "README.md").read_text())
    assert command in (ROOT / ".ci" / "run").read_text()
