"""Build on the fly, in each situation a user may be in, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dhcl_ops import _build

ROOT = _build.source_dir().parent
pytestmark = pytest.mark.skipif(
    _build.find_compiler() is None or not (ROOT / "pyproject.toml").is_file(),
    reason="needs a C++ compiler and a checkout",
)

# One op, then what ran it, as JSON. The result proves that the op works whatever runs it.
PROBE = """
import json, sys, time
import torch
import dhcl_ops
from dhcl_ops import doctor
bank = torch.eye(3, 4)
dhcl_ops.momentum_update_(bank, torch.ones(2, 4), torch.tensor([1, 1]), 0.5)
assert abs(bank[1].norm() - 1) < 1e-6 and bank[0, 0] == 1
report = doctor.examine()
print(json.dumps({**report["library"], "ops": report["ops"], "versions": report["versions"]}))
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the sources that tests may break, cut down to one family, which compiles fast."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "dhcl_ops"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_prebuilt*"))
    keep_one_family(folder)
    return folder


def keep_one_family(folder):
    build = folder / "dhcl_ops" / "_build.py"
    text = build.read_text()
    every = 'source_dir().glob("*.cu")'
    assert every in text
    build.write_text(text.replace(every, 'source_dir().glob("memory.cu")'))


def memory_ops(report):
    return {name: op for name, op in report["ops"].items() if "momentum" in name or "seg" in name}


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Built into once, for the tests that only read it."""
    return tmp_path_factory.mktemp("shared_cache")


def environment(cache, **changes):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DHCL_") and name not in {"TORCH_CUDA_ARCH_LIST", "PYTHONPATH"}
    }
    clean["DHCL_CACHE"] = str(cache)
    if torch.version.cuda and not torch.cuda.is_available():
        # One architecture is enough to see that the CUDA half is built; the default is tested once.
        clean["TORCH_CUDA_ARCH_LIST"] = "9.0"
    for name, value in changes.items():
        if value is None:
            clean.pop(name, None)
        else:
            clean[name] = str(value)
    return clean


def start(checkout, env, code=PROBE):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def probe(checkout, env, code=PROBE):
    """Run the probe; returns (its report, what it said on stderr)."""
    process = start(checkout, env, code)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def lines_of(err):
    return [line for line in err.splitlines() if line.startswith("dhcl_ops:")]


def libraries(cache):
    return sorted(Path(cache).rglob("*.so"))


def test_builds_once_then_finds_it(checkout, shared_cache):
    env = environment(shared_cache)
    first, err = probe(checkout, env)
    assert first["how"] == "built"
    [line] = lines_of(err)
    assert "building the C++" in line
    assert str(shared_cache) in line
    [library] = libraries(shared_cache)
    modified = library.stat().st_mtime_ns
    second, err = probe(checkout, env)
    assert second["how"] == "built"
    assert second["path"] == first["path"] == str(library)
    assert lines_of(err) == []
    assert library.stat().st_mtime_ns == modified
    assert len(memory_ops(second)) == 4
    for op in memory_ops(second).values():
        assert op["cpu"]["runs"] == "csrc/memory.cpp"
        assert op["check on cpu"] == "same bits as the reference"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
def test_builds_the_cuda_half_without_a_gpu(checkout, shared_cache):
    report, _ = probe(checkout, environment(shared_cache))
    nvcc = _build.find_nvcc()
    if nvcc is None:
        assert not report["cuda"]
        assert "no nvcc" in report["line"]
        pytest.skip("no nvcc")
    if nvcc.release.split(".")[0] != torch.version.cuda.split(".")[0]:
        assert not report["cuda"]
        assert f"nvcc {nvcc.release}" in report["line"]
        pytest.skip("nvcc of another major version than torch's CUDA")
    assert report["cuda"]
    assert report["ops"]["momentum_update_"]["cuda"]["runs"] == "csrc/memory.cu"
    assert report["ops"]["class_csr"]["cuda"]["runs"] == "PyTorch (torch.sort)"


def test_default_architectures_without_a_gpu(checkout, tmp_path):
    """torch's own default fails without a visible GPU."""
    code = "from dhcl_ops import _build; import json; print(json.dumps(_build.plan().describe()))"
    plan, _ = probe(checkout, environment(tmp_path, TORCH_CUDA_ARCH_LIST=None), code)
    if plan["nvcc"] is None:
        assert plan["architectures"] == ""
    elif torch.cuda.is_available():
        assert plan["architectures"].endswith("+PTX")
    else:
        assert plan["architectures"] in {"8.0;9.0;10.0+PTX", "8.0;9.0+PTX"}


def test_cpu_build_of_torch(checkout, tmp_path):
    """Builds the C++ half only, and says why."""
    code = "import torch; torch.version.cuda = None; torch.version.hip = None\n" + PROBE
    report, _ = probe(checkout, environment(tmp_path), code)
    assert report["how"] == "built"
    assert not report["cuda"]
    assert f"torch {torch.__version__} is a CPU build" in report["line"]
    assert report["ops"]["momentum_update_"]["cpu"]["runs"] == "csrc/memory.cpp"
    assert report["ops"]["momentum_update_"]["cuda"]["runs"] == "PyTorch reference"


def test_no_compiler(checkout, tmp_path):
    report, err = probe(checkout, environment(tmp_path, CXX="no-such-compiler"))
    assert report["how"] == "reference"
    [line] = lines_of(err)
    assert "'no-such-compiler' does not run" in line
    assert "install g++" in line
    assert libraries(tmp_path) == []
    alone = [op["cpu"] for op in report["ops"].values() if "of its own" not in op["cpu"]["why"]]
    assert len(alone) > 10
    for op in alone:
        assert op["runs"] == "PyTorch reference"
        assert "no C++ compiler" in op["why"]


def test_no_ninja(checkout, tmp_path):
    code = "from dhcl_ops import _build; _build._ninja_folder = lambda: None\n" + PROBE
    report, err = probe(checkout, environment(tmp_path), code)
    assert report["how"] == "reference"
    assert "ninja is missing; pip install ninja" in lines_of(err)[0]


def test_ninja_of_an_environment_that_is_not_activated(checkout, shared_cache):
    """The usual `venv/bin/python script.py`: ninja is installed, but not on PATH."""
    env = environment(shared_cache, PATH="/usr/bin:/bin")
    env.pop("VIRTUAL_ENV", None)
    code = "from dhcl_ops import _build; import json; print(json.dumps(_build._ninja_folder()))"
    assert probe(checkout, env, code)[0] is not None


def test_wrapper_script_of_nvcc(tmp_path, monkeypatch):
    """A root guessed from where a wrapper lies has no headers; nvcc itself knows better."""
    real = _build.find_nvcc()
    if real is None:
        pytest.skip("no nvcc")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real.home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = _build.find_nvcc()
    assert Path(found.home).resolve() == Path(real.home).resolve()
    assert "which says so" in found.found_by


def test_off_and_aot_never_build(checkout, tmp_path):
    off, err = probe(checkout, environment(tmp_path, DHCL_BUILD="off"))
    assert off["how"] == "reference"
    assert off["reason"] == "DHCL_BUILD=off"
    assert lines_of(err) == []
    aot, err = probe(checkout, environment(tmp_path, DHCL_BUILD="aot"))
    assert aot["how"] == "reference"
    assert "no prebuilt library in this installation" in lines_of(err)[0]
    assert libraries(tmp_path) == []


def test_unknown_mode(checkout, tmp_path):
    process = start(checkout, environment(tmp_path, DHCL_BUILD="ahead"))
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "DHCL_BUILD must be one of auto, aot, jit, off (got 'ahead')" in err


def test_killed_half_way_and_retried(checkout, tmp_path):
    env = environment(tmp_path)
    process = start(checkout, env)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("build.ninja")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # torch's own lock file is left behind, and would hang the next build for ever.
    assert list(tmp_path.rglob("lock"))
    assert libraries(tmp_path) == []
    report, err = probe(checkout, env)
    assert report["how"] == "built"
    assert "building" in lines_of(err)[0]


def test_killed_compiler_then_damaged_library(checkout, tmp_path):
    """A compiler that is killed once is no failure for good; a library cut short is not loaded."""
    marker, wrapper = tmp_path / "kill me", tmp_path / "compiler"
    marker.touch()
    wrapper.write_text(
        "#!/bin/sh\n"
        # Not where torch or we ask for the version.
        f'case "$*" in *.cpp*) [ -e "{marker}" ] && rm "{marker}" && kill -9 $$;; esac\n'
        'exec c++ "$@"\n'
    )
    wrapper.chmod(0o755)
    cache = tmp_path / "cache"
    env = environment(cache, CXX=wrapper, DHCL_CUDA="off")
    report, err = probe(checkout, env)
    assert report["how"] == "reference"
    assert "the compiler was stopped" in lines_of(err)[-1]
    assert "the next start tries again" in lines_of(err)[-1]
    report, err = probe(checkout, env)
    assert report["how"] == "built"
    [library] = libraries(cache)
    whole = library.stat().st_size
    os.truncate(library, whole // 2)
    report, err = probe(checkout, env)
    assert report["how"] == "built"
    assert "is not as it was built: it is built again" in lines_of(err)[0]
    assert library.stat().st_size == whole


def test_two_processes_at_once(checkout, tmp_path):
    env = environment(tmp_path)
    processes = [start(checkout, env) for _ in range(2)]
    said = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["how"] == "built"
        said += lines_of(err)
    assert len(libraries(tmp_path)) == 1
    assert sum("building" in line for line in said) == 1


def test_sources_changed(checkout, shared_cache, tmp_path):
    code = "from dhcl_ops import _build; import json; print(json.dumps(_build.plan().key))"
    env = environment(shared_cache)
    before, _ = probe(checkout, env, code)
    changed = tmp_path / "changed"
    shutil.copytree(checkout, changed)
    header = changed / "csrc" / "memory.h"
    header.write_text(header.read_text() + "// another line\n")
    after, _ = probe(changed, env, code)
    assert after != before


def test_torch_upgraded(checkout, shared_cache):
    code = "from dhcl_ops import _build; import json; print(json.dumps(_build.plan().key))"
    env = environment(shared_cache)
    before, _ = probe(checkout, env, code)
    upgraded = "import torch; torch.__version__ = torch.__version__ + '.post1'\n" + code
    assert probe(checkout, env, upgraded)[0] != before
    moved = "from dhcl_ops import _build; _build._cpu_identity = lambda: 'another CPU'\n" + code
    assert probe(checkout, env, moved)[0] != before
    assert probe(checkout, env, code)[0] == before


def test_read_only_home(checkout, tmp_path):
    """Nothing can be made below /proc, by any user; the temporary folder takes its place."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = environment("", HOME="/proc", XDG_CACHE_HOME=None, TMPDIR=temporary)
    del env["DHCL_CACHE"]
    report, _ = probe(checkout, env)
    assert report["how"] == "built"
    assert Path(report["path"]).is_relative_to(temporary)


def test_nowhere_to_write(checkout, tmp_path):
    report, err = probe(checkout, environment("/proc/none"))
    assert report["how"] == "reference"
    assert "no folder to keep the library in" in lines_of(err)[0]
    assert "DHCL_CACHE" in lines_of(err)[0]


def test_a_cache_that_belongs_to_someone_else(tmp_path, monkeypatch):
    monkeypatch.setenv("DHCL_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(_build.BuildError, match="belongs to another user"):
        _build.cache_root()


def test_sources_that_do_not_compile(checkout, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken)
    source = broken / "csrc" / "memory.cpp"
    good = source.read_text()
    source.write_text(good + "\nthis is not C++\n")
    cache = tmp_path / "cache"
    env = environment(cache)
    report, err = probe(broken, env)
    assert report["how"] == "reference"
    [log] = cache.rglob("build.log")
    assert str(log) in lines_of(err)[-1]
    assert "this is not C++" in log.read_text()
    # A second start does not spend the time again, and says how to.
    report, err = probe(broken, env)
    assert "failed before" in lines_of(err)[0]
    assert "--rebuild" in lines_of(err)[0]
    doctor = [sys.executable, "-m", "dhcl_ops", "--rebuild"]
    again = subprocess.run(doctor, cwd=broken, env=env, capture_output=True, text=True)
    assert again.returncode == 0
    assert "did not compile" in again.stdout
    source.write_text(good)
    report, _ = probe(broken, env)
    assert report["how"] == "built"


def test_doctor(checkout, shared_cache):
    env = environment(shared_cache)
    doctor = [sys.executable, "-m", "dhcl_ops"]
    done = subprocess.run(doctor, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in (torch.__version__, "dhcl::momentum_update_", "nvcc", str(shared_cache)):
        assert text in done.stdout
    assert "same bits as the reference" in done.stdout
    done = subprocess.run(
        [*doctor, "--no-build", "--json"], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert "library" not in json.loads(done.stdout)


def test_doctor_sees_an_op_that_is_wrong(checkout, shared_cache):
    """The self-check must be able to fail."""
    code = """
from dhcl_ops import _ops, doctor
import dataclasses
op = _ops.OPS["segment_mean"]
wrong = lambda *args: op.reference(*args) + 1
_ops.OPS["segment_mean"] = dataclasses.replace(op, reference=wrong)
raise SystemExit(doctor.main([]))
"""
    process = start(checkout, environment(shared_cache), code)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "WRONG: off by 1.0e+00" in out


def test_import_builds_nothing(checkout, tmp_path):
    code = "import json, dhcl_ops; print(json.dumps(dhcl_ops.__version__))"
    probe(checkout, environment(tmp_path), code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cpp_half_under_sanitizers(checkout, tmp_path):
    """The op tests once more, on a library built with AddressSanitizer and UBSan."""
    from tests.cuda_host import build as cuda_host

    try:
        preload = cuda_host.sanitizer_env()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
    # torch's headers and its threads are not ours to judge: only our own loops are instrumented.
    env = environment(
        tmp_path,
        CXX="g++",
        DHCL_CUDA="off",
        DHCL_CXXFLAGS=flags,
        LD_PRELOAD=preload["LD_PRELOAD"],
        ASAN_OPTIONS=preload["ASAN_OPTIONS"],
        UBSAN_OPTIONS=preload["UBSAN_OPTIONS"],
    )
    chosen = "not compile and not opcheck and not host and not thread"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", chosen, str(ROOT / "tests" / "ops")),
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert libraries(tmp_path)
