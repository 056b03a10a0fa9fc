"""Builds a .cu file for the host, with a pybind11 binding, and imports the result.

    sources = [ROOT / "csrc/memory.cu", HERE / "memory_binding.cpp"]
    module = load("memory_host", sources, [ROOT / "csrc"])

The name must be the one in PYBIND11_MODULE. Results are cached in `.build/` beside this file, under
a hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".build"
# Whether this process runs under the sanitizers (tests/ops/test_host_sanitized.py starts such).
SANITIZE = os.environ.get("DHCL_HOST_SANITIZE") == "1"
# Whether it looks for races (races.py starts such).
RACE = os.environ.get("DHCL_HOST_RACE") == "1"
HEADER_SUFFIXES = {".h", ".hpp", ".cuh", ".inl"}

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    # One rounding per operation, also where the processor has fused multiply-add.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    # `#pragma unroll` is nvcc's.
    "-Wno-unknown-pragmas",
    "-fPIC",
    # Without these two, modules built from different versions of one kernel and loaded into one
    # process would share each other's variables.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
]
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
# The calls before every access; race.cpp answers them, so the compiler's own library is not linked.
RACE_FLAGS = [
    "-DDHCL_HOST_RACE",
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    # std::atomic's fences, which the emulator has none of.
    "-Wno-tsan",
]


def compiler() -> str:
    """The host compiler: $CXX, else g++."""
    return os.environ.get("CXX", "g++")


def missing() -> str | None:
    """Why nothing can be built here; None if all is there."""
    if shutil.which(compiler()) is None:
        return f"no host C++ compiler: {compiler()!r} is not on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "the headers of Python (Python.h) are not installed"
    return None


def sanitizer_env() -> dict[str, str]:
    """Environment in which a Python process can load modules built with `sanitize=True`.

    Raises FileNotFoundError if the compiler comes without the sanitizers' libraries.
    """
    # libstdc++ too: AddressSanitizer looks for __cxa_throw when it starts, before any module that
    # would bring it is loaded, and dies at the first exception if it was not there.
    paths = [_library("libasan.so"), _library("libstdc++.so")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def race_missing() -> str | None:
    """Why no module can be built with `race=True` here; None if all is there."""
    probe = [compiler(), *RACE_FLAGS, "-fsyntax-only", "-x", "c++", os.devnull]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return f"{compiler()} does not tell volatile accesses from others; g++ 11 and later does"
    if shutil.which("addr2line") is None:
        return "no addr2line, which names the lines of a race"
    return None


def load(
    name: str,
    sources: Sequence[Path],
    include_dirs: Iterable[Path] = (),
    sanitize: bool = False,
    race: bool = False,
) -> ModuleType:
    """Compiles `sources` into the extension module `name`, unless that was done before; imports it.

    `.cu` files are compiled as C++ against cuda_host.h, whose folder is always on the include path.
    With `sanitize`, the process must have been started with `sanitizer_env()`.
    With `race`, a launch throws if its kernel has a data race (race.h).
    Raises RuntimeError with the compiler's output if it fails.
    """
    if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            "a module built with sanitize=True loads only into a process started with "
            "build.sanitizer_env()"
        )
    path = compile_module(name, sources, include_dirs, sanitize, race)
    # pybind11 gives back a module that it has loaded before under the same full name, even from
    # another file; the folder's name has the hash in it.
    full_name = f"{path.parent.name}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(path))
    spec = importlib.util.spec_from_file_location(full_name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def compile_glue(name: str, sources: Sequence[Path], include_dirs: Iterable[Path] = ()) -> Path:
    """The path of a library of ops, the CUDA half of glue, for `torch.ops.load_library`.

    The headers in `glue/` stand in for what only a CUDA build of torch has.
    """
    import torch

    from dhcl_ops import _build

    home = Path(torch.__file__).parent
    flags = ["-DDHCL_CUDA", f"-DTORCH_TARGET_VERSION={_build.TARGET_VERSION}"]
    flags += [f"-I{HERE / 'glue'}", "-isystem", str(home / "include"), f"-L{home / 'lib'}"]
    # The libraries stand before the sources that need them.
    flags += ["-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    return compile_module(name, sources, include_dirs, flags=flags)


def compile_module(
    name: str,
    sources: Sequence[Path],
    include_dirs: Iterable[Path] = (),
    sanitize: bool = False,
    race: bool = False,
    flags: Sequence[str] = (),
) -> Path:
    """The first half of `load`: the path of the compiled module."""
    import pybind11

    sources = [Path(source).resolve() for source in sources]
    includes = [HERE, *(Path(folder).resolve() for folder in include_dirs)]
    system = [sysconfig.get_paths()["include"], pybind11.get_include()]
    command = [compiler(), *FLAGS, *(SANITIZE_FLAGS if sanitize else []), *flags]
    command += [f"-I{folder}" for folder in includes]
    # -isystem: no warnings from headers that are not ours.
    for path in system:
        command += ["-isystem", path]
    runs = [[*command, "-shared"]]
    for source in sources:
        runs[0] += ["-x", "c++", str(source)]
    if race:
        sources.append(HERE / "race.cpp")
        runs = _race_runs(command, sources)

    files = set(sources)
    for folder in {*includes, *(source.parent for source in sources)}:
        files |= {p for p in folder.rglob("*") if p.suffix in HEADER_SUFFIXES and p.is_file()}
    digest = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    for part in [name, sys.version, pybind11.__version__, *(word for run in runs for word in run)]:
        digest.update(part.encode() + b"\0")
    digest.update(version)
    for file in sorted(files):
        digest.update(str(file).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = CACHE / f"{name}-{digest.hexdigest()[:20]}" / f"{name}{suffix}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may build this at once. Each builds under a name of its own, and the rename
    # replaces one finished file by another.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch, target.name)
        runs[-1] += ["-o", str(built)]
        for run in runs:
            result = subprocess.run(run, capture_output=True, text=True, check=False, cwd=scratch)
            if result.returncode != 0:
                raise RuntimeError(f"building {name} failed:\n{' '.join(run)}\n{result.stderr}")
        os.replace(built, target)
    return target


def _race_runs(command: Sequence[str], sources: Sequence[Path]) -> list[list[str]]:
    """The compiler's command lines, run in a folder for objects; the last source is race.cpp."""
    runs = []
    for number, source in enumerate(sources):
        last = number == len(sources) - 1
        flags = ["-O2", "-DDHCL_HOST_RACE"] if last else RACE_FLAGS
        runs.append([*command, *flags, "-x", "c++", "-c", str(source), "-o", f"{number}.o"])
    objects = [f"{number}.o" for number in range(len(sources))]
    return [*runs, [compiler(), "-shared", *objects]]


def _library(file: str) -> str:
    path = subprocess.run(
        [compiler(), f"-print-file-name={file}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # The compiler answers with the bare name where it has no such file.
    if not os.path.isabs(path):
        raise FileNotFoundError(f"{compiler()} has no {file}")
    return os.path.realpath(path)
