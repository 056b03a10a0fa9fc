"""What a command imports before it does anything, and for work on saved features.

Seconds are not measured: each of these libraries costs a tenth of a second to several of them, so
which of them are imported decides how fast a command starts.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from dhcl.cli.table import COMMANDS

HEAVY = {
    *("torch", "torch._dynamo", "torch._inductor", "torchvision", "timm", "accelerate"),
    *("sklearn", "scipy", "plotly", "tensorboard", "matplotlib", "pandas", "onnx", "onnxruntime"),
    *("tyro", "pydantic", "PIL", "jinja2", "fastapi", "uvicorn", "lance", "pyarrow"),
}
OPTIONS = {"tyro"}
SETTINGS = {*OPTIONS, "pydantic"}
# The defaults in these helps are those of the ops, which come with torch.
OPS = {*OPTIONS, "torch"}

HELP = {
    "train": SETTINGS,
    "eval": OPTIONS,
    "export": OPTIONS,
    "index": OPTIONS,
    "search": OPTIONS,
    "serve": OPTIONS,
    "crops": OPTIONS,
    "cluster": OPS,
    "rerank": OPS,
    "metrics": OPS,
    "synth": {*OPS, "PIL", "pydantic"},
    "demo": {*OPS, "PIL", "pydantic"},
    "pretrain": {*OPS, "PIL", "pydantic"},
    "report": OPTIONS,
    "compare": OPTIONS,
    "doctor": {"torch"},
}

PROGRAM = """
import sys
from dhcl.cli import main
status = main(sys.argv[2:])
print("imported", *sorted(set(sys.argv[1].split()) & sys.modules.keys()))
sys.exit(status)
"""


def imported(*words):
    """Which heavy modules a command imports, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(HEAVY), *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {*done.stdout.splitlines()[-1].split()[1:]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of features of 40 images of 10 people."""
    noise = np.random.default_rng(1)
    ids = np.arange(10).repeat(4)
    features = noise.normal(size=(10, 32))[ids] + 0.3 * noise.normal(size=(40, 32))
    path = tmp_path_factory.mktemp("saved") / "features.npz"
    np.savez(path, features=features.astype(np.float32), ids=ids, cameras=np.arange(40) % 2)
    return path


def test_the_list_of_commands_needs_no_library():
    assert imported("--help") == set()
    assert {*HELP} == {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_what_options_need_and_nothing_that_works(name):
    assert imported(name, "--help") <= HELP[name]


def test_the_demo_has_threads_that_wait_without_spinning():
    """Said before torch is imported, as OpenMP reads it when it is loaded."""
    code = (
        "import os, sys; from dhcl.cli import main; assert 'torch' not in sys.modules; "
        "main(['demo', '--help']); assert 'torch' in sys.modules; "
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    unset = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**unset, **given}
        )
        assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize("name", ["cluster", "rerank", "metrics"])
def test_commands_on_saved_features_need_the_ops_alone(name, saved, tmp_path):
    pair = ["--query", saved, "--gallery", saved]
    words = {
        "cluster": [saved, "--out", tmp_path / "labels.csv", "--k1", "8", "--k2", "3"],
        "rerank": [*pair, "--out", tmp_path / "lists.npz"],
        "metrics": [*pair, "--rerank"],
    }
    assert imported(name, *words[name]) <= OPS
