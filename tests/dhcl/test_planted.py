"""Folders that a stranger prepared, or that two processes write to: no other file is touched."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import dhcl
import numpy as np
import pytest
from dhcl.cli import main
from dhcl.config import ConfigError
from dhcl.errors import CheckpointError, DataError
from dhcl.files import (
    NotPlainFile,
    NpyRows,
    Taken,
    new_file,
    only_writer,
    open_log,
    replacing,
    write_atomic,
    writing_folder,
)
from dhcl.inference.update import add_images, create_index
from dhcl.synth.sheet import contact_sheet
from dhcl.training.logs import RunLog
from dhcl.training.runs import train

from tests.dhcl.toy import options

SECRET = b"whoever follows the link ruins this\n"


@pytest.fixture
def victim(tmp_path):
    """A file of the user's, which no writer may touch."""
    file = tmp_path / "victim"
    file.write_bytes(SECRET)
    yield file
    assert file.read_bytes() == SECRET


# ---- what is planted in the place of a file ------------------------------------------------------


def rows_of(path):
    rows = NpyRows(path, 2)
    rows.append(np.ones((1, 2)))
    rows.close()


WRITERS = {"bytes": lambda path: write_atomic(path, b"new"), "rows": rows_of}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["file", "file.partial"])
def test_links_are_not_followed(victim, tmp_path, name, link, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    link(victim, folder / name)
    write(folder / "file")
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() not in (SECRET, b"")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_to_nowhere_makes_no_file_there(tmp_path, write):
    (tmp_path / "file").symlink_to(tmp_path / "made")
    (tmp_path / "file.partial").symlink_to(tmp_path / "made too")
    write(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "file.partial"]


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


NO_FILES = {
    "FIFO": fifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "socket": unix_socket,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_neither_replaced_nor_waited_for(tmp_path, kind):
    NO_FILES[kind](tmp_path / "file")
    with pytest.raises(NotPlainFile, match=rf"file: must be a plain file \(got a {kind}\)"):
        write_atomic(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_partial_name_that_is_taken_is_opened(tmp_path, kind):
    NO_FILES[kind](tmp_path / "file.partial")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.partial"]


KEPT = {"log": open_log, "lock": lambda path: only_writer(path).__enter__()}


@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("plant", [fifo, unix_socket, os.mkdir])
def test_logs_and_locks_are_plain_files(tmp_path, plant, use):
    plant(tmp_path / "file")
    with pytest.raises(NotPlainFile, match="must be a plain file"):
        use(tmp_path / "file")


@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_logs_and_locks_are_no_links(victim, tmp_path, link, use):
    link(victim, tmp_path / "file")
    with pytest.raises(NotPlainFile, match="link"):
        use(tmp_path / "file")


def test_a_new_file_is_new(victim, tmp_path):
    (tmp_path / "file").symlink_to(victim)
    with pytest.raises(FileExistsError), new_file(tmp_path / "file"):
        pass


# ---- the commands' own names ---------------------------------------------------------------------


def test_the_report_of_a_strangers_run(victim, run):
    planted = [run / "report.html", run / "report.html.partial"]
    for path in planted:
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
    try:
        assert main(["report", str(run)]) == 0
        assert (run / "report.html").read_bytes().startswith(b"<!")
        assert not (run / "report.html").is_symlink()
    finally:
        for path in planted:
            path.unlink(missing_ok=True)


def test_the_log_of_a_strangers_run(victim, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to(victim)
    with pytest.raises(NotPlainFile, match=r"log\.jsonl: .*symbolic link"):
        RunLog(run)
    (run / "log.jsonl").unlink()
    log = RunLog(run)
    (run / "log.csv").symlink_to(victim)
    (run / "log.csv.partial").symlink_to(victim)
    log.add({"epoch": 0, "loss": 1.0})
    log.close()
    assert json.loads((run / "log.jsonl").read_text()) == {"epoch": 0, "loss": 1.0}


@pytest.mark.parametrize("text", ["{", "[" * 100_000 + "\n", "1\n", '{"epoch": "x"}\n', "\xff"])
def test_a_damaged_log_is_named(tmp_path, text):
    (tmp_path / "log.jsonl").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"log\.jsonl is damaged .*move it away"):
        RunLog(tmp_path, len(text))


NAMES = ["features-1.npy", "images-1.jsonl", "index.json.partial", "rows.lance", "neighbours.lance"]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_among_planted_links(victim, tmp_path, pictures, model, name):
    index = tmp_path / "index"
    index.mkdir()
    (index / name).symlink_to(victim)
    create_index(index, [pictures / "query"], model, workers=0)
    assert not (index / name).is_symlink()


@pytest.mark.parametrize("plant", [fifo, lambda path: path.symlink_to("victim")])
def test_an_index_with_a_planted_lock(victim, tmp_path, pictures, model, plant):
    index = tmp_path / "index"
    create_index(index, [pictures / "query"], model, workers=0)
    (index / ".lock").unlink()
    plant(index / ".lock")
    with pytest.raises(NotPlainFile, match=r"\.lock: must be a plain file"):
        add_images(index, [pictures / "query"], model)


def test_a_contact_sheet_is_whole_or_not_there(victim, tmp_path, pictures, monkeypatch):
    sheet = tmp_path / "sheet.png"
    folder = tmp_path / "people"
    folder.mkdir()
    for path in (pictures / "bounding_box_train").iterdir():
        (folder / path.with_suffix(".jpg").name).symlink_to(path)
    sheet.symlink_to(victim)
    contact_sheet(folder, sheet, ids=2, columns=2)
    before = sheet.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(self, file, format):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space"):
        contact_sheet(folder, sheet, ids=2, columns=2)
    assert sheet.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


# ---- two processes -------------------------------------------------------------------------------


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each reader sees the whole of what one of them wrote."""
    contents = [bytes([65 + number]) * 300_000 for number in range(4)]
    file, failed = tmp_path / "file", []

    def write(content):
        try:
            for _ in range(10):
                write_atomic(file, content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            assert file.read_bytes() in contents
    assert not failed
    assert os.listdir(tmp_path) == ["file"]


HALF = """
import sys, time
from pathlib import Path
from dhcl.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def half_written(tmp_path):
    """Another process in the middle of writing the file."""
    write_atomic(tmp_path / "file", b"old")
    command = [sys.executable, "-c", HALF, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_killed_writer_leaves_the_old_file_and_what_it_left_goes(half_written, tmp_path):
    assert (tmp_path / "file.partial").read_bytes() == b"half"
    half_written.send_signal(signal.SIGKILL)
    half_written.wait()
    assert (tmp_path / "file").read_bytes() == b"old"
    foreign = ["file.partial.txt", "other.partial", "file.notours.partial"]
    for name in foreign:
        (tmp_path / name).touch()
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *foreign])


def test_what_another_process_is_writing_is_no_left_over(half_written, tmp_path):
    write_atomic(tmp_path / "file", b"new")
    with replacing(tmp_path / "file") as file:
        file.write(b"newer")
        assert len(list(tmp_path.glob("file*.partial"))) == 2
    assert (tmp_path / "file").read_bytes() == b"newer"
    assert (tmp_path / "file.partial").read_bytes() == b"half"


HOLDER = """
import os, sys, time
from pathlib import Path
from dhcl.files import writing_folder
with writing_folder(Path(sys.argv[1]), "config.yaml"):
    begun, told = os.pipe()
    child = os.fork()  # as a loader forks its workers, who outlive a killed parent
    if not child:
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(begun, 1)  # a worker that was never scheduled has not let go of its parent's lock yet
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def trainer(tmp_path):
    """Another process that trains in the folder, and the number of its child."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        yield process
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_run_that_another_process_trains_is_refused(trainer, tmp_path, pictures):
    config = options(pictures, tmp_path / "run", epochs=1)
    who = rf"\({trainer.pid} on {re.escape(socket.gethostname())}\)"
    with pytest.raises(ConfigError, match=f"out: another process {who} trains in .*run"):
        train(config, resume=True)
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "config.yaml"]


def test_the_lock_of_a_killed_trainer_is_free_though_its_worker_lives(trainer, tmp_path):
    lock = tmp_path / "run" / ".lock"
    with pytest.raises(Taken), only_writer(lock):
        pass
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    with only_writer(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert lock.read_bytes() == b""


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "wandb"])
def test_folders_of_a_run_are_no_links(tmp_path, pictures, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = options(pictures, tmp_path / "run", epochs=1)
    config.run.mkdir()
    (config.run / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=rf"run/{name} must be a folder"):
        train(config)
    assert not list(elsewhere.iterdir())


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(DataError):
        train(options(tmp_path / "no images", tmp_path / "run").resolved())
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def none(handle, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="has no locks"), writing_folder(tmp_path / "a", "proof"):
        write_atomic(tmp_path / "a" / "proof", b"whole")
    assert (tmp_path / "a" / "proof").read_bytes() == b"whole"


# ---- every writer --------------------------------------------------------------------------------

# Methods and functions of modules that write to a file, given by name or, as is asked here, opened.
SAVERS = {"save", "savez", "savez_compressed", "savetxt", "tofile", "save_file", "imwrite"}
SAVERS |= {"to_csv", "ZipFile", "ParquetWriter"}
# Those that open or make a file by its name.
OPENERS = {"write_text", "write_bytes", "touch", "mkstemp", "NamedTemporaryFile"}
OPENERS |= {"link_to", "hardlink_to", "symlink_to"}
WHOLE = {"os.open", "os.link", "os.symlink", "shutil.copy", "shutil.copy2", "shutil.copyfile"}
WHOLE |= {"shutil.copytree", "json.dump", "pickle.dump"}


def own_handles(function):
    """Names in a function that stand for memory, or for a file that was opened in files.py."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None:
            if ast.unparse(node.annotation) in ("BinaryIO", "io.BytesIO"):
                names.add(node.arg)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value) == "io.BytesIO()":
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            opener = ast.unparse(node.context_expr.func)
            if opener in ("replacing", "new_file", "open_log") and node.optional_vars is not None:
                names.add(ast.unparse(node.optional_vars))
    return names


def opens_to_write(call):
    """Whether ``open(...)``, or a method of that name, is given a mode that writes."""
    words = [*call.args, *(each.value for each in call.keywords if each.arg == "mode")]
    modes = [each.value for each in words if isinstance(each, ast.Constant)]
    return any(
        isinstance(m, str) and re.fullmatch(r"[rwaxbt+]+", m) and set(m) & set("wax+")
        for m in modes
    )


def writes(function):
    """Lines of a function that open a file to write without files.py."""
    handles = own_handles(function)
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        whole = ast.unparse(node.func)
        _, dot, name = whole.rpartition(".")
        given = {ast.unparse(each) for each in node.args}
        reads = name in ("open", "ZipFile") and not opens_to_write(node)
        if whole == "os.open":
            reads = any("O_RDONLY" in each for each in given)
        inside = whole == "archive.open"  # a member of a .zip file that is open
        saves = dot and name in SAVERS and given and not handles & given
        if not (reads or inside) and (name in {"open", *OPENERS} or whole in WHOLE or saves):
            yield node.lineno


def bypasses(source):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(source)
    found = {
        line for node in ast.walk(tree) if isinstance(node, functions) for line in writes(node)
    }
    return sorted(found)


def test_every_file_is_written_by_files_py():
    package = Path(dhcl.__file__).parent
    found = {
        f"{file.relative_to(package)}:{line}"
        for file in package.rglob("*.py")
        if file != package / "files.py"
        for line in bypasses(file.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'open(path, "w")',
        'path.open("ab")',
        'path.open(mode="r+")',
        "path.write_text(text)",
        "path.write_bytes(data)",
        "np.save(path, array)",
        "np.savez(path, a=array)",
        "torch.save(state, path)",
        "image.save(folder / name)",
        "table.to_csv(path)",
        'zipfile.ZipFile(path, "w")',
        "parquet.ParquetWriter(path, schema)",
        "os.open(path, os.O_WRONLY)",
        "shutil.copyfile(source, path)",
    ],
)
def test_a_writer_of_its_own_is_found(line):
    assert bypasses(f"def f(path):\n    {line}\n") == [2]


@pytest.mark.parametrize(
    "line",
    [
        'path.open("rb")',
        "open(path)",
        "buffer = io.BytesIO(); torch.save(state, buffer)",
        'with replacing(path) as file: image.save(file, "PNG")',
        "zipfile.ZipFile(path)",
        "os.open(path, os.O_RDONLY | os.O_NONBLOCK)",
    ],
)
def test_what_reads_or_uses_files_py_is_no_writer_of_its_own(line):
    assert bypasses(f"def f(path):\n    {line}\n") == []
