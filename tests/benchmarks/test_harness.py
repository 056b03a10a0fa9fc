"""Tests of the benchmark harness; none of them asserts how long something takes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the benchmarks are not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    Bench,
    Ceilings,
    Results,
    Row,
    SchemaError,
    Variant,
    compare,
    load_results,
    max_difference,
    peak_extra_bytes,
)

CEILINGS = Ceilings("cpu", 1, 20e9, 25e9, {"fp32": 1e11})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_bench(*options: str) -> Bench:
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    base = ["--device", "cpu", "--threads", "1", "--seconds", "0.02"]
    return Bench(parser.parse_args([*base, *options]), CEILINGS)


def make_row(variant: str = "dhcl", seconds: float = 1e-3, **changes: Any) -> Row:
    row = Row(
        op="gather",
        variant=variant,
        params={"B": 64, "dtype": "float32"},
        device="cpu",
        threads=1,
        seconds=seconds,
        iqr_seconds=0.02 * seconds,
        runs=20,
        calls=200,
        bytes_moved=1024,
        flop=0,
    )
    return dataclasses.replace(row, **changes)


def make_results(*rows: Row, **machine: Any) -> Results:
    return Results(machine={"cpu": "some processor", **machine}, ceilings=CEILINGS, rows=[*rows])


def test_json_round_trip(tmp_path: Path) -> None:
    full = make_row(
        floor_seconds=1e-4,
        floor_kind="memory",
        time_over_floor=10.0,
        peak_extra_bytes=4096,
        max_difference=math.inf,
        baseline="pytorch loop",
        speedup=2.0,
        note="a note",
    )
    single = make_row("pytorch loop", iqr_seconds=None, runs=1, calls=1, max_difference=0.5)
    results = make_results(full, single)
    results.skipped.append("gather: out of GPU memory")
    path = tmp_path / "deeper" / "results.json"
    results.save(path)
    assert load_results(path) == results
    assert json.loads(path.read_text())["schema_version"] == harness.SCHEMA_VERSION


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    make_results(make_row()).save(path)
    before = path.read_text()
    with pytest.raises(ValueError):  # JSON has no NaN
        make_results(make_row(seconds=math.nan)).save(path)

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", broken)
        with pytest.raises(OSError, match="disk full"):
            make_results().save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=99), "schema_version 99, expected"),
        (lambda data: data.pop("schema_version"), "schema_version None"),
        (lambda data: data.pop("rows"), r"missing field\(s\) rows"),
        (lambda data: data["rows"][0].pop("seconds"), r"row 0: missing field\(s\) seconds"),
        (lambda data: data["rows"][0].update(colour="red"), r"row 0: unknown field\(s\) colour"),
        (lambda data: data["rows"][0].update(seconds="fast"), "field seconds must be float"),
        (lambda data: data["rows"][0].update(runs=None), "field runs must be int"),
        (lambda data: data["rows"][0].update(seconds=0.0), "row 0: time not positive"),
        (lambda data: data["rows"].append(data["rows"][0]), "row 1: .*a second row gather"),
        (lambda data: data["rows"].append(5), "row 1: expected an object, found int"),
        (lambda data: data["ceilings"].pop("threads"), "ceilings: missing"),
    ],
)
def test_schema_errors(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "results.json"
    make_results(make_row()).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(SchemaError, match=message):
        load_results(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5"])
def test_files_of_another_kind(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SchemaError, match=r"results\.json"):
        load_results(path)


def test_compare() -> None:
    old = make_results(
        make_row("slower", 1.0),
        make_row("faster", 1.0),
        make_row("under 5 %", 1.0, iqr_seconds=0.0),
        make_row("within the spread", 1.0, iqr_seconds=0.15),
        make_row("single run", 1.0, iqr_seconds=None, runs=1),
        make_row("gone"),
        gpu="one",
    )
    new = make_results(
        make_row("slower", 1.1),
        make_row("faster", 0.5),
        make_row("under 5 %", 1.04, iqr_seconds=0.0),
        make_row("within the spread", 1.2, iqr_seconds=0.1),
        make_row("single run", 1.15, iqr_seconds=None, runs=1),
        make_row("added"),
        gpu="two",
    )
    found = compare(old, new)
    assert [c.key for c in found.slower] == [make_row("slower").key]
    assert (found.slower[0].old_seconds, found.slower[0].new_seconds) == (1.0, 1.1)
    assert [c.key for c in found.faster] == [make_row("faster").key]
    assert found.only_old == [make_row("gone").key]
    assert found.only_new == [make_row("added").key]
    assert found.machine == ["gpu: one -> two"]
    assert "slower: gather [B=64 dtype=float32]: slower" in str(found)
    assert "(1.10x)" in str(found)
    assert str(compare(old, old)) == "no difference beyond the noise"


def test_rows_differing_in_parameters_are_not_compared() -> None:
    old, new = make_row(), make_row(params={"B": 128, "dtype": "float32"})
    found = compare(make_results(old), make_results(new))
    assert (found.only_old, found.only_new) == ([old.key], [new.key])


@pytest.mark.parametrize("repeat", range(3))
def test_peak_memory_sees_a_temporary(repeat: int) -> None:
    size = 64 << 20
    held = [torch.ones(size // 4) for _ in range(2)]  # freed memory must not hide the temporary
    del held
    peak = peak_extra_bytes(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("this system does not tell the peak memory")
    assert peak == pytest.approx(size, rel=0.1)


def test_peak_memory_of_many_small_temporaries() -> None:
    x = torch.randn(256, 256)

    def loop() -> torch.Tensor:  # holds 0.25 MiB at a time, and a heap with gaps would grow
        return torch.stack([(x - row).square().sum(1) for row in x])

    for _ in range(3):
        loop()
    peak = peak_extra_bytes(loop)
    if peak is None:
        pytest.skip("this system does not tell the peak memory")
    assert peak < 8 << 20


def test_peak_memory_passes_errors_and_gradient_mode_on() -> None:
    modes = []
    with torch.no_grad():
        peak_extra_bytes(lambda: modes.append(torch.is_grad_enabled()))
    assert set(modes) == {False}
    with pytest.raises(ZeroDivisionError):
        peak_extra_bytes(lambda: 1 // 0)


def test_max_difference() -> None:
    a = torch.tensor([1.0, 2.0, math.nan, math.inf])
    assert max_difference(a, a.clone()) == 0
    assert max_difference(a, torch.tensor([1.0, 2.5, math.nan, math.inf])) == 0.5
    assert max_difference(a, torch.tensor([1.0, 2.0, 0.0, math.inf])) == math.inf
    assert max_difference(a, torch.tensor([1.0, 2.0, math.nan, -math.inf])) == math.inf
    assert max_difference(torch.ones(2), torch.ones(3)) == math.inf
    assert max_difference(torch.ones(0), torch.ones(0)) == 0
    assert max_difference(torch.tensor([True, False]), torch.tensor([1, 3])) == 3
    nested = {"loss": torch.tensor(1.0), "more": (None, [torch.zeros(2), 4])}
    other = {"loss": torch.tensor(1.25), "more": (None, [torch.zeros(2), 6])}
    assert max_difference(nested, other) == 2
    assert max_difference(nested, {"loss": 1.0}) == math.inf
    assert max_difference((1.0, None), (1.0, 2.0)) == math.inf
    large = torch.zeros((1 << 22) + 3)  # more than one chunk
    changed = large.clone()
    changed[-1] = 7
    assert max_difference(large, changed) == 7


def test_run_case(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    bench = make_bench("--json", str(path))
    x = torch.arange(4096.0)
    variants = [
        Variant("dhcl", lambda: x + 1.5, note="a note"),
        Variant("pytorch loop", lambda: torch.stack([v + 1 for v in x[:64]]).new_ones(1) + x),
        Variant("wrong shape", lambda: x[:10]),
    ]
    params = {"N": 4096, "dtype": torch.float32}
    rows = bench.run_case(
        "add",
        params,
        variants,
        baseline="pytorch loop",
        bytes_read=4 * 4096,
        bytes_written=4 * 4096,
        flop=4096,
    )
    assert [row.variant for row in rows] == ["dhcl", "pytorch loop", "wrong shape"]
    assert [row.max_difference for row in rows] == [0.5, None, math.inf]
    base = rows[1]
    for row in rows:
        assert row.params == {"N": 4096, "dtype": "float32"}
        assert row.baseline == "pytorch loop"
        assert row.speedup == pytest.approx(base.seconds / row.seconds)
        assert row.runs >= harness.ROUNDS
        assert row.calls >= row.runs
        assert row.floor_seconds == pytest.approx(8 * 4096 / 20e9)
        assert row.floor_kind == "memory"
        assert row.time_over_floor == pytest.approx(row.seconds / (8 * 4096 / 20e9))
        assert (row.bytes_moved, row.flop, row.timing) == (8 * 4096, 4096, "calls")
    assert base.speedup == 1
    assert rows[0].note.startswith("a note")
    assert load_results(path).rows == rows  # written after each case
    with pytest.raises(ValueError, match="measured before"):
        bench.run_case("add", params, variants, baseline="dhcl")
    with pytest.raises(ValueError, match="contain the baseline 'other'"):
        bench.run_case("sub", params, variants, baseline="other")
    with pytest.raises(ValueError, match="rate must be one of"):
        bench.run_case("sub", params, variants, baseline="dhcl", rate="fp8")


def test_given_reference_and_calls_in_place() -> None:
    totals = [torch.zeros(3), torch.zeros(3)]
    variants = [Variant(str(i), functools.partial(t.add_, 1)) for i, t in enumerate(totals)]
    bench = make_bench()
    rows = bench.run_case("own copies", {}, variants, baseline="0")
    assert [row.max_difference for row in rows] == [None, 0]  # the first results count
    variants = [Variant("a", lambda: torch.ones(3)), Variant("b", lambda: torch.zeros(3))]
    rows = bench.run_case("reference", {}, variants, baseline="a", reference=torch.zeros(3))
    assert [row.max_difference for row in rows] == [1, 0]


def test_long_calls_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"long": 0, "short": 0}
    clock = 0.0

    def spend(name: str, seconds: float) -> None:
        nonlocal clock
        calls[name] += 1
        clock += seconds

    bench = make_bench()
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    variants = [
        Variant("long", lambda: spend("long", 61 * 0.02)),
        Variant("short", lambda: spend("short", 6 * 0.02)),
    ]
    long, short = bench.run_case("wait", {}, variants, baseline="long")
    # The short one is called once more to warm up, and neither for the memory measurement.
    assert calls == {"long": 1, "short": 2}
    assert (long.runs, long.calls, long.iqr_seconds) == (1, 1, None)
    assert (short.runs, short.calls, short.iqr_seconds) == (1, 1, None)
    assert long.seconds == pytest.approx(61 * 0.02)
    assert long.peak_extra_bytes is None
    assert short.speedup == pytest.approx(61 / 6)
    assert "one run, not warmed up" in long.note
    assert "one run" not in short.note


def test_running_out_of_gpu_memory_skips_the_variant(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise torch.cuda.OutOfMemoryError("too large")

    bench = make_bench()
    variants = [Variant("base", full), Variant("other", lambda: torch.ones(2))]
    rows = bench.run_case("big", {}, variants, baseline="base")
    assert [(row.variant, row.speedup, row.max_difference) for row in rows] == [
        ("other", None, None)
    ]
    assert bench.results.skipped == ["big []: base: out of GPU memory"]
    bench.finish()
    assert "skipped: big []: base" in capsys.readouterr().out


def test_only_selects_cases() -> None:
    bench = make_bench("--only", "N=8")
    assert bench.wanted("add", {"N": 8})
    assert not bench.wanted("add", {"N": 16})
    assert bench.run_case("add", {"N": 16}, [], baseline="none") == []


def test_table() -> None:
    rows = [
        make_row("pytorch loop", 2.5, baseline="pytorch loop", speedup=1.0, iqr_seconds=None),
        make_row(
            "dhcl",
            1.25e-3,
            baseline="pytorch loop",
            speedup=2000.0,
            floor_seconds=1e-3,
            floor_kind="memory",
            time_over_floor=1.25,
            peak_extra_bytes=3 << 20,
            max_difference=1e-6,
            timing="cuda graph",
            note="a note",
        ),
    ]
    head, rule, first, second = harness.render_table(rows).splitlines()
    assert rule == "-" * len(rule)
    assert len(rule) == max(map(len, (head, first, second)))
    assert "pytorch loop (baseline)" in first
    assert "2.5 s" in first
    assert "1.00x" in first
    for text in ("1.25 ms", "2.0 %", "2000.00x", "80.0 % mem", "3.0 MiB", "1e-06"):
        assert text in second
    assert second.endswith("cuda graph; a note")
    for column in ("time", "speed-up", "of ceiling", "peak memory", "max diff"):
        assert column in head
    ends = [line.index(text) + len(text) for line, text in ((head, "time"), (first, "2.5 s"))]
    assert ends[0] == ends[1]
    assert harness.render_table([]).startswith("case")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2500, "2500 s"), (1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us"), (3e-9, "3 ns")],
)
def test_time_units(seconds: float, text: str) -> None:
    assert harness.format_seconds(seconds) == text


def test_ceilings_are_positive() -> None:
    precision = torch.get_float32_matmul_precision()
    found = harness.measure_ceilings("cpu", 1, 0.01, array_bytes=8 << 20, matrix_size=128)
    assert (found.device, found.threads) == ("cpu", 1)
    assert found.copy_bytes_per_second > 0
    assert found.read_bytes_per_second > 0
    assert found.flop_per_second.keys() == {"fp32"}
    assert found.flop_per_second["fp32"] > 0
    assert torch.get_float32_matmul_precision() == precision


def test_floor() -> None:
    for traffic, flop, expected, expected_kind in (
        ((25, 0), 0, 1e-9, "memory"),
        ((10, 10), 0, 1e-9, "memory"),
        ((35, 10), 0, 2e-9, "memory"),
        ((0, 20), 0, 1e-9, "memory"),
        ((25, 0), 1000, 1e-8, "compute"),
    ):
        seconds, kind = CEILINGS.floor(*traffic, flop, "fp32")
        assert seconds == pytest.approx(expected)
        assert kind == expected_kind
    assert CEILINGS.floor(0, 0, 0, "fp32") == (None, "")
    assert CEILINGS.floor(25, 0, 1000, "bf16") == (None, "")  # not measured on this device


def test_machine_facts_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = harness.machine_facts(2, tmp_path)
    assert facts["git_commit"] is None
    assert facts["git_dirty"] is None
    assert facts["cpu"]
    assert facts["threads"] == 2
    assert facts["torch"] == torch.__version__
    json.dumps(facts, allow_nan=False)
    monkeypatch.setenv("PATH", "")  # no git at all
    assert harness.machine_facts(1)["git_commit"] is None


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    args = parser.parse_args(["--quick", "--device", "cpu"])
    assert Bench(args, CEILINGS).seconds == 0.1
    for wrong in (["--threads", "0"], ["--seconds", "-1"], ["--seconds", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    capsys.readouterr()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            Bench(parser.parse_args(["--device", "cuda"]), CEILINGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    args = parser.parse_args(["--device", "cuda", "--seconds", "0.05"])
    ceilings = harness.measure_ceilings("cuda", 1, 0.02, array_bytes=64 << 20, matrix_size=512)
    assert ceilings.flop_per_second.keys() == set(harness.RATES)
    x = torch.ones(1 << 24, device="cuda")
    assert peak_extra_bytes(lambda: (x + 1).sum(), "cuda") == pytest.approx(64 << 20, rel=0.1)
    call = lambda: x * 2  # noqa: E731
    variants = [Variant("calls", call), Variant("graph", call, cuda_graph=True)]
    rows = Bench(args, ceilings).run_case("double", {}, variants, baseline="calls")
    assert [row.timing for row in rows] == ["calls", "cuda graph"]
    assert rows[1].max_difference == 0
