"""What lies in the cache is taken only if this user alone could have put it there, and it is whole.

Nothing is compiled here: a stand-in for the compiler writes the library. tests/build/test_build.py
has the real one.
"""

import json
import os
import pwd
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dhcl_ops import _build, _library, _trust

PLAN = _build.Plan(_build.Compiler("c++", "/usr/bin/c++", "c++ 1"), None, "", "", "0123")
LIBRARY = bytes(range(256)) * 64
OTHER = 4242


class Compiler:
    """Writes the library, or fails as it is told to."""

    def __init__(self, monkeypatch):
        self.runs = 0
        self.failure = None
        monkeypatch.setattr(_build, "_compile", self)

    def __call__(self, plan, folder):
        self.runs += 1
        if self.failure is not None:
            raise self.failure
        (folder / "memory.o").write_bytes(b"object")
        (folder / f"{_build.NAME}.so").write_bytes(LIBRARY)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


@pytest.fixture
def built(cache, compiler):
    """A good library, its folder and what was said from here on."""
    library = _build.build(PLAN).path
    assert compiler.runs == 1
    return library


def build():
    said = []
    return _build.build(PLAN, said.append), said


def test_a_library_is_built_once_and_found(built, compiler):
    again, said = build()
    assert again.path == built
    assert compiler.runs == 1
    assert said == []
    assert again.record["seconds"] >= 0


# ---- who may write


def owned_by_other(monkeypatch, path):
    """As if `path` belonged to somebody else, which only the superuser could arrange for real."""
    real = os.lstat

    def lstat(place, **options):
        found = real(place, **options)
        if os.fspath(place) != os.fspath(path):
            return found
        fields = list(found)
        fields[stat.ST_UID] = OTHER
        return os.stat_result(fields)

    monkeypatch.setattr(_trust.os, "lstat", lstat)


def levels(cache):
    """Folders above the cache, the cache, and the folder of the library."""
    return {"above": cache.parent, "root": cache, "key": cache / f"{_build.NAME}-{PLAN.key}"}


@pytest.mark.parametrize("level", ["above", "root", "key"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o720])
def test_a_folder_that_others_can_write(built, cache, compiler, monkeypatch, level, mode):
    monkeypatch.setattr(_trust, "_is_private_group", lambda group: False)
    folder = levels(cache)[level]
    folder.chmod(mode)
    with pytest.raises(_build.BuildError, match=f"{folder} can be written by other users"):
        build()
    folder.chmod(0o755)
    assert build()[0].path == built


@pytest.mark.parametrize("level", ["root", "key"])
def test_a_sticky_bit_does_not_make_a_cache_private(built, cache, compiler, level):
    folder = levels(cache)[level]
    folder.chmod(0o1777)
    with pytest.raises(_build.BuildError, match="can be written by other users: chmod go-w"):
        build()
    folder.chmod(0o700)


def test_below_a_sticky_folder(built, cache, compiler):
    cache.parent.chmod(0o1777)
    assert build()[0].path == built
    cache.parent.chmod(0o700)


@pytest.mark.parametrize("level", ["above", "root", "key"])
def test_a_folder_of_somebody_else(built, cache, compiler, monkeypatch, level):
    owned_by_other(monkeypatch, levels(cache)[level])
    with pytest.raises(_build.BuildError, match=f"{levels(cache)[level]} belongs to another user"):
        build()


def test_the_root_of_the_file_system_counts(built, compiler, monkeypatch):
    owned_by_other(monkeypatch, "/")
    with pytest.raises(_build.BuildError, match="/ belongs to another user"):
        build()


def test_a_group_of_ones_own_above_the_cache(built, cache, compiler, monkeypatch):
    """Where each user has such a group, folders are often made writable by it."""
    cache.parent.chmod(0o770)
    monkeypatch.setattr(_trust, "_is_private_group", lambda group: True)
    assert build()[0].path == built
    cache.chmod(0o770)
    with pytest.raises(_build.BuildError, match="can be written by other users"):
        build()


def test_which_groups_are_ones_own(monkeypatch):
    me = pwd.struct_passwd(("anna", "x", 1000, 1000, "", "/", "/bin/sh"))
    monkeypatch.setattr(_trust.os, "getuid", lambda: 1000)
    monkeypatch.setattr(_trust.pwd, "getpwuid", lambda number: me)

    def group(name, members):
        entry = _trust.grp.struct_group((name, "x", 1000, members))
        monkeypatch.setattr(_trust.grp, "getgrgid", lambda number: entry)
        return _trust._is_private_group(1000)

    assert group("anna", [])
    assert group("anna", ["anna"])
    assert not group("anna", ["ben"])
    assert not group("staff", [])


def test_links(built, cache, compiler, monkeypatch, tmp_path):
    """One's own may lead to the cache, as from a small home to a large disk; nobody else's may."""
    moved = tmp_path / "disk"
    cache.rename(moved)
    cache.symlink_to("disk")
    assert build()[0].path == cache / built.relative_to(cache)
    assert compiler.runs == 1
    with monkeypatch.context() as patch:
        owned_by_other(patch, cache)
        with pytest.raises(_build.BuildError, match=f"{cache} belongs to another user"):
            build()
    # What a link leads to is judged too.
    moved.chmod(0o777)
    with pytest.raises(_build.BuildError, match=f"{moved} can be written"):
        build()


def test_a_planted_link_is_not_followed_before_it_is_judged(cache, compiler, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache.symlink_to(elsewhere)
    monkeypatch.setenv("DHCL_CACHE", str(cache / "a" / "b"))
    owned_by_other(monkeypatch, cache)
    with pytest.raises(_build.BuildError, match=f"{cache} belongs to another user"):
        build()
    assert list(elsewhere.iterdir()) == []


def test_a_circle_of_links(cache, compiler):
    cache.symlink_to(cache)
    with pytest.raises(_build.BuildError, match="no folder to keep the library in"):
        build()


@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser can become somebody else")
def test_somebody_else_cannot_plant_a_library(tmp_path):
    """The real thing: another user puts a library where ours would be looked for."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for folder in (cache, *cache.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    cache.chmod(0o1777)
    code = (
        "import os, sys; os.setgid(4242); os.setuid(4242)\n"
        "os.mkdir(sys.argv[1]); open(sys.argv[1] + '/dhcl_ops_kernels.so', 'wb').write(b'evil')\n"
        "open(sys.argv[1] + '/built.json', 'w').write('{}')"
    )
    place = cache / f"{_build.NAME}-{PLAN.key}"
    subprocess.run([sys.executable, "-c", code, str(place)], check=True)
    for mode in (0o1777, 0o755):
        cache.chmod(mode)
        os.environ["DHCL_CACHE"] = str(cache)
        try:
            with pytest.raises(_build.BuildError, match=r"written by other users|another user"):
                build()
        finally:
            del os.environ["DHCL_CACHE"]


def test_folders_are_made_private(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("DHCL_CACHE", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(0o002)
    try:
        library = build()[0].path
    finally:
        os.umask(before)
    for path in (library, *list(library.parents)[:4]):
        assert path.stat().st_mode & 0o077 == 0, path


# ---- what is damaged


def flip(data):
    changed = bytearray(data)
    for place in range(0, len(changed), len(changed) // 50):
        changed[place] ^= 1
    return bytes(changed)


DAMAGES = {
    "library cut short": (f"{_build.NAME}.so", lambda data: data[:100]),
    "library empty": (f"{_build.NAME}.so", lambda data: b""),
    "library of flipped bytes": (f"{_build.NAME}.so", flip),
    "library one bit off": (f"{_build.NAME}.so", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "record empty": ("built.json", lambda data: b""),
    "record cut short": ("built.json", lambda data: data[: len(data) // 2]),
    "record of zeros": ("built.json", lambda data: bytes(len(data))),
    "record no text": ("built.json", lambda data: b"\xff\xfe"),
    "record a list": ("built.json", lambda data: b"[]"),
    "record deep": ("built.json", lambda data: b"[" * 200_000),
    "record without checksum": ("built.json", lambda data: b'{"seconds": 3}'),
    "record of a strange checksum": ("built.json", lambda data: b'{"sha256": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_built_again(built, compiler, damage):
    name, change = DAMAGES[damage]
    path = built.parent / name
    path.write_bytes(change(path.read_bytes()))
    again, said = build()
    assert compiler.runs == 2
    assert again.path.read_bytes() == LIBRARY
    assert str(built.parent) in said[0]
    assert "it is built again" in said[0]
    assert build()[1] == []


def test_objects_of_a_damaged_build_are_not_used(built, compiler):
    (built.parent / "half.o").write_bytes(b"")
    (built.parent / "folder").mkdir()
    built.write_bytes(b"")
    build()
    assert not (built.parent / "half.o").exists()
    assert not (built.parent / "folder").exists()


@pytest.mark.parametrize("name", [f"{_build.NAME}.so", "built.json"])
def test_a_file_that_others_can_write_is_built_again(built, compiler, name):
    (built.parent / name).chmod(0o666)
    build()
    assert compiler.runs == 2
    assert (built.parent / name).stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("name", [f"{_build.NAME}.so", "built.json"])
def test_a_link_in_place_of_a_file_is_built_again(built, compiler, tmp_path, name):
    real = tmp_path / "real"
    (built.parent / name).rename(real)
    (built.parent / name).symlink_to(real)
    before = real.read_bytes()
    build()
    assert compiler.runs == 2
    assert not (built.parent / name).is_symlink()
    assert real.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sources": 1}'])
def test_a_damaged_record_of_a_prebuilt_library(tmp_path, monkeypatch, text):
    library = tmp_path / "_prebuilt.so"
    library.write_bytes(LIBRARY)
    library.with_suffix(".json").write_text(text)
    monkeypatch.setattr(_library, "PREBUILT", library)
    assert _library._prebuilt() == (None, f"{library} was made from other sources")


# ---- what is remembered

KILLED = [
    "FAILED: memory.o\ng++: fatal error: Killed signal terminated program cc1plus\n",
    "FAILED: [code=137] memory.o\nc++ -O3 memory.cpp\nninja: build stopped: subcommand failed.\n",
    "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
    "ninja: build stopped: interrupted by user.",
    "memory.cpp:1:1: fatal error: error writing to /tmp/cc1.s: No space left on device",
    "cc1plus: out of memory allocating 65536 bytes after a total of 1000 bytes",
    "",
]


@pytest.mark.parametrize("text", KILLED)
def test_a_compiler_that_was_stopped_is_tried_again(cache, compiler, text):
    compiler.failure = RuntimeError(f"Error building extension 'dhcl_ops_kernels': {text}")
    with pytest.raises(_build.BuildError, match="the compiler was stopped") as error:
        build()
    assert error.value.advice == "the next start tries again"
    compiler.failure = None
    assert build()[0].path.read_bytes() == LIBRARY


def test_control_c_is_tried_again(cache, compiler):
    compiler.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        build()
    compiler.failure = None
    assert build()[0].path.is_file()


def test_a_full_disk_is_the_reference_and_not_an_error_of_the_op(cache, compiler, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_build, "write_json", full)
        with pytest.raises(_build.BuildError, match="No space left on device"):
            build()
    compiler.failure = OSError(28, "No space left on device")
    with pytest.raises(_build.BuildError, match="the compiler was stopped"):
        build()
    compiler.failure = None
    assert build()[0].path.is_file()


@pytest.mark.parametrize(
    "text",
    [
        "memory.cpp:3:1: error: 'this' does not name a type",
        "/home/signal/killed.cpp:3:1: error: expected ';'",
        "ld: memory.o: undefined reference to `f()'",
    ],
)
def test_sources_that_are_wrong_are_remembered(cache, compiler, text):
    compiler.failure = RuntimeError(f"Error building extension 'dhcl_ops_kernels': {text}")
    with pytest.raises(_build.BuildError, match="did not compile, see"):
        build()
    compiler.failure = None
    with pytest.raises(_build.BuildError, match="failed before") as error:
        build()
    assert "--rebuild" in error.value.advice
    assert compiler.runs == 1
    # A record of a failure that can't be read is none.
    [failed] = cache.rglob("failed.json")
    failed.write_text("")
    assert build()[0].path.is_file()


# ---- waiting

HOLD = """
import sys, time
from dhcl_ops import _build
from tests.build import test_cache
def compile(plan, folder):
    print("building", flush=True)
    time.sleep(float(sys.argv[1]))
    (folder / f"{_build.NAME}.so").write_bytes(test_cache.LIBRARY)
_build._compile = compile
_build.build(test_cache.PLAN)
"""


@pytest.fixture
def builder(cache):
    """Starts another process that builds for some seconds."""
    started = []

    def start(seconds):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(seconds)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "building\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_waiting_says_for_whom_and_ends_in_time(builder, compiler, monkeypatch):
    process = builder(600)
    monkeypatch.setenv("DHCL_BUILD_WAIT", "0.5")
    started = time.monotonic()
    said = []
    with pytest.raises(_build.BuildError) as error:
        _build.build(PLAN, said.append)
    assert time.monotonic() - started < 30
    for text in (said[0], error.value.reason):
        assert f"process {process.pid} on " in text
        assert f"{_build.NAME}-{PLAN.key}" in text
        assert f"since {time.strftime('%Y-')}" in text
        assert "0.5 s" in text
    assert "DHCL_BUILD_WAIT" in error.value.advice
    assert compiler.runs == 0


def test_waiting_takes_the_others_result(builder, compiler):
    process = builder(1)
    said = []
    assert _build.build(PLAN, said.append).path.read_bytes() == LIBRARY
    assert compiler.runs == 0
    assert said[0].startswith("waiting up to 900 s for process")
    assert process.wait(timeout=60) == 0


def test_a_builder_that_was_killed_is_not_waited_for(builder, compiler):
    process = builder(600)
    process.kill()
    process.wait()
    said = []
    assert _build.build(PLAN, said.append).path.is_file()
    assert compiler.runs == 1
    assert not any("waiting" in line for line in said)


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_wait_that_is_no_number(builder, compiler, monkeypatch, text):
    monkeypatch.setenv("DHCL_BUILD_WAIT", text)
    builder(600)
    with pytest.raises(_build.BuildError, match=f"DHCL_BUILD_WAIT must be .*{text}"):
        build()


def test_the_record_says_what_the_library_was_made_of(built):
    record = json.loads((built.parent / "built.json").read_text())
    assert record["sources"] == _build.source_hash()
    assert record["sha256"] == _build._checksum(built)
    assert record["compiler"]["version"] == "c++ 1"
