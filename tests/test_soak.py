"""What judges a soak, and the calls that it makes; hours of it are `python -m tests.soak`."""

import json
import os
import random

import pytest

import dhcl_ops
from tests.soak import CALLS, LIMITS, Shapes, calls, conclude, judged, own_memory, samples


def taken(count=400, **growth):
    """Samples with an allocator's noise, which grow by so much from the warm-up to the end."""
    draw = random.Random(0)
    levels = {"memory": 800.0, "files": 12, "threads": 3}
    for number in range(count):
        share = number / count / 0.75
        grown = {name: growth.get(name, 0) * share for name in levels}
        # The first ones are of caches that fill, and of no trend.
        filling = -300.0 if number < 0.2 * count else 0.0
        noise = {"memory": draw.gauss(0, 15) + filling, "files": draw.choice([0, 0, 2])}
        found = {name: level + grown[name] + noise.get(name, 0) for name, level in levels.items()}
        yield {"done": 20 * number, "seconds": 0.1 * number, **found}


def test_noise_and_warm_up_are_no_growth():
    assert all(each["flat"] for each in judged(list(taken())).values())


@pytest.mark.parametrize(("name", "much"), [("memory", 40), ("files", 3), ("threads", 1)])
def test_what_grows_is_named_alone(name, much):
    verdict = judged(list(taken(**{name: much})))
    assert [each for each in verdict if not verdict[each]["flat"]] == [name]
    assert verdict[name]["growth"] == pytest.approx(much, abs=LIMITS[name])


def test_few_samples_are_no_verdict(tmp_path):
    assert judged(list(taken(10))) == {}
    assert not conclude(tmp_path)


def test_every_op_is_called():
    functions = {name for name in dhcl_ops.__all__ if name[0].islower()} - {"status"}
    assert functions == set(CALLS)


def test_a_short_soak_of_the_calls(tmp_path):
    calls(tmp_path, 20 * 14)
    found = samples(tmp_path / "calls.jsonl")
    assert len(found) == 14
    assert found[-1]["done"] == 280
    assert found[-1]["files"] >= 3
    with (tmp_path / "calls.jsonl").open("a") as file:
        file.write('{"done": 300, "sec')  # a soak that was cut short
    with (tmp_path / "epochs.jsonl").open("w") as file:
        file.writelines(json.dumps(each) + "\n" for each in taken(files=2))
    assert not conclude(tmp_path)
    about = json.loads((tmp_path / "soak.json").read_text())
    assert about["calls"]["done"] == 280
    assert not about["epochs"]["files"]["flat"]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_leak_of_a_call_is_found(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(CALLS, "knn", lambda shapes: opened.append(os.open("/dev/null", 0)))
    for name in CALLS.keys() - {"knn"}:
        monkeypatch.delitem(CALLS, name)
    calls(tmp_path, 20 * 20)
    for handle in opened:
        os.close(handle)
    verdict = judged(samples(tmp_path / "calls.jsonl"))
    assert not verdict["files"]["flat"]
    assert verdict["threads"]["flat"]


def test_memory_that_is_allocated_counts():
    before = own_memory()
    block = bytearray(64 << 20)
    assert own_memory() - before == pytest.approx(64, abs=8)
    del block


def test_shapes_follow_from_the_seed():
    a, b = Shapes(3), Shapes(3)
    assert a.rows().equal(b.rows())
    assert a.count() == b.count()
