"""Runs that are killed go on to the same bits. Kills are real: SIGKILL from another process."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from dhcl.config import ConfigError
from dhcl.files import write_atomic
from dhcl.training.checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint
from dhcl.training.engine import Interrupted
from dhcl.training.runs import train

from tests.dhcl.toy import options, write_images

# Its children start with all imports done, in milliseconds.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.dhcl.training.test_resume"])


def _run(config, resume):
    # As in the command: loaders fork their workers, which end with this process.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(config, resume=resume)


def start(config, resume=False):
    process = _SERVER.Process(target=_run, args=(config, resume))
    process.start()
    return process


def finish(config, resume=False):
    process = start(config, resume)
    process.join(120)
    assert process.exitcode == 0


def result(run):
    """All that a run leaves that could differ, without times."""
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    state["progress"].pop("seconds")
    state["progress"].pop("entry")
    state.pop("log_size")
    entries = []
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry.pop("seconds")
        entries.append(entry)
    return state, entries


def assert_same(a, b, path="state"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


# Clusters too, whose memory changes its size; and everything that has a state of its own.
RECIPES = {
    "dhcl": {
        "camera_bn": True,
        "suspects": "exclude",
        "instance_weight": 0.25,
        "kappa": 0.25,
        "beta": 0.1,
        "eval_every": 1,
        "iterations": 12,
    },
    "spcl": {"accumulate": 2, "iterations": 12, "workers": 1, "debias": "graph"},
    "cluster-contrast": {"images_per_class": 4, "iterations": 12},
}
# Less than a step takes, so that there is one after each.
CHECKPOINT_MINUTES = 1e-9


# One of the three has most kinds of state.
BY_LENGTH = [
    name if name == "dhcl" else pytest.param(name, marks=pytest.mark.long) for name in RECIPES
]


@pytest.fixture(scope="module", params=BY_LENGTH)
def uninterrupted(request, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    changes = {**RECIPES[request.param], "checkpoint_minutes": CHECKPOINT_MINUTES}
    config = options(pictures, folder / "run", request.param, **changes)
    finish(config)
    return request.param, changes, result(config.run)


def test_killed_mid_epoch_it_goes_on_to_the_same_bits(uninterrupted, pictures, tmp_path):
    name, changes, expected = uninterrupted
    config = options(pictures, tmp_path / "run", name, **changes)
    checkpoint = config.run / "checkpoints" / "last.pt"
    process = start(config)
    # Killed as soon as a checkpoint from within the second epoch is there.
    while process.is_alive():
        if checkpoint.exists():
            at = load_checkpoint(checkpoint)["progress"]
            if (at["epoch"], at["iteration"]) >= (1, 4):
                break
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    at = load_checkpoint(checkpoint)["progress"]
    assert at["iteration"] > 0
    assert at["epoch"] < config.epochs
    finish(config, resume=True)
    assert_same(result(config.run), expected)


def test_killed_at_random_times_it_goes_on_to_the_same_bits(uninterrupted, pictures, tmp_path):
    name, changes, expected = uninterrupted
    config = options(pictures, tmp_path / "run", name, **changes)
    seed = int(os.environ.get("DHCL_TEST_SEED", time.time_ns() % 10**6))
    print(f"DHCL_TEST_SEED={seed}")
    draw = random.Random(seed)
    kills, longest = 0, 2.5
    for _ in range(10):
        process = start(config, resume=(config.run / "config.yaml").exists())
        process.join(draw.uniform(0.1, longest))
        if not process.is_alive():
            assert process.exitcode == 0
            if kills:
                break
            # This machine is faster than that: once more, and sooner.
            shutil.rmtree(config.run)
            longest /= 2
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills
    finish(config, resume=(config.run / "config.yaml").exists())
    assert_same(result(config.run), expected)


def test_killed_while_writing_a_checkpoint_the_one_before_is_whole(pictures, tmp_path):
    changes = {"checkpoint_minutes": CHECKPOINT_MINUTES, "iterations": 6, "epochs": 2}
    whole = options(pictures, tmp_path / "whole", **changes)
    finish(whole)
    config = options(pictures, tmp_path / "run", **changes)
    partial = config.run / "checkpoints" / "last.pt.partial"
    hits = 0
    for _ in range(40):
        process = start(config, resume=(config.run / "config.yaml").exists())
        while process.is_alive() and not partial.exists():
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if partial.exists():  # killed between the first byte and the rename
            hits += 1
            last = partial.with_name("last.pt")
            if last.exists():
                load_checkpoint(last)
            partial.unlink()
        if hits == 3 or process.exitcode == 0:
            break
    assert hits
    finish(config, resume=(config.run / "config.yaml").exists())
    assert_same(result(config.run), result(whole.run))


def test_a_killed_worker_changes_no_bit(pictures, tmp_path, monkeypatch, caplog):
    from dhcl.training.trainer import Trainer

    step, killed = Trainer.step, []

    def killing(self, *batch):
        step(self, *batch)
        if self.config.run.name == "run" and self.at.iteration == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    monkeypatch.setattr(Trainer, "step", killing)
    whole, config = (
        options(pictures, tmp_path / name, "spcl", workers=1, epochs=2) for name in ("whole", "run")
    )
    train(whole, quiet=True)
    train(config, quiet=True)
    assert len(killed) == caplog.text.count("a process that loads images was lost") == 2
    assert_same(result(config.run), result(whole.run))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_and_says_how_to_go_on(number, pictures, tmp_path):
    """The command itself, as a terminal or a scheduler would stop it."""
    from tests.dhcl.cli.test_cli import command

    changes = {"iterations": 300, "epochs": 2, "workers": 1, "checkpoint_minutes": 1e-3}
    config = options(pictures, tmp_path / "run", **changes)
    checkpoint = config.run / "checkpoints" / "last.pt"
    process = subprocess.Popen(
        command("train", config),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("model:"):
            break
    while not checkpoint.exists():  # the first step is made
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)  # a terminal signals the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"dhcl train --resume {config.run}" in errors
    assert "Traceback" not in errors
    at = load_checkpoint(checkpoint)["progress"]
    assert 0 < at["iteration"] < 300


@pytest.mark.parametrize("moment", ["in mid-epoch", "after the last step"])
def test_an_interrupted_run_goes_on_to_the_same_bits(pictures, tmp_path, moment):
    changes = {"calibrate": "epoch", "eval_every": 1, "cluster_on": "extracted"}
    whole = options(pictures, tmp_path / "whole", **changes)
    finish(whole)
    config = options(pictures, tmp_path / "run", **changes)
    from dhcl.training.trainer import Trainer

    step = Trainer.step
    last = config.batches.iterations - 1
    iteration = 2 if moment == "in mid-epoch" else last

    def interrupting(self, *batch):
        step(self, *batch)
        if (self.at.epoch, self.at.iteration) == (1, iteration):
            os.kill(os.getpid(), signal.SIGINT)

    Trainer.step = interrupting
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(Interrupted):
            train(config)
    finally:
        Trainer.step = step
        torch.set_num_threads(threads)
    at = load_checkpoint(config.run / "checkpoints" / "last.pt")["progress"]
    if moment == "in mid-epoch":
        assert (at["epoch"], at["iteration"]) in ((1, 3), (1, 4))
    else:
        assert (at["epoch"], at["iteration"]) == (1, config.batches.iterations)
    finish(config, resume=True)
    assert_same(result(config.run), result(whole.run))


def test_a_checkpoint_of_the_format_before_goes_on_to_the_same_bits(pictures, tmp_path):
    """Of format 1, where the log's entry said how far the epoch was."""
    # With outliers, which the epoch leaves out.
    small = {"images_per_class": 4, "epochs": 2, "eps": 0.3, "min_samples": 4}
    changes = {**small, "checkpoint_minutes": CHECKPOINT_MINUTES}
    whole = options(pictures, tmp_path / "whole", "cluster-contrast", **changes)
    finish(whole)
    config = options(pictures, tmp_path / "run", "cluster-contrast", **changes)
    checkpoint = config.run / "checkpoints" / "last.pt"
    process = start(config)
    while not checkpoint.exists() or not load_checkpoint(checkpoint)["progress"]["iteration"]:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    state = load_checkpoint(checkpoint)
    assert (state["labels"] < 0).any()
    assert state["format"] == FORMAT == 2
    assert state["progress"].pop("clustered")
    assert state["progress"].pop("dropped")
    save_checkpoint(checkpoint, {**state, "format": 1})
    finish(config, resume=True)
    assert_same(result(config.run), result(whole.run))


def test_a_checkpoint_of_a_later_format_is_refused(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", epochs=1)
    train(config)
    checkpoint = config.run / "checkpoints" / "last.pt"
    save_checkpoint(checkpoint, {**load_checkpoint(checkpoint), "format": 3})
    with pytest.raises(CheckpointError, match=r"another version of dhcl, in format 3 \(known: 1"):
        train(options(pictures, tmp_path / "run", epochs=2), resume=True)


def test_more_epochs_can_be_added(pictures, tmp_path):
    whole = options(pictures, tmp_path / "whole", epochs=3)
    finish(whole)
    finish(options(pictures, tmp_path / "run", epochs=2))
    longer = options(pictures, tmp_path / "run", epochs=3)
    finish(longer, resume=True)
    assert_same(result(longer.run), result(whole.run))


def test_other_training_images_are_refused(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", epochs=1)
    train(config)
    other = write_images(tmp_path / "other", people=5)
    with pytest.raises(ConfigError, match="other training images"):
        train(options(other, tmp_path / "run", epochs=2), resume=True)


def test_a_run_is_not_overwritten(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", epochs=1)
    train(config)
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        train(config)


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_the_checkpoint_before_stays_whole(small_disk):
    path = small_disk / "last.pt"
    save_checkpoint(path, {"a": torch.arange(100_000)})
    with pytest.raises(CheckpointError, match=r"the disk is full; the one before is whole"):
        save_checkpoint(path, {"a": torch.arange(400_000)})
    assert torch.equal(load_checkpoint(path)["a"], torch.arange(100_000))
    assert list(small_disk.iterdir()) == [path]


def test_a_run_on_a_full_disk_says_so_and_goes_on_elsewhere(small_disk, pictures, tmp_path):
    from tests.dhcl.cli.test_cli import command

    config = options(pictures, small_disk / "run")
    done = subprocess.run(command("train", config), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_atomic_writes_replace_or_leave(tmp_path):
    file = tmp_path / "file"
    write_atomic(file, b"one")
    write_atomic(file, b"two")
    assert file.read_bytes() == b"two"
    write_atomic(tmp_path / "new" / "folder" / "file", b"three")
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"three"
    with pytest.raises(OSError):
        write_atomic(file / "below a file", b"four")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", b"five")
    assert file.read_bytes() == b"two"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "new", "taken"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_checkpoints_are_named(content, tmp_path):
    file = tmp_path / "last.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read"):
        load_checkpoint(file)
