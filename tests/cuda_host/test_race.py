"""Tests of the race detector (race.h) by way of race_selftest.cu, and of the kernels under it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cuda_host import build

REASON = build.missing() or build.race_missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NONE, BARRIER, VOTE, WARP_BARRIER, SHUFFLE, HALF_WARP_BARRIER = range(6)
PLAIN, ATOMIC, MIXED, VOLATILE, VOLATILE_READ = range(5)


@pytest.fixture(params=["forward", "reverse", "shuffle:1"])
def detector(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The kernels in each order of threads: what is found does not depend on it."""
    module = build.load("race_selftest", [build.HERE / "race_selftest.cu"], race=True)
    module.set_schedule(request.param)
    yield module
    module.set_schedule("")


def line_of(text: str) -> int:
    lines = (build.HERE / "race_selftest.cu").read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if text in line]
    return found


@pytest.mark.parametrize("order", [NONE, SHUFFLE, HALF_WARP_BARRIER, WARP_BARRIER])
def test_what_does_not_order_a_block(detector: Any, order: int) -> None:
    write, read = line_of("values[self] = self;"), line_of("out[self] = values[self / reach")
    with pytest.raises(RuntimeError, match="data race in kernel exchange:") as error:
        detector.exchange(order, 64)
    places = set(map(int, re.findall(r"race_selftest\.cu:(\d+)", str(error.value))))
    assert places == {write, read}
    assert "shared memory" in str(error.value)


@pytest.mark.parametrize("order", [BARRIER, VOTE])
def test_what_orders_a_block(detector: Any, order: int) -> None:
    detector.exchange(order, 64)
    detector.exchange_in_dynamic_memory(order)


@pytest.mark.parametrize("order", [NONE, WARP_BARRIER])
def test_dynamic_shared_memory(detector: Any, order: int) -> None:
    with pytest.raises(RuntimeError, match="data race in kernel exchange_in_dynamic_memory:"):
        detector.exchange_in_dynamic_memory(order)


def test_what_orders_a_warp(detector: Any) -> None:
    detector.exchange(WARP_BARRIER, 32)
    detector.exchange(HALF_WARP_BARRIER, 16)
    for order, reach in [(HALF_WARP_BARRIER, 32), (SHUFFLE, 16), (NONE, 2)]:
        with pytest.raises(RuntimeError, match="data race"):
            detector.exchange(order, reach)


def test_a_write_after_others_have_read(detector: Any) -> None:
    detector.write_after_read(True)
    with pytest.raises(RuntimeError, match="data race in kernel write_after_read:"):
        detector.write_after_read(False)


@pytest.mark.parametrize("how", [PLAIN, MIXED, VOLATILE_READ])
def test_blocks_are_not_ordered(detector: Any, how: int) -> None:
    with pytest.raises(RuntimeError, match=r"data race in kernel blocks_meet:\n  global memory"):
        detector.blocks_meet(how, 3)
    detector.blocks_meet(how, 1)  # one block, and launches follow each other


@pytest.mark.parametrize("how", [ATOMIC, VOLATILE])
def test_atomic_and_volatile_accesses_may_meet(detector: Any, how: int) -> None:
    detector.blocks_meet(how, 3)


def test_neighbouring_elements_are_no_race(detector: Any) -> None:
    detector.neighbours()


@pytest.mark.parametrize("dynamic", [False, True])
def test_shared_memory_that_was_not_written(detector: Any, dynamic: bool) -> None:
    detector.read_garbage(dynamic, True)
    with pytest.raises(RuntimeError, match="which this block has not written"):
        detector.read_garbage(dynamic, False)


@pytest.mark.parametrize("writer", [0, 40, 63, 64, 100, 191])
def test_a_writer_among_more_readers_than_are_kept(detector: Any, writer: int) -> None:
    with pytest.raises(RuntimeError, match="data race in kernel many_readers:"):
        detector.many_readers(writer)


def test_a_barrier_taken_away(detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_of("if (order == Order::kBarrier) __syncthreads();")
    monkeypatch.setenv("DHCL_HOST_RACE_WITHOUT", f"race_selftest.cu:{line}")
    with pytest.raises(RuntimeError, match="data race in kernel exchange:"):
        detector.exchange(BARRIER, 64)
    detector.exchange(VOTE, 64)


def races(*words: str) -> subprocess.CompletedProcess[str]:
    """What `python -m tests.cuda_host.races --short` with more words gives, a success."""
    command = [sys.executable, "-m", "tests.cuda_host.races", "--short", *words]
    done = subprocess.run(command, cwd=build.HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done


def test_kernels_have_no_race() -> None:
    assert " passed" in races().stdout


@pytest.mark.long
def test_kernels_need_their_barriers() -> None:
    done = races("--mutate")
    found = re.search(r"barriers: (\d+) of (\d+) are missed", done.stdout)
    assert found is not None
    assert int(found[1]) > 0.7 * int(found[2]) > 20
