"""What the Dockerfile names is there. No Docker is needed, and none is run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def instructions():
    """The instructions in order, continued lines joined, as (name, value)."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", TEXT))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_instructions_are_known_and_in_a_possible_order():
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    names = [name for name, _ in instructions()]
    assert set(names) <= known
    assert names[:2] == ["ARG", "FROM"]
    assert names.count("ENTRYPOINT") == 1


def test_arguments_are_declared_before_they_are_used():
    declared = {"PATH"}
    for name, value in instructions():
        assert {*re.findall(r"\$\{(\w+)\}", value)} <= declared, value
        if name == "ARG":
            declared.add(value.split("=")[0])


def test_extras_exist_and_stages_are_of_this_file():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    [asked] = re.findall(r'"\.\[([\w,]+)\]"', TEXT)
    assert set(asked.split(",")) <= set(extras)
    # What an isolated build would have installed.
    for each in project["build-system"]["requires"]:
        assert f'"{each}"' in TEXT
    stages = re.findall(r"(?m)^FROM .* AS (\w+)$", TEXT)
    assert re.findall(r"--from=(\w+)", TEXT) == stages


def test_nothing_that_is_installed_is_left_out_of_the_context():
    left_out = (ROOT / ".dockerignore").read_text().split("\n")
    for needed in ("csrc", "dhcl_ops", "python", "setup.py", "pyproject.toml", "README.md"):
        assert (ROOT / needed).exists()
        assert needed not in left_out
