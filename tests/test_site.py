"""The site is built strictly, is complete, and needs nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dhcl_ops
import dhcl_ops.compat

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("material", "mkdocs", "mkdocstrings", "tyro")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; its folder."""
    folder = tmp_path_factory.mktemp("site")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr[-4000:]
    return folder


class Page(HTMLParser):
    """What a page loads, and the ids it has."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag != "a":
            kept = [given.get(name) for name in ("src", "srcset", "href", "data", "poster")]
            self.loads += [value for value in kept if value]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")


def is_elsewhere(address):
    return re.match(r"['\"]?(https?:)?//", address.strip()) is not None


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        text = path.read_text()
        page = Page(text)
        assert page.loads, path
        assert not [each for each in page.loads if is_elsewhere(each)], path
        # Material's script fetches Mermaid for such blocks, and only then.
        assert 'class="mermaid"' not in text, path
    for path in site.rglob("*.css"):
        text = path.read_text()
        addresses = re.findall(r"url\(([^)]*)\)|@import\s+([^;]+)", text)
        assert not [a for pair in addresses for a in pair if a and is_elsewhere(a)], path


def test_what_is_from_elsewhere_would_be_found():
    text = '<script src="https://a/b.js"></script><link href="//c/d.css"><a href="https://e">f</a>'
    assert [each for each in Page(text).loads if is_elsewhere(each)] == [
        "https://a/b.js",
        "//c/d.css",
    ]


def test_every_public_op_is_described(site):
    ids = Page((site / "reference" / "ops.html").read_text()).ids
    for name in set(dhcl_ops.__all__) - {"__version__"}:
        # The function knn hides the module it is in.
        assert {f"dhcl_ops.{name}", f"dhcl_ops.{name}.{name}"} & ids, name
    ids = Page((site / "reference" / "compat.html").read_text()).ids
    assert {f"dhcl_ops.compat.{name}" for name in dhcl_ops.compat.__all__} <= ids


def test_no_markup_of_docstrings_shows(site):
    for path in (site / "reference").glob("*.html"):
        assert not re.search(r":(class|func|meth|data|exc|mod|attr):", path.read_text()), path


def test_lists_and_rules_are_not_lost_in_markdown(site):
    text = (site / "method.html").read_text()
    assert not re.search(r"[.:;,)] - <strong>", text)
    for name in ("ops", "compat", "trainer"):
        text = (site / "reference" / f"{name}.html").read_text()
        assert "<blockquote>" not in text
        assert "``" not in text


def test_every_option_is_described(site):
    from dhcl.config import OPTIONS, PRESETS, SECTIONS

    text = (site / "reference" / "configuration.html").read_text()
    for name in OPTIONS:
        [row] = re.findall(rf"<tr>\s*<td><code>{name}</code></td>(.*?)</tr>", text, re.DOTALL)
        cells = re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        assert len(cells) == 3, name
        assert all(cells), name
        for preset, changes in PRESETS.items():
            told = f"<code>{preset}</code>: <code>{str(changes.get(name)).lower()}</code>"
            assert (told in cells[1]) == (name in changes), (name, preset)
    for section in ("run", *SECTIONS):
        assert f'<h2 id="{section}">' in text


def test_every_command_is_described(site):
    from dhcl.cli.table import COMMANDS

    text = (site / "reference" / "commands.html").read_text()
    for name in COMMANDS:
        assert f'id="dhcl-{name}"' in text
    assert "--samples-per-bn" in text


def test_every_picture_is_there_and_the_benchmarks_are_filled_in(site):
    for name in ("beta", "kappa", "clamp"):
        assert f'src="figures/{name}.svg"' in (site / "method.html").read_text()
        assert (site / "figures" / f"{name}.svg").exists()
    text = (site / "benchmarks.html").read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        assert f"{path.stem}, {path.parent.name}" in text
    assert "<!-- generated" not in text
