"""What MkDocs does to the pages: it fills in what is generated, and takes pages from the root.

A line ``<!-- generated: NAME -->`` becomes the table or text of that name. The pages must read well
on GitHub too, so they hold no generated text, and links go to files of the repository.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages that lie beside docs/, and where links to them go.
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PLACES = {**FROM_ROOT, "README.md": "index.md"}


# ---- options of a run ---------------------------------------------------------------------------


def options() -> str:
    """The options of ``TrainConfig``: a table for the run itself, and one for each section."""
    from dhcl.config import SECTIONS, TrainConfig

    tables = [_section(name, kind) for name, kind in {"": TrainConfig, **SECTIONS}.items()]
    return "\n".join(itertools.chain(*tables))


def _section(section: str, kind: type) -> Iterator[str]:
    """The lines of a section's heading and table."""
    from dhcl.config import OPTIONS, PRESETS

    hints = typing.get_type_hints(kind)
    texts = _documented(kind)
    yield from (
        "",
        f"## {(section or 'run').capitalize()}",
        "",
        str(kind.__doc__).splitlines()[0],
        "",
    )
    yield from ("| option | type | default | what it does |", "|---|---|---|---|")
    for field in dataclasses.fields(kind):
        name = field.name
        if OPTIONS.get(name) != section:  # a section of the run
            continue
        others = [
            f"`{preset}`: `{_value(changes[name])}`"
            for preset, changes in PRESETS.items()
            if name in changes
        ]
        default = "<br>".join([f"`{_value(field.default)}`", *others])
        typed = _kind(hints[name]).replace("|", "\\|")
        yield f"| `{name}` | {typed} | {default} | {_cell(texts[name])} |"


def _documented(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass."""
    found: dict[str, str] = {}
    [body] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = ast.unparse(field.target)
            found[name] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _kind(hint: Any) -> str:
    """A type as someone who writes YAML would say it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{_value(each)}`" for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is ...:
        return f"list of {_kind(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is tuple:
        inner = [_kind(each) for each in typing.get_args(hint)]
        return " ".join(inner)
    if typing.get_args(hint):
        return " or ".join(_kind(each) for each in typing.get_args(hint))
    plain = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return plain.get(hint, "`null`" if hint is type(None) else str(hint))


def _value(value: Any) -> str:
    """A value as in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- commands -----------------------------------------------------------------------------------


def commands() -> str:
    """What every command says to ``--help``."""
    from dhcl.cli.table import COMMANDS

    blocks = [f"```text\n{_help([])}\n```"]
    for name, command in COMMANDS.items():
        what = command.what.capitalize()
        blocks.append(f"## dhcl {name}\n\n{what}.\n\n```text\n{_help([name])}\n```")
    return "\n\n".join(blocks)


def _help(command: list[str]) -> str:
    from dhcl.cli import main

    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb"}),
        contextlib.redirect_stdout(said),
    ):
        try:
            status = main([*command, "--help"])
        except SystemExit as done:  # argparse's; it would end the build as if all were well
            status = int(done.code or 0)
    if status:
        raise RuntimeError(f"dhcl {' '.join(command)} --help failed with status {status}")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
    # Whoever builds the site has no say in the text: defaults that depend on the machine.
    return plain.replace(str(Path.home()), "~").rstrip()


# ---- benchmarks ---------------------------------------------------------------------------------


_NONE = "\N{EN DASH}"


def benchmarks() -> str:
    """Every committed measurement, a table per machine and file."""
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        stored = json.loads(path.read_text())
        machine = stored["machine"]
        command = re.sub(r" --json \S+", "", " ".join(machine["command"]))
        lines += [
            "",
            f"## {path.stem}, {path.parent.name}",
            "",
            f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
            f"`{machine['git_commit'][:7]}`, {machine['date'][:10]}: `{command}`",
            "",
            "| case | variant | seconds | times as fast | peak, MiB |",
            "|---|---|---:|---:|---:|",
        ]
        for row in stored["rows"]:
            case = ", ".join(f"{name} = {value}" for name, value in row["params"].items())
            peak, faster = row["peak_extra_bytes"], row["speedup"]
            cells = [
                f"{row['op']}: {case}",
                row["variant"],
                f"{row['seconds']:.3g}",
                _NONE if faster is None else f"{faster:.3g}",
                _NONE if peak is None else f"{peak / 2**20:.1f}",
            ]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "options": options,
    "commands": commands,
    "benchmarks": benchmarks,
}


# ---- MkDocs -------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Refuse to go on without the trainer, whose options and commands are documented."""
    if importlib.util.find_spec("tyro") is None or importlib.util.find_spec("dhcl") is None:
        raise SystemExit("mkdocs: the site needs the extra docs: pip install -e '.[docs]'")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie in the root."""
    for source, target in FROM_ROOT.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill in, and adapt what GitHub's Markdown takes and Python-Markdown does not."""
    depth = page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        target = PLACES.get(match[1])
        return match[0] if target is None else f"]({'../' * depth}{target}{match[2] or ''})"

    markdown = re.sub(r"\]\((?:\.\./)+([\w.]+)(#[\w-]+)?\)", link, markdown)
    markdown = "\n".join(_indented(markdown.splitlines()))
    return re.sub(r"<!-- generated: (\w+) -->", lambda m: GENERATED[m[1]](), markdown)


def _indented(lines: list[str]) -> Iterator[str]:
    """Paragraphs of list items by four spaces instead of two or three, and a line after them."""
    fenced = own_paragraph = False
    before = ""
    for line in lines:
        fenced ^= line.lstrip().startswith("```")
        if not fenced:
            line = re.sub(r"^ {2,3}(?=\S)", "    ", line)
            if line.startswith("    ") and not before:
                own_paragraph = True
            elif own_paragraph and re.match(r"- |\d+\. ", line):
                yield ""
            own_paragraph &= line.startswith("    ")
        yield line
        before = line
