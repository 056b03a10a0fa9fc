"""Processes of a training that are killed, stopped, late or end by an error: the others are told.

Signals are real, and come from outside; the processes are forked from one with all imports done.
"""

import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch
from dhcl.cli import main
from dhcl.errors import Interrupted, PeerLost
from dhcl.training.checkpoint import how_to_go_on
from dhcl.training.peers import Peers

from tests.dhcl.toy import command_line, options

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.dhcl.training.test_peers"])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(rank, world, port, folder, function, args):
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for number, name in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(folder / f"{name}{rank}", flags), number)
    raise SystemExit(function(rank, folder, *args))


def start(folder, function, *args, world=2, ranks=None):
    """Processes of the ranks, of which each writes to ``out`` and ``err``, with its number."""
    port = free_port()
    processes = []
    for rank in range(world) if ranks is None else ranks:
        of_rank = (rank, world, port, folder, function, args)
        processes.append(_SERVER.Process(target=_rank, args=of_rank))
        processes[-1].start()
    return processes


def wait_for(path, text):
    end = time.monotonic() + 120
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path.name}"
        time.sleep(0.01)


def ended(process, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "it waits for ever"
    return process.exitcode


# ---- peers alone ---------------------------------------------------------------------------------

SECONDS = 2


def meets(rank, folder, how, hang):
    """Meets the others twice; in between rank 1 does something, and rank 0 may hang."""
    try:
        peers = Peers.of_environment(SECONDS, lambda: "go on so")
        with peers.watched():
            peers.meet()
            peers.stage = "clustering of epoch 3"
            print("met", flush=True)
            if rank == 1:
                if how == "long":
                    time.sleep(2 * SECONDS)
                elif how == "error":
                    raise ValueError("the disk is full\nand more")
                elif how != "leaves":
                    time.sleep(60)
            if hang and rank == 0:
                time.sleep(120)
            if how != "leaves":
                peers.meet()
    except PeerLost as error:
        print(f"lost: {error}, speaks: {error.speaks}", flush=True)
        return 1
    except ValueError:
        return 3
    print("together", flush=True)
    return 0


def lost_by(folder, *, how="signal", number=None, world=2, hang=False, victim=1):
    """Exit status and output of each rank, with a signal to rank 1 after the first meeting."""
    processes = start(folder, meets, how, hang, world=world)
    for rank in range(world):
        wait_for(folder / f"out{rank}", "met")
    began = time.monotonic()
    if number is not None:
        os.kill(processes[victim].pid, number)
    found = {r: ended(p) for r, p in enumerate(processes) if number is None or r != victim}
    took = time.monotonic() - began
    if number is not None:
        processes[victim].kill()
        processes[victim].join()
    texts = {rank: (folder / f"out{rank}").read_text() for rank in found}
    return found, texts, took, processes[victim].pid


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_stopped_or_killed_is_named_in_bounded_time(number, tmp_path):
    found, texts, took, pid = lost_by(tmp_path, number=number, world=3)
    assert found == {0: 1, 2: 1}
    assert SECONDS / 2 < took < SECONDS + 8
    where = 'in the stage "clustering of epoch 3"; go on so'
    who = f"rank 1 (process {pid} on {socket.gethostname()})"
    assert f"lost: {who} was lost: it gave no sign of life for 2 s, {where}" in texts[0]
    assert texts[0].endswith("speaks: True\n")
    assert texts[2].endswith("speaks: False\n")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_first_rank_which_has_the_store_is_found_too(number, tmp_path):
    """A client of a store that hangs can't return, so the process is ended for it."""
    found, texts, took, pid = lost_by(tmp_path, number=number, victim=0)
    assert found == {1: 1}
    assert took < SECONDS + 20
    said = texts[1] + (tmp_path / "err1").read_text()
    assert f"rank 0 (process {pid} on" in said
    assert "does not answer" in said
    assert said.count("go on so") == 1


def test_a_main_thread_that_hangs_is_ended_with_the_message(tmp_path):
    found, _, took, _ = lost_by(tmp_path, number=signal.SIGSTOP, hang=True)
    assert found == {0: 1}
    assert SECONDS < took < SECONDS + 20
    said = (tmp_path / "err0").read_text()
    assert said.count("dhcl: rank 1 (process") == 1
    assert "Traceback" not in said


def test_a_long_stage_is_no_loss(tmp_path):
    found, texts, took, _ = lost_by(tmp_path, how="long")
    assert found == {0: 0, 1: 0}
    assert took > 2 * SECONDS - 1
    assert all("together" in text for text in texts.values())


def test_an_error_of_one_rank_ends_the_others_at_once(tmp_path):
    found, texts, took, _ = lost_by(tmp_path, how="error")
    assert found == {0: 1, 1: 3}
    assert took < SECONDS + 3
    assert "ended: the disk is full, in the stage" in texts[0]


def test_a_rank_that_is_done_is_not_missed(tmp_path):
    found, _, _, _ = lost_by(tmp_path, how="leaves")
    assert found == {0: 0, 1: 0}


@pytest.mark.parametrize("there", [0, 1])
def test_a_rank_that_never_comes_is_named(there, tmp_path):
    began = time.monotonic()
    (process,) = start(tmp_path, meets, "", False, ranks=[there])
    assert ended(process) == 1
    assert time.monotonic() - began < SECONDS + 15
    said = (tmp_path / f"out{there}").read_text()
    assert f"lost: rank {1 - there} did not come" in said
    assert 'in the stage "start"; go on so, speaks: True' in said
    assert (tmp_path / f"err{there}").read_text() == ""


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    peers = Peers.of_environment(1, lambda: "")
    assert peers.world == 1
    peers.meet()
    with pytest.raises(Interrupted), peers.watched():
        raise Interrupted(signal.SIGINT)


# ---- a training ----------------------------------------------------------------------------------


def trains(rank, folder, arguments):
    return main(["train", *arguments])


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGSTOP, marks=pytest.mark.long), signal.SIGKILL]
)
def test_a_training_says_which_rank_and_goes_on(number, pictures, tmp_path):
    config = options(pictures, tmp_path / "run", epochs=100, iterations=4, timeout_minutes=0.1)
    first, second = start(tmp_path, trains, command_line(config))
    wait_for(tmp_path / "out0", "\nepoch 2/100:")
    os.kill(second.pid, number)
    assert ended(first, 40) == 1
    second.kill()
    second.join()
    said = (tmp_path / "err0").read_text()
    line = said.splitlines()[-1]
    assert f"dhcl: rank 1 (process {second.pid} on {socket.gethostname()}) was lost" in line
    assert 'in the stage "' in line
    command = f"torchrun --nproc-per-node 2 -m dhcl train --resume {config.run}"
    assert f"go on from the last checkpoint with: {command}" in line
    assert "Traceback" not in said
    assert said.count("dhcl: ") == 1
    epochs = str((config.run / "log.jsonl").read_text().count("\n") + 1)
    more = ["--resume", str(config.run), "--epochs", epochs]
    assert [ended(each) for each in start(tmp_path, trains, more)] == [0, 0]
    assert "goes on in epoch" in (tmp_path / "out0").read_text()


def test_how_to_go_on(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    assert how_to_go_on(run) == f"no checkpoint yet; start again with: dhcl train --resume {run}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pt").touch()
    there = "go on from the last checkpoint"
    assert how_to_go_on(run) == f"{there} with: dhcl train --resume {run}"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "torchrun --nproc-per-node 4 -m dhcl train --resume" in how_to_go_on(run)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "all 4 processes started as before, with: -m dhcl train" in how_to_go_on(run)
