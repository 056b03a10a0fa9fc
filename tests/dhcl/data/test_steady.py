"""Processes that load images are killed or stopped: the batches come all the same."""

import logging
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dhcl.data import EvalImages, ImageList, check_images, eval_loader, image_files
from dhcl.data.steady import SteadyLoader
from dhcl.errors import DataError, WorkerLost
from dhcl.files import write_atomic

from tests.dhcl.hanging import hanging, needs_mount, release


class Numbers:
    def __getitem__(self, number):
        return torch.full((3,), number)


BATCHES = [[number, number + 1] for number in range(0, 24, 2)]


def disturbed(signals, *, workers=2, seconds=60.0, persistent=False):
    """The first number of each batch, with signals to a process of the loader at some of them."""
    loader = SteadyLoader(
        Numbers(), BATCHES, seconds=seconds, num_workers=workers, persistent_workers=persistent
    )
    found = []
    for place, batch in enumerate(loader):
        if place in signals:
            process = multiprocessing.active_children()[0]
            os.kill(process.pid, signals[place])
            if signals[place] == signal.SIGKILL:
                process.join()
        assert batch.shape == (2, 3)
        found += batch[:, 0].tolist()
    assert found == list(range(24))
    assert bool(multiprocessing.active_children()) == persistent


@pytest.mark.parametrize("places", [[0], [3, 4, 9], [11]])
def test_killed_ones_are_replaced_and_named(places, caplog):
    with caplog.at_level(logging.WARNING):
        disturbed(dict.fromkeys(places, signal.SIGKILL))
    said = [record.getMessage() for record in caplog.records]
    # What the last batch's process had to do was done.
    assert len(said) == len([place for place in places if place < 11])
    for place, text in zip(places, said, strict=False):
        assert "a process that loads images was lost (DataLoader worker (pid" in text
        assert f"new ones go on from batch {place + 2} of 12" in text


def test_one_that_is_stopped_is_not_waited_for(caplog):
    began = time.monotonic()
    disturbed({2: signal.SIGSTOP}, workers=1, seconds=4)
    assert time.monotonic() - began < 40
    assert "was lost (no answer for 4 s); new ones go on from batch" in caplog.text


def test_those_that_are_kept_are_replaced_too():
    disturbed({5: signal.SIGKILL}, persistent=True)


def test_too_many_losses_are_an_error():
    with pytest.raises(WorkerLost, match="the 4th in one pass; fewer workers take less memory"):
        disturbed(dict.fromkeys(range(2, 6), signal.SIGKILL))
    assert not multiprocessing.active_children()


def test_a_death_is_no_error_elsewhere():
    """As in the middle of an optimiser's step, which would be half done."""
    loader = iter(SteadyLoader(Numbers(), BATCHES, seconds=60, num_workers=1))
    next(loader)
    process = multiprocessing.active_children()[0]
    process.kill()
    process.join()
    for _ in range(1000):
        torch.zeros(2).sum()
    assert next(loader)[0, 0] == 2
    loader.close()


def test_errors_of_the_data_set_are_not_taken_for_losses():
    class Broken:
        def __getitem__(self, number):
            raise RuntimeError("DataLoader worker is what this data set says")

    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process"):
        list(SteadyLoader(Broken(), BATCHES, seconds=60, num_workers=1))


def test_it_may_be_left_and_begun_again():
    loader = SteadyLoader(Numbers(), BATCHES, seconds=60, num_workers=1)
    assert len(loader) == 12
    for _ in range(2):
        for batch in loader:
            assert batch[0, 0] == 0
            break
    assert [batch[0, 0].item() for batch in loader] == list(range(0, 24, 2))


@needs_mount
def test_a_folder_that_hangs_is_named(tmp_path, caplog):
    """Processes that wait for it are replaced in vain, and then it is an error."""
    images = ImageList([tmp_path / "a.png"], [0], [0])
    loader = eval_loader(EvalImages(images, torch.Tensor.float), workers=1, seconds=0.5)
    with hanging(tmp_path), pytest.raises(WorkerLost, match="is slow, or has stopped") as raised:
        list(loader)
    assert f"(no answer for 0.5 s while it reads from {tmp_path})" in str(raised.value)
    assert caplog.text.count("new ones go on from batch 1 of 1") == 3
    assert not multiprocessing.active_children()


@needs_mount
@pytest.mark.parametrize("work", ["load", "check", "look", "write"])
def test_the_process_says_what_it_waits_for_itself(work, tmp_path, caplog, monkeypatch):
    """It can't give up, and goes on when the folder is back, here with an error."""
    monkeypatch.setattr("dhcl.files.LONG", 0.1)
    images = ImageList([tmp_path / "a.png"], [0], [0])
    works = {
        "load": lambda: list(eval_loader(EvalImages(images, torch.Tensor.float), seconds=0.1)),
        "check": lambda: check_images({"train": images}),
        "look": lambda: image_files(tmp_path),
        "write": lambda: write_atomic(tmp_path / "file", b"some"),
    }
    with hanging(tmp_path), ThreadPoolExecutor(1) as pool:
        try:
            done = pool.submit(works[work])
            for _ in range(100):
                if "has kept this process waiting for 0.1 s; its disk" in caplog.text:
                    break
                time.sleep(0.05)
            assert not done.done()
            assert str(tmp_path) in caplog.text
        finally:
            release(tmp_path)
        assert isinstance(done.exception(10), (OSError, DataError))
