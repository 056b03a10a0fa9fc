"""Tests of the CUDA emulator itself (cuda_host.h, build.py), by way of selftest.cu."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
FULL = 0xFFFFFFFF
POISON = int(np.array(0xCDCDCDCD, np.uint32).view(np.int32))
SCHEDULES = ["forward", "reverse", "shuffle:1", "shuffle:2"]


def _load_build() -> ModuleType:
    # By path: `build` is also the name of a PyPI package and of a folder of tests.
    spec = importlib.util.spec_from_file_location("cuda_host_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
if build.missing() is not None:
    pytest.skip(build.missing(), allow_module_level=True)


def load_selftest(sanitize: bool = False) -> Any:
    sources = [HERE / "selftest.cu", HERE / "selftest_binding.cpp"]
    return build.load("cuda_host_selftest", sources, sanitize=sanitize)


@pytest.fixture(scope="session")
def emulator() -> Any:
    return load_selftest()


@pytest.fixture(params=SCHEDULES)
def cuda(request: pytest.FixtureRequest, emulator: Any) -> Iterator[Any]:
    """The selftest under each schedule: what is correct does not depend on it."""
    emulator.set_schedule(request.param)
    yield emulator
    emulator.set_schedule("")


# ---- threads and blocks ----


def test_coordinates(cuda: Any) -> None:
    grid, block = (3, 2, 2), (5, 3, 4)
    rows = cuda.coordinates(grid, block)
    axes = [range(n) for n in (*reversed(grid), *reversed(block))]
    expected = [
        (bx, by, bz, tx, ty, tz)
        for bz in axes[0]
        for by in axes[1]
        for bx in axes[2]
        for tz in axes[3]
        for ty in axes[4]
        for tx in axes[5]
    ]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(("rows", "columns", "threads"), [(1, 1, 32), (7, 333, 128), (3, 70, 1024)])
def test_row_sums(cuda: Any, rows: int, columns: int, threads: int) -> None:
    x = np.random.default_rng(0).integers(-50, 50, (rows, columns)).astype(np.float32)
    for sums in cuda.row_sums(x, threads):
        np.testing.assert_array_equal(sums, x.sum(1))


@pytest.mark.parametrize("threads", [1, 2, 31, 33, 100])
def test_row_sums_in_an_odd_block(cuda: Any, threads: int) -> None:
    x = np.arange(2 * 77, dtype=np.float32).reshape(2, 77)
    by_tree, _ = cuda.row_sums(x, threads)
    np.testing.assert_array_equal(by_tree, x.sum(1))


def test_host_threads_take_turns(emulator: Any) -> None:
    x = np.random.default_rng(1).integers(-9, 9, (40, 65)).astype(np.float32)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                for sums in emulator.row_sums(x, 64):
                    np.testing.assert_array_equal(sums, x.sum(1))
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@pytest.mark.parametrize("predicate", [[1] * 70, [0] * 40, [1, 0, -1, 5] * 20, [-1, 3, -1], [0]])
def test_barriers_that_vote_count_threads_that_have_not_exited(
    cuda: Any, predicate: list[int]
) -> None:
    votes = cuda.block_votes(predicate)
    live = [p for p in predicate if p >= 0]
    nonzero = sum(p != 0 for p in live)
    answer = [nonzero, int(nonzero == len(live)), int(nonzero > 0), len(live)]
    for p, row in zip(predicate, votes.tolist(), strict=True):
        assert row == (answer if p >= 0 else [-1] * 4)


@pytest.mark.parametrize(("n", "stay"), [(64, 64), (64, 40), (100, 33), (32, 1)])
def test_barriers_go_on_without_threads_that_returned_early(cuda: Any, n: int, stay: int) -> None:
    out = cuda.ring(n, stay, True)
    i = np.arange(stay)
    np.testing.assert_array_equal(out[:stay], 3 * ((i + 1) % stay) + 300)
    assert (out[stay:] == -1).all()


def test_a_missing_barrier_shows_under_some_schedule(emulator: Any) -> None:
    results = []
    try:
        for schedule in SCHEDULES:
            emulator.set_schedule(schedule)
            results.append(emulator.ring(16, 16, False).tolist())
    finally:
        emulator.set_schedule("")
    assert any(result != results[0] for result in results)


def test_a_thread_can_wait_for_another(cuda: Any) -> None:
    np.testing.assert_array_equal(cuda.spin(40), np.arange(40)[::-1])


# ---- schedules ----


def order_of(emulator: Any, schedule: str) -> list[tuple[int, int, int]]:
    emulator.set_schedule(schedule)
    try:
        return [tuple(row) for row in emulator.record_order(3, 40).tolist()]
    finally:
        emulator.set_schedule("")


def test_forward_and_reverse_order(emulator: Any) -> None:
    forward = [(b, t, p) for b in range(3) for p in range(2) for t in range(40)]
    backward = [(b, t, p) for b in (2, 1, 0) for p in range(2) for t in reversed(range(40))]
    assert order_of(emulator, "forward") == forward
    assert order_of(emulator, "reverse") == backward


def test_shuffled_order_is_seeded_and_respects_barriers(emulator: Any) -> None:
    forward = order_of(emulator, "forward")
    seen = set()
    blocks = set()
    for seed in range(8):
        order = order_of(emulator, f"shuffle:{seed}")
        assert order == order_of(emulator, f"shuffle:{seed}")
        assert sorted(order) == sorted(forward)
        for start in range(0, len(order), 80):
            block = order[start : start + 80]
            assert len({b for b, _, _ in block}) == 1
            assert [p for _, _, p in block] == [0] * 40 + [1] * 40
            assert [t for _, t, _ in block] != list(range(40)) * 2
        seen.add(tuple(order))
        blocks.add(tuple(b for b, _, _ in order[::80]))
    assert len(seen) == 8
    assert len(blocks) > 1


def test_schedule_from_the_environment(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in SCHEDULES:
        monkeypatch.setenv("DHCL_HOST_SCHEDULE", schedule)
        from_environment = [tuple(row) for row in emulator.record_order(3, 40).tolist()]
        assert from_environment == order_of(emulator, schedule)
    monkeypatch.setenv("DHCL_HOST_SCHEDULE", "reverse")
    assert order_of(emulator, "forward")[0] == (0, 0, 0)  # set_schedule goes first
    monkeypatch.setenv("DHCL_HOST_SCHEDULE", "sideways")
    with pytest.raises(RuntimeError, match="unknown schedule 'sideways'"):
        emulator.record_order(1, 1)


@pytest.mark.parametrize("text", ["shuffle:", "shuffle:x", "shuffle:-1", "Forward"])
def test_bad_schedules(emulator: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match="unknown schedule"):
        emulator.set_schedule(text)


# ---- warp operations, against an oracle over one warp ----

Lanes = dict[int, int]


def bits_of(lanes: list[int]) -> int:
    return sum(1 << lane for lane in lanes)


def signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def shuffle_source(op: str, lane: int, arg: int, width: int) -> int:
    first = lane // width * width
    if op == "shfl":
        return first + arg % width
    if op == "shfl_up":
        return lane - arg if lane - arg >= first else lane
    other = lane + arg if op == "shfl_down" else lane ^ arg
    return other if other < first + width else lane


def fold(function: Callable[[int, int], int], values: list[int]) -> int:
    total = values[0]
    for value in values[1:]:
        total = function(total, value)
    return total


def warp_oracle(op: str, lane: int, group: Lanes, arg: int, width: int, mask: int) -> int:
    """What `lane` gets, where `group` holds the values of the live lanes in `mask`."""
    values = list(group.values())
    if op.startswith("shfl"):
        return group.get(shuffle_source(op, lane, arg, width), POISON)
    if op == "ballot":
        return signed(bits_of([i for i in group if group[i]]))
    if op == "match_any":
        return signed(bits_of([i for i in group if group[i] == group[lane]]))
    if op == "match_all":
        return signed(mask) if len(set(values)) == 1 else 0
    reductions: dict[str, Callable[[], int]] = {
        "any": lambda: int(any(values)),
        "all": lambda: int(all(values)),
        "reduce_add": lambda: signed(sum(values)),
        "reduce_min": lambda: min(values),
        "reduce_max": lambda: max(values),
        "reduce_and": lambda: fold(lambda a, b: a & b, values),
        "reduce_or": lambda: fold(lambda a, b: a | b, values),
        "reduce_xor": lambda: fold(lambda a, b: a ^ b, values),
    }
    return reductions[op]()


WARP_OPS = [
    *("shfl", "shfl_up", "shfl_down", "shfl_xor", "ballot", "any", "all", "match_any", "match_all"),
    *("reduce_add", "reduce_min", "reduce_max", "reduce_and", "reduce_or", "reduce_xor"),
]


def check_warp_op(
    cuda: Any, op: str, masks: np.ndarray, values: np.ndarray, args: np.ndarray, width: int
) -> None:
    out = cuda.warp_op(getattr(cuda.WarpOp, op), masks, values, args, width)
    for i in range(len(masks)):
        mask, start = int(masks[i]), i // 32 * 32
        if mask == 0:  # returned early
            assert out[i] == -1
            continue
        warp = range(start, min(start + 32, len(masks)))
        group = {j - start: int(values[j]) for j in warp if masks[j] and mask >> (j - start) & 1}
        expected = warp_oracle(op, i - start, group, int(args[i]), width, mask)
        assert out[i] == expected, f"thread {i} of {op}, width {width}, mask {mask:#x}"


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("op", WARP_OPS[:4])
def test_shuffles_of_full_warps(cuda: Any, op: str, width: int) -> None:
    n = 64
    values = np.arange(n) * 7 - 100
    for arg in [0, 1, 2, 5, 16, 31]:
        check_warp_op(cuda, op, np.full(n, FULL), values, np.full(n, arg), width)
    args = np.random.default_rng(2).integers(0, 32, n)  # each lane its own
    check_warp_op(cuda, op, np.full(n, FULL), values, args, width)


@pytest.mark.parametrize("op", WARP_OPS)
def test_warp_ops_with_any_masks(cuda: Any, op: str) -> None:
    """Partial last warps, lanes that returned early, and disjoint groups within a warp."""
    rng = np.random.default_rng(WARP_OPS.index(op))
    for n in [1, 5, 32, 33, 50, 96, 127]:
        for groups in [1, 2, 3, 7]:
            # A lane belongs to one of the groups or, with the number `groups`, returns at once.
            group = rng.integers(0, groups + (n > 5), n)
            masks = np.zeros(n, np.uint32)
            for i in range(n):
                same = [j % 32 for j in range(n) if j // 32 == i // 32 and group[j] == group[i]]
                masks[i] = bits_of(same) if group[i] < groups else 0
            if groups == 1:  # a full mask names lanes that exited, or were never there
                masks[masks != 0] = FULL
            few = int(rng.integers(1, 4))
            values = rng.integers(-few, few, n) * int(rng.choice([1, 1 << 29]))
            width = int(rng.choice([2, 8, 32]))
            check_warp_op(cuda, op, masks, values, rng.integers(0, 32, n), width)


def test_votes_when_all_agree(cuda: Any) -> None:
    for op in ["any", "all", "ballot", "match_all"]:
        for value in [0, 3]:
            n = 40
            check_warp_op(cuda, op, np.full(n, FULL), np.full(n, value), np.zeros(n, int), 32)


def test_shuffle_of_every_type(cuda: Any) -> None:
    v = np.arange(64) + 3
    other = v[np.arange(64) ^ 1].astype(float)
    columns = [other, other, *[other * 2**24] * 4, other / 2, other / 3, other / 2, other / 2]
    np.testing.assert_array_equal(cuda.shuffle_types(v), np.stack(columns, 1))


# ---- atomics ----


@pytest.mark.parametrize("name", ["int", "unsigned", "unsigned_long_long"])
def test_atomics(cuda: Any, name: str) -> None:
    dtype = {"int": np.int32, "unsigned": np.uint32}.get(name, np.uint64)
    info = np.iinfo(dtype)
    values = np.random.default_rng(3).integers(info.min, info.max, 70, dtype, endpoint=True)
    start = values[:8][::-1].copy()
    cells, old = getattr(cuda, f"atomics_{name}")(start, values)

    assert cells[0] == values.sum(dtype=dtype) + start[:1].sum(dtype=dtype)  # both wrap
    assert cells[1] == min(start[1], values.min())
    assert cells[2] == max(start[2], values.max())
    assert cells[3] == np.bitwise_and.reduce(values) & start[3]
    assert cells[4] == np.bitwise_or.reduce(values) | start[4]
    assert cells[5] == np.bitwise_xor.reduce(values) ^ start[5]
    assert cells[6] in values
    assert cells[7] == max(start[7], values.max())
    # Each saw the running sum without itself: one of them the start, and the rest each other's.
    with np.errstate(over="ignore"):
        assert sorted([*old[old != start[0]], cells[0]]) == sorted(old + values)


def test_floating_atomics(cuda: Any) -> None:
    n = 25
    f, d, counter, wrapped = cuda.floating_atomics(n)
    assert f == 0.5 * sum(range(n))
    assert d == 0.25 * sum(range(n))
    assert counter == -n
    assert wrapped == n % 10


# ---- numbers ----


def awkward_floats() -> np.ndarray:
    """Random bit patterns, and the neighbourhoods of what is hard to round to 16 bits."""
    rng = np.random.default_rng(4)
    every = np.arange(1 << 16, dtype=np.uint16)
    halves = every.view(np.float16).astype(np.float32)
    bfloats = (every.astype(np.uint32) << 16).view(np.float32)
    half_ties = np.sort(halves[np.isfinite(halves)]).astype(np.float64)
    half_ties = ((half_ties[1:] + half_ties[:-1]) / 2).astype(np.float32)  # exact
    bfloat_ties = (bfloats.view(np.uint32) | 0x8000).view(np.float32)
    special = [
        0.0,
        -0.0,
        65504,
        65519.99,
        65520,
        65536,
        1e38,
        3.4028235e38,
        np.inf,
        -np.inf,
        np.nan,
    ]
    special += [2**-14, 2**-14 - 2**-25, 2**-24, 2**-25, 2**-26, 2**-126, 2**-149]
    near = np.concatenate([halves, half_ties, bfloats, bfloat_ties, np.array(special, np.float32)])
    near = near.view(np.uint32)
    bits = np.concatenate([near, near + 1, near - 1, rng.integers(0, 1 << 32, 200_000, np.uint32)])
    return bits.view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even: by distance, in float64."""
    bits = x.view(np.uint32)
    low = (bits & 0x7FFF0000).astype(np.uint32)
    with np.errstate(invalid="ignore", over="ignore"):
        value = np.abs(x).astype(np.float64)
        below = low.view(np.float32).astype(np.float64)
        # The successor of the greatest finite value rounds as if it were 2^128, not infinity.
        above = (low + 0x10000).astype(np.uint32).view(np.float32).astype(np.float64)
        above = np.where(low == 0x7F7F0000, 2.0**128, above)
        to_below, to_above = value - below, above - value
    odd = (low >> 16) & 1 == 1
    up = (to_above < to_below) | ((to_above == to_below) & odd)
    up &= np.isfinite(x)
    rounded: np.ndarray = (((bits >> 31) << 15) + (low >> 16) + up).astype(np.uint16)
    return rounded


def test_float_to_16_bits(emulator: Any) -> None:
    x = awkward_floats()
    half, bfloat16 = emulator.half_bits(x)
    nan = np.isnan(x)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half[~nan], x[~nan].astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(bfloat16[~nan], round_to_bfloat16(x)[~nan])
    # CUDA has one NaN.
    assert nan.any()
    assert (half[nan] == 0x7FFF).all()
    assert (bfloat16[nan] == 0x7FFF).all()


def test_16_bits_to_float(emulator: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    half, bfloat16 = emulator.half_values(every)
    expected = every.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(half), nan)
    # As bits, so that -0 is not 0.
    np.testing.assert_array_equal(half[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    np.testing.assert_array_equal(bfloat16.view(np.uint32), every.astype(np.uint32) << 16)


def test_16_bit_round_trip(emulator: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = emulator.half_values(every)
    for column in range(2):
        number = ~np.isnan(values[column])
        back = emulator.half_bits(values[column])[column]
        np.testing.assert_array_equal(back[number], every[number])


def test_bit_functions(emulator: Any) -> None:
    rng = np.random.default_rng(5)
    wide = [0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 0x7F800001]
    wide += [int(w) for w in rng.integers(0, 1 << 64, 50, np.uint64)]
    rows = emulator.bits(np.array(wide, np.uint64)).tolist()
    for w, row in zip(wide, rows, strict=True):
        n = w & FULL
        assert row[:2] == [n.bit_count(), w.bit_count()]
        assert row[2:4] == [(n & -n).bit_length(), (w & -w).bit_length()]
        assert row[4:6] == [32 - n.bit_length(), 64 - w.bit_length()]
        assert row[6] == int(f"{n:032b}"[::-1], 2)
        assert row[7] == n * 0x9E3779B9 >> 32
        assert row[8] == n
        assert row[9] == signed(n)
        assert row[10] == (w + (1 << 63)) % (1 << 64) - (1 << 63)
        assert row[11] == (w << 7 >> 32) & FULL


def test_rounding_intrinsics(emulator: Any) -> None:
    rng = np.random.default_rng(6)
    a, b, c = rng.standard_normal((3, 500)).astype(np.float32)
    c[:100] = -(a * b)[:100]  # where a fused multiply-add shows: this sum cancels
    out = emulator.rounding(a, b, c)
    wide = [v.astype(np.longdouble) for v in (a, b, c)]
    np.testing.assert_array_equal(out[:, 0], a * b + c)
    assert (out[:100, 0] == 0).all()
    # The product of two floats is exact in float64, and here so is its cancelled sum.
    exact = a[:100].astype(np.float64) * b[:100].astype(np.float64) + c[:100].astype(np.float64)
    np.testing.assert_array_equal(out[:100, 1], exact.astype(np.float32))
    assert (out[:100, 1] != 0).any()
    np.testing.assert_array_equal(out[:, 2], a / b)
    np.testing.assert_array_equal(out[:, 3], np.sqrt(np.abs(a)))
    np.testing.assert_array_equal(out[:, 4], a - c)
    np.testing.assert_array_equal(out[:, 5], np.float32(1) / b)
    np.testing.assert_allclose(out[:, 6], wide[0] * wide[1] / (wide[2] + 3), rtol=1e-7)
    np.testing.assert_allclose(out[:, 7], 1 / np.sqrt(np.abs(wide[0])), rtol=1e-7)


def test_float_to_integer(emulator: Any) -> None:
    x = [0.5, 1.5, -2.5, 2.75, -0.75, 3e9, -3e9, 5e9, 1e19, -1e19, math.inf, -math.inf, math.nan]
    low, high, wide = -(2**31), 2**31 - 1, 2**63

    def clamp(value: float, least: int, most: int) -> int:
        return most if value > most else least if value < least else int(value)

    for value, row in zip(x, emulator.to_integers(x).tolist(), strict=True):
        if math.isnan(value):
            assert row == [0, 0, 0, 0, 0, -wide]
            continue
        v = float(np.float32(value))
        infinite = math.isinf(v)
        assert row == [
            clamp(v if infinite else round(v), low, high),
            clamp(v if infinite else math.trunc(v), low, high),
            clamp(v if infinite else math.floor(v), low, high),
            clamp(v if infinite else math.ceil(v), low, high),
            clamp(v if infinite else math.trunc(v), 0, FULL),
            clamp(v if infinite else round(v), -wide, wide - 1),
        ]


def test_min_and_max_of_mixed_types(emulator: Any) -> None:
    # int with unsigned compares as unsigned, and a NaN gives way.
    assert emulator.mixed_min_max().tolist() == [2, FULL, -5, 2, 2.5, 4]


def test_vector_loads(emulator: Any) -> None:
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(emulator.vectors(x), x.reshape(-1, 4)[:, ::-1].ravel())


# ---- shared memory ----


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_shared_memory_is_poisoned_before_every_block(cuda: Any, size: int) -> None:
    assert (cuda.fresh_shared(3, size) == 0xCD).all()


def test_dynamic_shared_memory_can_be_used_to_its_last_byte(cuda: Any) -> None:
    for count in [1, 33, 48 * 1024 // 4]:
        assert (cuda.fill_shared(count, count) == count * (count - 1) // 2).all()


# ---- launches ----

Extent = tuple[int, int, int]
GOOD_LAUNCHES = [
    ((1, 1, 1), (1, 1, 1), 0),
    ((70_000, 1, 1), (1, 1, 1), 0),
    ((1, 65535, 1), (1, 1, 1), 0),
    ((2, 1, 3), (4, 4, 64), 48 * 1024),
    ((1, 1, 1), (1, 1024, 1), 0),
]
BAD_LAUNCHES = [
    ((0, 1, 1), (1, 1, 1), 0, "empty grid"),
    ((1, 1, 0), (1, 1, 1), 0, "empty grid"),
    ((1, 1, 1), (32, 0, 1), 0, "empty block"),
    ((1 << 31, 1, 1), (1, 1, 1), 0, "grid"),
    ((1, 65536, 1), (1, 1, 1), 0, "grid"),
    ((1, 1, 65536), (1, 1, 1), 0, "grid"),
    ((1, 1, 1), (1025, 1, 1), 0, "1024 threads"),
    ((1, 1, 1), (33, 32, 1), 0, "1024 threads"),
    ((1, 1, 1), (1, 1, 65), 0, "block"),
    ((1, 1, 1), (1 << 16, 1 << 16, 1), 0, "block"),
    ((1, 1, 1), (1, 1, 1), 227 * 1024 + 1, "dynamic shared memory exceed"),
    ((1, 1, 1), (1, 1, 1), 48 * 1024 + 1, "cudaFuncSetAttribute"),
]


@pytest.mark.parametrize(("grid", "block", "shared"), GOOD_LAUNCHES)
def test_good_launches(cuda: Any, grid: Extent, block: Extent, shared: int) -> None:
    cuda.empty(grid, block, shared)


@pytest.mark.parametrize(("grid", "block", "shared", "why"), BAD_LAUNCHES)
def test_bad_launches(emulator: Any, grid: Extent, block: Extent, shared: int, why: str) -> None:
    with pytest.raises(RuntimeError, match=f"empty_kernel: invalid configuration.*{why}"):
        emulator.empty(grid, block, shared)


def test_a_kernel_can_opt_in_to_more_shared_memory(emulator: Any) -> None:
    most = 227 * 1024
    with pytest.raises(RuntimeError, match="cudaFuncSetAttribute"):
        emulator.opt_in(64 * 1024, 64 * 1024 + 1)
    assert emulator.opt_in(64 * 1024, 64 * 1024) == "no error; no error"
    assert emulator.opt_in(most, most) == "no error; no error"
    assert emulator.opt_in(most + 1, 16) == "invalid argument; no error"


# ---- faults ----

DIVERGENCES = {
    "lines": [
        "7 of 64 threads wait at __syncthreads (selftest.cu:",
        "threads 0-6)",
        "57 of 64 threads wait at __syncthreads",
        "threads 7-63)",
    ],
    "block_warp": [
        "7 of 64 threads wait at __syncthreads",
        "25 of 64 threads wait at __shfl_xor_sync with mask 0xffffffff",
        "32 have exited",
    ],
    "masks": [
        "32 of 64 threads wait at __syncwarp with mask 0xffffffff",
        "threads 0-15, 32-47)",
        "32 of 64 threads wait at __syncthreads",
    ],
    "overlap": [
        "32 of 64 threads wait at __syncwarp with mask 0xffffffff",
        "32 of 64 threads wait at __syncwarp with mask 0x7fffffff",
    ],
    "operations": [
        "wait at __ballot_sync with mask 0xffffffff",
        "wait at __any_sync with mask 0xffffffff",
    ],
    "rounds": ["32 of 64 threads wait at __syncthreads", "0 have exited"],
}


@pytest.mark.parametrize("how", DIVERGENCES)
def test_divergent_barriers(cuda: Any, how: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        cuda.diverge(how, 64)
    text = str(caught.value)
    assert "divergent barrier in kernel diverge_kernel, block (" in text
    for part in DIVERGENCES[how]:
        assert part in text
    assert cuda.live_objects() == 0


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("not_in_mask", "__syncwarp: lane 0 is not in its own mask 0xfffffffe"),
        ("width", "__shfl_sync: width must be a power of two of at most 32 \\(got 12\\)"),
    ],
)
def test_misused_warp_operations(cuda: Any, how: str, what: str) -> None:
    with pytest.raises(RuntimeError, match=what):
        cuda.diverge(how, 64)
    assert cuda.live_objects() == 0


@pytest.mark.parametrize(
    ("how", "kind", "what"),
    [
        ("device_assert", RuntimeError, "index 70 is not in [0, 3) [kernel fail_kernel, block "),
        ("assert", RuntimeError, "assertion `threadIdx.x > 6000' failed"),
        ("trap", RuntimeError, "__trap()"),
        ("nested", RuntimeError, "a kernel cannot launch a kernel"),
        ("exception", IndexError, "thrown by a thread"),
    ],
)
def test_a_failing_thread_fails_the_launch(
    cuda: Any, how: str, kind: type[Exception], what: str
) -> None:
    with pytest.raises(kind) as caught:
        cuda.fail(how, 70, 3, 64)
    assert what in str(caught.value)
    if how in ("device_assert", "assert", "trap"):
        assert "block (1, 0, 0), thread (6, 0, 0), selftest.cu:" in str(caught.value)
    # The waiting threads were unwound, and the device goes on.
    assert cuda.live_objects() == 0
    x = np.ones((2, 100), np.float32)
    for sums in cuda.row_sums(x, 64):
        assert sums.tolist() == [100, 100]


def test_a_thread_that_does_not_exist_fails_nothing(cuda: Any) -> None:
    for how in ["device_assert", "assert", "trap", "exception"]:
        cuda.fail(how, 1000, 3, 64)
    assert cuda.live_objects() == 0


def run_python(body: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `body` with `test`, this module, in a process of its own."""
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_cuda_host", {str(Path(__file__))!r})
test = importlib.util.module_from_spec(spec)
sys.modules["test_cuda_host"] = test
spec.loader.exec_module(test)
{body}
"""
    return subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )


def test_abort_on_error(emulator: Any) -> None:
    env = {**os.environ, "DHCL_HOST_ABORT": "1"}
    result = run_python("test.load_selftest().diverge('lines', 64)", env)
    assert result.returncode == -6  # SIGABRT
    assert "7 of 64 threads wait at __syncthreads" in result.stderr


# ---- the sanitizers ----


@pytest.fixture(scope="session")
def sanitizers() -> dict[str, str]:
    try:
        env: dict[str, str] = build.sanitizer_env()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return env


CLEAN_RUN = """
import numpy as np
cuda = test.load_selftest(sanitize=True)
for schedule in test.SCHEDULES:
    cuda.set_schedule(schedule)
    x = np.ones((3, 100), np.float32)
    for threads in [1, 33, 256, 1024]:
        assert (cuda.row_sums(x, threads)[0] == 100).all()
    assert (cuda.row_sums(x, 1024)[1] == 100).all()
    test.test_coordinates(cuda)
    test.test_shuffle_of_every_type(cuda)
    for op in test.WARP_OPS:
        test.test_warp_ops_with_any_masks(cuda, op)
    for name in ["int", "unsigned", "unsigned_long_long"]:
        test.test_atomics(cuda, name)
    test.test_dynamic_shared_memory_can_be_used_to_its_last_byte(cuda)
    test.test_barriers_go_on_without_threads_that_returned_early(cuda, 100, 33)
    test.test_a_thread_can_wait_for_another(cuda)
    for how in test.DIVERGENCES:
        test.test_divergent_barriers(cuda, how)
    test.test_a_failing_thread_fails_the_launch(cuda, "exception", IndexError, "thrown by")
    test.test_a_failing_thread_fails_the_launch(cuda, "trap", RuntimeError, "__trap()")
test.test_float_to_16_bits(cuda)
test.test_16_bits_to_float(cuda)
test.test_bit_functions(cuda)
test.test_float_to_integer(cuda)
test.test_vector_loads(cuda)
test.test_host_threads_take_turns(cuda)
print("all of it ran")
"""


def test_clean_under_sanitizers(sanitizers: dict[str, str]) -> None:
    result = run_python(CLEAN_RUN, sanitizers)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all of it ran\n"
    assert "ERROR" not in result.stderr
    assert "runtime error" not in result.stderr


def test_overrun_of_dynamic_shared_memory_is_caught(sanitizers: dict[str, str]) -> None:
    result = run_python("test.load_selftest(sanitize=True).fill_shared(33, 34)", sanitizers)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "WRITE of size 4" in result.stderr
    assert "fill_shared_kernel" in result.stderr


# ---- build.py ----

TINY = """
#include <pybind11/pybind11.h>
#include "answer.h"
#include "cuda_host.h"
__global__ void answer_kernel(int* out) { *out = ANSWER; }
PYBIND11_MODULE(tiny, m) {
  m.def("answer", [] {
    int out = 0;
    DHCL_LAUNCH(answer_kernel, 1, 1, 0, nullptr, &out);
    return out;
  });
}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "answer.h").write_text("#define ANSWER 42\n")
    source = tmp_path / "tiny.cu"
    source.write_text(TINY)
    return source


def test_load_follows_sources_and_headers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    include = tiny.parent / "include"
    assert build.load("tiny", [tiny], [include]).answer() == 42
    (include / "answer.h").write_text("#define ANSWER 43\n")
    assert build.load("tiny", [tiny], [include]).answer() == 43
    # From here on nothing may be compiled.
    real_run = subprocess.run

    def only_version(command: list[str], **options: Any) -> Any:
        assert "--version" in command
        return real_run(command, **options)

    monkeypatch.setattr(build.subprocess, "run", only_version)
    assert build.load("tiny", [tiny], [include]).answer() == 43
    (include / "answer.h").write_text("#define ANSWER 42\n")
    assert build.load("tiny", [tiny], [include]).answer() == 42


def test_compile_error_shows_the_compilers_words(tiny: Path) -> None:
    tiny.write_text("int f() { return no_such_name; }\n")
    with pytest.raises(RuntimeError, match=r"no_such_name.* was not declared"):
        build.load("tiny", [tiny])
    with pytest.raises(RuntimeError, match="no_such_name"):  # a failure is not cached
        build.load("tiny", [tiny])


def test_warnings_are_errors(tiny: Path) -> None:
    tiny.write_text("bool f(int a, unsigned b) { return a < b; }\n")
    with pytest.raises(RuntimeError, match="sign-compare"):
        build.load("tiny", [tiny])


def test_sanitized_modules_need_the_sanitizers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(RuntimeError, match="sanitizer_env"):
        build.load("tiny", [tiny], sanitize=True)
