"""What the fuzz tests share: how many examples, awkward rows, and the reference in place of C++.

DHCL_FUZZ=5000 python -m pytest tests/ops -k fuzz     # other examples, and more of them
"""

import contextlib
import os
import sys
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dhcl_ops import _ops

EXAMPLES = int(os.environ.get("DHCL_FUZZ", "0"))


def fuzzed(examples):
    """A few examples, always the same; with DHCL_FUZZ that many, new ones each time."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextlib.contextmanager
def on_reference():
    """Public functions run on the PyTorch reference of every op."""
    overloads = {id(op.overload): op.reference for op in _ops.OPS.values()}
    swapped = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "dhcl_ops":
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in overloads:
                swapped.append((module, attribute, value))
                setattr(module, attribute, overloads[id(value)])
    assert len(swapped) > 15  # else this compares the compiled ops with themselves
    try:
        yield
    finally:
        for module, attribute, value in swapped:
            setattr(module, attribute, value)


class Failure(NamedTuple):
    """The error of a call."""

    kind: str
    text: str


def outcome(function):
    """What a call gives: its result, or a :class:`Failure`."""
    try:
        return function()
    except (TypeError, ValueError, IndexError, MemoryError) as error:
        return Failure(type(error).__name__, str(error))


def both(function):
    """The outcome of a call as it is, and on the reference."""
    with on_reference():
        expected = outcome(function)
    return outcome(function), expected


@st.composite
def some_rows(draw, most=14, width=None, least=0):
    """(n, d) float32 rows: random, repeated, of few values, sparse, or almost parallel."""
    n = draw(st.integers(least, most))
    d = draw(st.sampled_from([1, 2, 3, 7, 8, 33, 128, 131])) if width is None else width
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows = torch.randn(n, d, generator=generator)
    kind = draw(st.sampled_from(["plain", "copies", "few values", "sparse", "parallel"]))
    if kind == "copies" and n:
        rows = rows[torch.randint(0, max(n // 3, 1), (n,), generator=generator)]
    elif kind == "few values":
        rows = rows.round().clamp(-1, 1)
    elif kind == "sparse":
        rows = rows * (torch.rand(n, d, generator=generator) < 0.2)
    elif kind == "parallel" and n:
        rows = rows[:1] + 1e-4 * rows
    return rows


def unit(rows):
    """Rows of norm 1; what is zero becomes the first axis."""
    rows = rows.clone()
    rows[rows.norm(dim=1) < 1e-6] = torch.eye(1, rows.shape[1])
    return torch.nn.functional.normalize(rows)


# From where fp32's squares vanish to where they overflow.
SCALES = st.sampled_from([1.0, 1e-3, 1e3, 1e-18, 1e-24, 1e-30, 1e-42, 1e9, 1e17, 1e19, 1e30])
