"""How the compiled library is made: one list of sources and flags for every way of building it.

Used on the fly by :mod:`dhcl_ops._library` and ahead of time by ``setup.py``. Nothing here imports
torch at import time, so that ``setup.py`` can read it in an isolated build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The oldest torch whose stable ABI the library asks for (2.10); it then runs on every later one.
TARGET_VERSION = "0x020a000000000000"
NAME = "dhcl_ops_kernels"


class BuildError(RuntimeError):
    """The library can't be built here. ``advice`` says what the user can do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


def source_dir() -> Path:
    """Folder of the kernel sources: in the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if any(folder.glob("*.cpp")):
            return folder
    raise BuildError(
        f"the kernel sources are missing (looked in {package / 'csrc'} and "
        f"{package.parent / 'csrc'})",
        "reinstall dhcl",
    )


def families() -> list[str]:
    """The op families: the stems with a ``.cpp`` and a ``.cu`` among the kernel sources.

    This is the only list of them. A stem names a family's files everywhere, so whatever goes
    through all families (build, tests, benchmarks) asks here and finds the rest by name.
    """
    return sorted(
        path.stem for path in source_dir().glob("*.cu") if path.with_suffix(".cpp").exists()
    )


def common_kernels() -> list[Path]:
    """The ``.cu`` files that families share."""
    return sorted((source_dir() / "common").glob("*.cu"))


def sources(cuda: bool) -> list[Path]:
    """Files to compile: one ``.cpp`` per family; for a CUDA build its ``.cu`` and common ones."""
    folder = source_dir()
    files = [folder / f"{stem}.cpp" for stem in families()]
    if cuda:
        files += [folder / f"{stem}.cu" for stem in families()] + common_kernels()
    return files


def source_hash() -> str:
    """Hash over every source and header, the flags' version included through this file itself."""
    folder = source_dir()
    digest = hashlib.sha256()
    files = [p for p in folder.rglob("*") if p.suffix in {".cpp", ".cu", ".h"}]
    for path in [Path(__file__), *sorted(files)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cxx_flags(*, cuda: bool, native: bool) -> list[str]:
    """Flags for the C++ half. Contraction is off: it would change the bits of a sum."""
    flags = [
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    ]
    if cuda:
        # USE_CUDA makes torch's header declare the stable ABI's CUDA half.
        flags += ["-DDHCL_CUDA", "-DUSE_CUDA"]
    if native:
        flags += ["-march=native", "-DDHCL_NATIVE"]
    return flags + shlex.split(os.environ.get("DHCL_CXXFLAGS", ""))


def nvcc_flags() -> list[str]:
    """Flags for the ``.cu`` files; the architectures come from ``TORCH_CUDA_ARCH_LIST``."""
    return ["-O3", "-std=c++17", "-lineinfo", *shlex.split(os.environ.get("DHCL_NVCCFLAGS", ""))]


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A host compiler: its command, where that lies, and the first line of its version."""

    command: str
    path: str
    version: str


def find_compiler() -> Compiler | None:
    """The host compiler torch would use: ``$CXX``, else ``c++``."""
    command = os.environ.get("CXX", "c++")
    words = shlex.split(command)
    path = shutil.which(words[0]) if words else None
    if path is None:
        return None
    text = _run(*words, "--version")
    return None if text is None else Compiler(command, path, text.splitlines()[0])


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """A CUDA toolkit: its root, how that was found, and nvcc's release such as ``13.0``."""

    home: str
    found_by: str
    release: str


def find_nvcc() -> Nvcc | None:
    """The CUDA toolkit: ``$CUDA_HOME``, ``$CUDA_PATH``, nvcc on ``PATH``, or ``/usr/local/cuda``.

    The folder of an nvcc on ``PATH`` may hold only a wrapper script, so a root counts only if it
    has ``bin/nvcc`` and ``cuda_runtime.h``; else nvcc itself is asked where it lives.
    """
    candidates: list[tuple[str, str]] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append((os.environ[variable], f"${variable}"))
    on_path = shutil.which("nvcc")
    if on_path is not None:
        candidates.append((str(Path(on_path).parent.parent), f"nvcc on PATH ({on_path})"))
        listing = _run(on_path, "--dryrun", "-x", "cu", "-c", os.devnull) or ""
        top = re.search(r"^#\$ TOP=(.*)$", listing, re.MULTILINE)
        if top:
            home = str(Path(top.group(1).strip()).resolve())
            candidates.append((home, f"nvcc on PATH ({on_path}), which says so"))
    candidates.append(("/usr/local/cuda", "the default place"))
    for home, found_by in candidates:
        nvcc = Path(home) / "bin" / "nvcc"
        headers = [Path(home) / "include", *Path(home).glob("targets/*/include")]
        if not nvcc.is_file() or not any((h / "cuda_runtime.h").is_file() for h in headers):
            continue
        release = re.search(r"release (\d+\.\d+)", _run(str(nvcc), "--version") or "")
        if release:
            return Nvcc(home, found_by, release.group(1))
    return None


def default_architectures(nvcc_release: str) -> str:
    """Architectures to build for without a visible GPU: data-centre ones nvcc knows, and PTX."""
    known = tuple(int(x) for x in nvcc_release.split(".")) >= (12, 8)
    return "8.0;9.0;10.0+PTX" if known else "8.0;9.0+PTX"


def _architectures(nvcc_release: str) -> str:
    import torch

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed and listed != "native":
        return listed
    # torch's own default needs a visible GPU and fails with IndexError without one.
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        return default_architectures(nvcc_release)
    names = [f"{major}.{minor}" for major, minor in sorted(found)]
    return ";".join(names) + "+PTX"


def _cpu_identity() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared between unlike machines."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        lines = [line for line in text.splitlines() if line.startswith(("model name", "flags"))]
        return "\n".join(sorted(set(lines)))
    return platform.processor()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be built here, and the key under which the result is kept."""

    compiler: Compiler
    nvcc: Nvcc | None
    why_no_cuda: str
    architectures: str
    key: str

    @property
    def cuda(self) -> bool:
        """Whether the CUDA half is built too."""
        return self.nvcc is not None

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for the record beside the library."""
        return dataclasses.asdict(self)


def _cuda_obstacle(nvcc: Nvcc | None) -> str:
    """Why the CUDA half can't or shall not be built here; empty if it can."""
    import torch

    if os.environ.get("DHCL_CUDA", "").lower() in {"0", "off"}:
        return "DHCL_CUDA=off"
    if torch.version.cuda is None:
        kind = "ROCm" if torch.version.hip else "CPU"
        return f"torch {torch.__version__} is a {kind} build"
    if nvcc is None:
        return f"no nvcc: set CUDA_HOME to a CUDA {torch.version.cuda} toolkit for the CUDA kernels"
    if nvcc.release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc {nvcc.release} in {nvcc.home} does not go with torch's CUDA "
            f"{torch.version.cuda}: set CUDA_HOME to a {torch.version.cuda.split('.')[0]}.x toolkit"
        )
    return ""


def plan() -> Plan:
    """Look at this machine and say what can be built. Raises :class:`BuildError` if nothing can."""
    import torch

    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"no C++ compiler ('{os.environ.get('CXX', 'c++')}' does not run)",
            "install g++ 11 or newer, or name a compiler in CXX",
        )
    if _ninja_folder() is None:
        raise BuildError("ninja is missing", "pip install ninja")
    nvcc = find_nvcc()
    obstacle = _cuda_obstacle(nvcc)
    if obstacle:
        nvcc = None
    architectures = _architectures(nvcc.release) if nvcc else ""
    parts = [
        source_hash(),
        torch.__version__,
        str(torch.version.cuda),
        str(torch.version.git_version),
        compiler.version,
        compiler.path,
        *cxx_flags(cuda=nvcc is not None, native=True),
        *nvcc_flags(),
        str(nvcc),
        architectures,
        _cpu_identity(),
        platform.machine(),
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Plan(compiler, nvcc, obstacle, architectures, key)


def _ninja_folder() -> str | None:
    """Folder of a working ninja; ``""`` if it is on ``PATH`` already.

    A virtual environment that was never activated has its ninja installed but not on ``PATH``.
    """
    if _run("ninja", "--version") is not None:
        return ""
    with contextlib.suppress(ImportError):
        import ninja

        folder = str(ninja.BIN_DIR)
        if _run(str(Path(folder) / "ninja"), "--version") is not None:
            return folder
    folder = str(Path(sys.executable).parent)
    return folder if _run(str(Path(folder) / "ninja"), "--version") is not None else None


def cache_root() -> Path:
    """A folder for built libraries which this user alone can write, made if missing.

    ``$DHCL_CACHE``, else ``$XDG_CACHE_HOME/dhcl_ops``, else ``~/.cache/dhcl_ops``; where that
    can't be written (a read-only home), a private folder of this user below the system's temporary
    one. Code is loaded from here, so :mod:`dhcl_ops._trust` judges every level of the path.
    """
    from dhcl_ops import _trust

    if os.environ.get("DHCL_CACHE"):
        wanted = [Path(os.environ["DHCL_CACHE"])]
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        wanted = [Path(base).expanduser() / "dhcl_ops"]
        wanted.append(Path(tempfile.gettempdir()) / f"dhcl_ops-{os.getuid()}")
    problems = []
    for folder in wanted:
        try:
            _trust.make_folder(folder)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise BuildError(
        "no folder to keep the library in (" + "; ".join(problems) + ")",
        "name a writable one in DHCL_CACHE",
    )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_cpp_extension() -> Iterator[None]:
    """Hold back torch's remarks about its guess of CUDA_HOME: ours is passed to it instead."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a record beside the library, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True)
class Built:
    """A library on disk, how long it took (None if it lay there already), and with CUDA or not."""

    path: Path
    seconds: float | None
    cuda: bool
    record: dict[str, Any]


RETRY = "after mending it, retry with `python -m dhcl_ops --rebuild`"
# What a build says that was stopped from outside; the same build may well work the next time.
STOPPED = re.compile(
    r"\bKilled\b|signal terminated program|due to signal|\bsignal \d+|interrupted by user"
    r"|No space left on device|Disk quota exceeded|Read-only file system|Input/output error"
    r"|Cannot allocate memory|out of memory|virtual memory exhausted|bad_alloc|Bus error"
    r"|Stale file handle|Too many open files|Resource temporarily unavailable"
)
# What compilers and linkers say of sources that are wrong.
WRONG = re.compile(r"\berror\b|undefined reference", re.IGNORECASE)


def wait_limit() -> float:
    """Seconds to wait for another process's build: ``$DHCL_BUILD_WAIT``, 900 if that is not set."""
    text = os.environ.get("DHCL_BUILD_WAIT", "") or "900"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e6:
        raise BuildError(
            f"DHCL_BUILD_WAIT must be seconds from 0 to 1000000 (got {text!r})",
            "set it to a number, or leave it out",
        )
    return seconds


def _read_json(path: Path) -> dict[str, Any]:
    """A record of this user's alone; empty where there is none that can be read."""
    from dhcl_ops import _trust

    try:
        _trust.check_file(path)
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


class _Place:
    """The folder of one key: the library, the record of how it came to be, and of failures."""

    def __init__(self, plan: Plan) -> None:
        from dhcl_ops import _trust

        self.plan = plan
        self.folder = cache_root() / f"{NAME}-{plan.key}"
        self.folder.mkdir(exist_ok=True, mode=0o700)
        _trust.check_folder(self.folder)
        self.library = self.folder / f"{NAME}.so"
        self.record = self.folder / "built.json"
        self.failed = self.folder / "failed.json"
        self.log = self.folder / "build.log"
        self.holder = self.folder / "building.json"

    def found(self) -> tuple[Built | None, str]:
        """The library, if it is as it was built; else why it is not, empty if there is none."""
        from dhcl_ops import _trust

        if not os.path.lexists(self.library) or not os.path.lexists(self.record):
            return None, ""
        record = _read_json(self.record)
        if "sha256" not in record:
            return None, f"{self.record} is damaged"
        try:
            _trust.check_file(self.library)
            whole = _checksum(self.library) == record["sha256"]
        except OSError as error:
            return None, str(error)
        if not whole:
            return None, f"{self.library} is not as it was built"
        return Built(self.library, None, self.plan.cuda, record), ""

    def clear(self) -> None:
        """Take out all files, so that no part of a damaged build is taken for a good one."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def keep(self, seconds: float) -> Built:
        """Write the record of a library that was just built."""
        self.library.chmod(0o700)
        record = {
            "seconds": round(seconds, 1),
            "sources": source_hash(),
            "sha256": _checksum(self.library),
            **self.plan.describe(),
        }
        write_json(self.record, record)
        return Built(self.library, seconds, self.plan.cuda, record)


def build(plan: Plan, announce: Any = lambda text: None) -> Built:
    """Build the library, or find it already built under the plan's key.

    ``announce`` is called with one line when a compilation really starts, when a library that lies
    there is damaged and is built again, and when another process builds and is waited for. One
    process builds; others take its result. A library is taken only if its checksum is that of its
    record. Raises :class:`BuildError`, which names the log where the sources do not compile.
    """
    try:
        place = _Place(plan)
        found, _ = place.found()
        if found:
            return found
        with _lock_of(place, announce):
            return _build_locked(place, announce)
    except OSError as error:
        raise BuildError(
            f"no library can be kept in the cache: {error}",
            "mend that, or name another folder in DHCL_CACHE",
        ) from error


@contextlib.contextmanager
def _lock_of(place: _Place, announce: Any) -> Iterator[None]:
    """One builder at a time. Who has to wait says for whom, and does so for a bounded time."""
    import filelock

    # A lock of the operating system: it goes when its holder dies, however it dies.
    lock = filelock.FileLock(place.folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        limit = wait_limit()
        holder = _read_json(place.holder)
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
        since = f"since {holder['since']}" if "since" in holder else "since an unknown time"
        announce(f"waiting up to {limit:g} s for {who}, which builds into {place.folder} {since}")
        try:
            lock.acquire(timeout=limit)
        except filelock.Timeout:
            raise BuildError(
                f"{who} has been building into {place.folder} {since}, waited {limit:g} s for it",
                "wait for it or end it; DHCL_BUILD_WAIT sets how long to wait, DHCL_CACHE another "
                "folder",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _build_locked(place: _Place, announce: Any) -> Built:
    """What :func:`build` does once no other process builds."""
    found, damage = place.found()
    if found:
        return found
    if "error" in _read_json(place.failed):
        raise BuildError(f"the build failed before, see {place.log}", RETRY)
    if damage:
        announce(f"{damage}: it is built again")
    place.clear()
    kind = "C++ and CUDA" if place.plan.cuda else "C++"
    announce(f"building the {kind} kernels, once, into {place.folder}")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(place.holder, {"pid": os.getpid(), "host": platform.node(), "since": now})
    started = time.monotonic()
    try:
        _compile(place.plan, place.folder)
    except Exception as error:
        raise _failure(place, error) from error
    finally:
        place.holder.unlink(missing_ok=True)
    return place.keep(time.monotonic() - started)


def _failure(place: _Place, error: Exception) -> BuildError:
    """What to raise for a build that failed; remembered only if the sources are to blame."""
    text = str(error)
    with contextlib.suppress(OSError):
        place.log.write_text(text)
    stopped = STOPPED.search(text)
    if stopped or not WRONG.search(text.removeprefix("Error building extension")):
        how = f" ({stopped[0]})" if stopped else ""
        return BuildError(
            f"the compiler was stopped{how}, see {place.log}", "the next start tries again"
        )
    with contextlib.suppress(OSError):
        write_json(place.failed, {"error": text[:2000], **place.plan.describe()})
    return BuildError(f"the kernels did not compile, see {place.log}", RETRY)


def _compile(plan: Plan, folder: Path) -> None:
    ninja = _ninja_folder()
    path = os.environ.get("PATH", "")
    variables = {"PATH": f"{ninja}{os.pathsep}{path}" if ninja else path}
    if plan.nvcc:
        variables.update(CUDA_HOME=plan.nvcc.home, TORCH_CUDA_ARCH_LIST=plan.architectures)
    with _environment(**variables), _quiet_cpp_extension():
        from torch.utils import cpp_extension

        guessed = cpp_extension.CUDA_HOME
        if plan.nvcc:
            cpp_extension.CUDA_HOME = plan.nvcc.home
        try:
            cpp_extension.load(
                name=NAME,
                sources=[str(path) for path in sources(plan.cuda)],
                extra_cflags=cxx_flags(cuda=plan.cuda, native=True),
                extra_cuda_cflags=nvcc_flags(),
                extra_include_paths=[str(source_dir())],
                build_directory=str(folder),
                with_cuda=plan.cuda,
                is_python_module=False,
                verbose=False,
            )
        finally:
            cpp_extension.CUDA_HOME = guessed


def forget(plan: Plan) -> None:
    """Remove what was built, or failed to build, under the plan's key."""
    shutil.rmtree(cache_root() / f"{NAME}-{plan.key}", ignore_errors=True)


def _build_command(found: Plan, record: dict[str, Any], root: Path) -> Any:
    """The ``build_ext`` that compiles, then writes what the library was made from beside it."""
    from torch.utils import cpp_extension

    class BuildPrebuilt(cpp_extension.BuildExtension):
        """Compiles the prebuilt library."""

        def run(self) -> None:
            variables = {"PATH": f"{_ninja_folder()}{os.pathsep}{os.environ.get('PATH', '')}"}
            if found.nvcc:
                variables.update(
                    CUDA_HOME=found.nvcc.home, TORCH_CUDA_ARCH_LIST=found.architectures
                )
            with _environment(**variables):
                super().run()
            for extension in self.extensions:
                library = Path(self.get_ext_fullpath(extension.name))
                write_json(library.with_suffix(".json"), record)
                if self.inplace:
                    place = root / "dhcl_ops" / library.name
                    write_json(place.with_suffix(".json"), record)

        def build_extensions(self) -> None:
            plain = self.compiler.object_filenames

            # family.cpp and family.cu would both become family.o with some setuptools.
            def distinct(files: list[str], *args: Any, **kwargs: Any) -> list[str]:
                objects = zip(files, plain(files, *args, **kwargs), strict=True)
                return [
                    o.removesuffix(".o") + ".cuda.o" if f.endswith(".cu") else o for f, o in objects
                ]

            self.compiler.object_filenames = distinct
            super().build_extensions()

    return BuildPrebuilt.with_options(no_python_abi_suffix=True)


def setuptools_arguments(root: Path) -> dict[str, Any]:
    """Arguments for ``setup()`` which compile the library into ``dhcl_ops/_prebuilt.so``.

    The result must run on other machines than this one, so it is built without ``-march=native``
    and carries several versions of its hot loops. It is bound to no Python version.
    """
    import torch
    from torch.utils import cpp_extension

    found = plan()
    record = {
        "sources": source_hash(),
        "cuda": found.cuda,
        "why_no_cuda": found.why_no_cuda,
        "architectures": found.architectures,
        "compiler": found.compiler.version,
        "nvcc": found.nvcc.release if found.nvcc else None,
        "torch": torch.__version__,
    }
    if found.nvcc:
        cpp_extension.CUDA_HOME = found.nvcc.home
    make = cpp_extension.CUDAExtension if found.cuda else cpp_extension.CppExtension
    compile_args: dict[str, list[str]] = {"cxx": cxx_flags(cuda=found.cuda, native=False)}
    if found.cuda:
        compile_args["nvcc"] = nvcc_flags()
    extension = make(
        "dhcl_ops._prebuilt",
        [os.path.relpath(path, root) for path in sources(found.cuda)],
        include_dirs=[str(source_dir())],
        extra_compile_args=compile_args,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": _build_command(found, record, root)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
