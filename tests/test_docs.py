"""Every code block of README and docs runs, or is parsed where a comment says why it can't run.

A page is tried from top to bottom in an empty folder: its Python blocks in one namespace, its
commands one by one. ``<!-- not run: REASON -->`` before a block leaves it out of that. ``dhcl``
commands are parsed by their real parsers in any case, and run with the options of ``SMALL``.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

pytest.importorskip("tyro", reason="the extra train is not installed")
import tyro
from dhcl.cli.table import COMMANDS, usage
from dhcl.cli.train import train_options
from dhcl.config import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

# Words put after those of a page, so that a command takes seconds. What comes last counts.
SMALL = {
    "synth": "--ids 8 --cameras 2 --images-per-camera 3 --workers 1",
    "train": "--epochs 1 --iterations 2 --workers 0 --k1 8 --k2 3 --min-samples 2 "
    "--classes-per-batch 4 --device cpu --warmup-epochs 0 --lr-step 1",
    "eval": "--workers 0",
    "doctor": "--no-build",
}
RESUMED = "--workers 0 --epochs 1"
SHELL = ("bash", "sh", "console")
OUTPUT = ("text",)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    reason: str  # why it is not run, or nothing

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def commands(self):
        """Lines of a shell block without comments, continued ones joined, as lists of words."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        return [part.strip() for line in found for part in line.split("&&")]


FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>.*)\n"
    r"(?P<code>(?:.*\n)*?)(?P=indent)(?P=fence) *$",
    re.MULTILINE,
)
REASON = re.compile(r"<!-- not run: (.+) -->\s*\Z")


def blocks_of(text, page):
    found = []
    for match in FENCE.finditer(text):
        language = (match["info"].split() or [""])[0]
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        reason = REASON.search(text[: match.start()])
        line = text[: match.start("code")].count("\n")
        found.append(Block(page, line, language, code, reason[1] if reason else ""))
    return found


BLOCKS = [
    block
    for page, name in zip(PAGES, NAMES, strict=True)
    for block in blocks_of(page.read_text(), name)
]


def words_of(command):
    """A ``dhcl`` command as words after ``dhcl``, or None if it is another command."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "torchrun" and "dhcl" in words:
        return [word for word in words[words.index("dhcl") + 1 :] if word != "…"]
    if len(words) > 2 and Path(words[0]).name.startswith("python") and words[1:3] == ["-m", "dhcl"]:
        return words[3:]
    if words and Path(words[0]).name == "dhcl":
        return [word for word in words[1:] if word != "…"]
    return None


DHCL = [
    pytest.param(words, id=f"{block}-{words[0] if words else ''}")
    for block in BLOCKS
    if block.language in SHELL
    for words in map(words_of, block.commands)
    if words is not None
]


class Parsed(Exception):
    pass


def parse(words, monkeypatch):
    """Have the command's own parser read the words, and nothing more happen."""
    real = tyro.cli

    def only_parse(kind, *args, return_unknown_args=False, **options):
        if return_unknown_args:  # a first look at files that need not be here
            return kind(), []
        real(kind, *args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_parse)
    if words[0] == "doctor":
        assert not words[1:], "doctor is shown without options"
        return
    assert words[0] in COMMANDS, f"there is no command {words[0]}"
    with pytest.raises(Parsed):
        COMMANDS[words[0]](words[0], words[1:])
    monkeypatch.setattr(tyro, "cli", real)
    if words[0] == "train" and not {"--resume", "--config"} & {*words}:
        train_options(words[1:])  # options that contradict each other


def test_every_block_is_of_a_kind_that_is_checked():
    known = {"python", "yaml", "json", *SHELL, *OUTPUT}
    assert not [f"{b}: {b.language!r}" for b in BLOCKS if b.language not in known]
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", p.read_text(), re.MULTILINE)) for p in PAGES)
    assert fences == 2 * len(BLOCKS), "a fence has no end"


@pytest.mark.parametrize("words", DHCL)
def test_commands_have_these_options(words, monkeypatch):
    parse(words, monkeypatch)


@pytest.mark.parametrize(
    "wrong", ["train --root x --kapa 1", "eval", "synth", "synth x --id 3", "demo --seeds many"]
)
def test_wrong_commands_would_be_found(wrong, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(wrong.split(), monkeypatch)


def test_blocks_are_found_with_their_language_and_reason():
    first = "a\n<!-- not run: slow -->\n```bash\ndhcl demo \\\n  --ids 4 # x\n# y\n```\n"
    text = f"{first}  ```rust\n  x\n  ```\n"
    shell, other = blocks_of(text, "p")
    assert (shell.reason, shell.line) == ("slow", 3)
    assert [words_of(c) for c in shell.commands] == [["demo", "--ids", "4"]]
    assert (other.language, other.code, other.reason) == ("rust", "x\n", "")
    assert words_of("torchrun -n 4 -m dhcl train …") == ["train"]
    assert words_of("python -m benchmarks.knn") is None


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "json")], ids=str)
def test_data_blocks_are_read(block, tmp_path):
    if block.language == "json":
        json.loads(block.code)
        return
    content = yaml.safe_load(block.code)
    if {*content} & {*OPTIONS}:
        (tmp_path / "run.yaml").write_text(block.code)
        train_options(["--config", str(tmp_path / "run.yaml")])


def small(words):
    """The words of a command with those that make it small."""
    if words[0] == "train" and "--resume" in words:
        return [*words, *RESUMED.split()]
    if words[0] == "train" and "--backbone" not in words:
        raise AssertionError(f"too large to run, mark it: dhcl {shlex.join(words)}")
    return [*words, *SMALL.get(words[0], "").split()]


def program(blocks):
    """A Python program that does what a page says."""
    lines = ["import subprocess", "from dhcl.cli import main", "page = {'__name__': 'page'}"]
    for block in blocks:
        if block.reason or block.language not in ("python", *SHELL):
            continue
        lines.append(f"print({str(block)!r}, flush=True)")
        if block.language == "python":
            lines.append(f"exec(compile({block.code!r}, {str(block)!r}, 'exec'), page)")
            continue
        for command in block.commands:
            words = words_of(command)
            if words is None:
                lines.append(f"subprocess.run(['bash', '-ec', {command!r}], check=True)")
            else:
                lines.append(f"assert main({small(words)!r}) == 0, {command!r}")
    return "\n".join(lines)


RUN = {
    name: [
        b for b in BLOCKS if b.page == name and not b.reason and b.language in ("python", *SHELL)
    ]
    for name in NAMES
    if name != "docs/use.md"  # tests/dhcl/test_use.py runs it
}


@pytest.mark.parametrize("page", [name for name, blocks in RUN.items() if blocks])
def test_blocks_run_in_order(page, tmp_path):
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", program(RUN[page])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:csrc|dhcl_ops|tests|benchmarks|docs|python)/[\w./]+)`", text):
        # Words such as csrc/family.h stand for any family.
        if "family" not in path and not path.startswith("dhcl_ops/csrc"):
            assert (ROOT / path.rstrip(".")).exists(), f"{page.name} names {path}"


def test_modules_of_marked_commands_exist():
    for block in BLOCKS:
        for module in re.findall(r"python3? -m (benchmarks\.\w+|dhcl_ops)", block.code):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{block}: {module}"


def test_ci_calls_the_test_command_of_the_readme():
    [command] = re.findall(
        r"tests:\n\n(?:<!-- .* -->\n)?```bash\n(.*?)\n```", (ROOT / "README.md").read_text()
    )
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_usage_lists_the_commands_that_exist():
    for name, command in COMMANDS.items():
        assert f"  {name:<10}{command.what}\n" in usage()
        assert callable(command.load())
