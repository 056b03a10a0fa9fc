"""What wheel and sdist carry, and that what they install works."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

from dhcl_ops import _build
from tests.build.test_build import (  # noqa: F401
    PROBE,
    ROOT,
    environment,
    keep_one_family,
    lines_of,
    memory_ops,
    pytestmark,
)

PROJECT = ("csrc", "dhcl_ops", "python", "benchmarks", "docs", "scripts", "tests", ".ci")
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"),
    *("CONTRIBUTING.md", ".clang-format", ".pre-commit-config.yaml"),
)


def run(command, cwd, **changes):
    env = environment(cwd, **changes)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("_prebuilt*", "__pycache__", ".build")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    keep_one_family(folder)
    return folder


@pytest.fixture(scope="module")
def sdist(project):
    code = "import setuptools.build_meta as b; print(b.build_sdist('made'))"
    name = run([sys.executable, "-c", code], project).stdout.splitlines()[-1]
    return project / "made" / name


def wheel_of(folder, **changes):
    command = [sys.executable, "-m", "pip", "wheel", ".", "-q", "-w", "wheels"]
    run([*command, "--no-deps", "--no-build-isolation"], folder, **changes)
    [wheel] = (folder / "wheels").glob("*.whl")
    return wheel


def install(wheel, target):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def kernel_files():
    folder = ROOT / "csrc"
    return {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in {".cpp", ".cu", ".h"}
    }


def test_sdist_carries_sources_tests_and_benchmarks(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"csrc/{name}" for name in kernel_files()} <= names
    for name in (
        "LICENSE",
        "tests/ops/test_memory.py",
        "benchmarks/memory.py",
        "scripts/gpu_day.sh",
        "dhcl_ops/py.typed",
    ):
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]


@pytest.fixture(scope="module")
def plain_wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("from_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [unpacked] = folder.iterdir()
    # An isolated build has no torch; importing it here would be the mistake.
    return wheel_of(unpacked, DHCL_BUILD=None)


def test_wheel_from_the_sdist_carries_the_kernel_sources(plain_wheel, tmp_path):
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    site = install(plain_wheel, tmp_path / "site")
    found = {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file()}
    assert {f"dhcl_ops/csrc/{name}" for name in kernel_files()} <= found
    assert {"dhcl_ops/py.typed", "dhcl/py.typed"} <= found
    # The list of packages in pyproject.toml is kept by hand.
    for folder in (ROOT, ROOT / "python"):
        for package in ("dhcl_ops", "dhcl"):
            modules = (folder / package).rglob("*.py")
            assert {str(path.relative_to(folder)) for path in modules} <= found
    assert not [name for name in found if name.startswith(("tests", "benchmarks"))]


def probe_installed(site, cwd, **changes):
    done = run([sys.executable, "-c", PROBE], cwd, PYTHONPATH=site, **changes)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_an_installed_wheel_builds_its_kernels(plain_wheel, tmp_path):
    site = install(plain_wheel, tmp_path / "site")
    report, err = probe_installed(site, tmp_path)
    assert report["how"] == "built"
    assert "building" in lines_of(err)[0]


def test_setup_does_not_import_torch(project):
    code = "import sys; sys.modules['torch'] = None; import setuptools.build_meta as b; "
    code += "print(b.get_requires_for_build_wheel())"
    run([sys.executable, "-c", code], project, DHCL_BUILD=None)


def test_aot_without_torch_says_what_to_do(project):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; "
    code += "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': '__main__'})"
    env = environment(project, DHCL_BUILD="aot")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "install torch, ninja and" in done.stderr


@pytest.fixture(scope="module")
def aot_wheel(project):
    return wheel_of(project, DHCL_BUILD="aot")


def test_ahead_of_time_wheel(aot_wheel, tmp_path):
    assert "-cp310-abi3-linux" in aot_wheel.name
    site = install(aot_wheel, tmp_path / "site")
    report, err = probe_installed(site, tmp_path, CXX="no-such-compiler")
    assert report["how"] == "prebuilt"
    assert report["path"] == str(site / "dhcl_ops" / "_prebuilt.so")
    assert lines_of(err) == []
    nvcc = _build.find_nvcc()
    cuda = torch.version.cuda
    same = nvcc is not None and cuda and nvcc.release.split(".")[0] == cuda.split(".")[0]
    assert report["cuda"] == bool(same)
    for op in memory_ops(report).values():
        assert op["cpu"]["why"] == "prebuilt"
        assert op["check on cpu"] == "same bits as the reference"
    # The wheel's library was made for any x86-64; a build on this machine is asked for by name.
    assert "-march=native" not in _build.cxx_flags(cuda=False, native=False)


def test_a_prebuilt_library_of_other_sources_is_not_taken(aot_wheel, tmp_path):
    site = install(aot_wheel, tmp_path / "site")
    header = site / "dhcl_ops" / "csrc" / "memory.h"
    header.write_text(header.read_text() + "// changed\n")
    report, _ = probe_installed(site, tmp_path, DHCL_BUILD="aot")
    assert report["how"] == "reference"
    assert "was made from other sources" in report["line"]


def test_a_prebuilt_library_that_does_not_load_is_passed_over(aot_wheel, tmp_path):
    site = install(aot_wheel, tmp_path / "site")
    library = site / "dhcl_ops" / "_prebuilt.so"
    library.write_bytes(b"not a library")
    report, _ = probe_installed(site, tmp_path, DHCL_BUILD="aot")
    assert report["how"] == "reference"
    assert "does not load here" in report["line"]
