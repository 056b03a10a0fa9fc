"""What one module may know of another: which way imports go, and no private names.

A private module (``_checks``) belongs to its package, of which the contract in pyproject.toml
speaks; here it is about names in modules.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"dhcl": ROOT / "python" / "dhcl", "dhcl_ops": ROOT / "dhcl_ops"}


def modules():
    """The file of every module, by its full name."""
    found = {}
    for name, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = modules()


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def bound(tree):
    """Names that stand for our modules in a file, and private names it imports from them."""
    names, private = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                top = each.name.split(".")[0]
                if top in PACKAGES:
                    names[each.asname or top] = each.name if each.asname else top
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                if whole in MODULES:
                    names[each.asname or each.name] = whole
                elif is_private(each.name):
                    private.append((node.lineno, whole))
    return names, private


def path_of(node, names):
    """The dotted name behind ``a.b.c`` where ``a`` stands for one of our modules, else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        before = path_of(node.value, names)
        return before and f"{before}.{node.attr}"
    return None


def intrusions(code):
    """Uses of other modules' private names in a file: line and name."""
    tree = ast.parse(code)
    names, found = bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = path_of(node.value, names)
            if owner in MODULES and f"{owner}.{node.attr}" not in MODULES:
                found.append((node.lineno, f"{owner}.{node.attr}"))
    return sorted(found)


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module_is_used(module):
    assert not intrusions(MODULES[module].read_text())


def test_uses_of_private_names_would_be_found():
    code = """
import dhcl.data.lists, dhcl_ops.knn as near
from dhcl.models import weights
from dhcl_ops import _checks
from dhcl_ops.memory import _update, prototypes

def f(model):
    _checks.check(model._grid, weights._some, near.knn, near.__name__)
    return dhcl.data.lists._secret
"""
    assert [name for _, name in intrusions(code)] == [
        "dhcl_ops.memory._update",
        "dhcl.models.weights._some",
        "dhcl.data.lists._secret",
    ]


def test_imports_go_the_way_the_contracts_say():
    pytest.importorskip("importlinter", reason="the extra dev is not installed")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout
