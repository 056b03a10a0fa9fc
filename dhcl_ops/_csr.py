"""Rows of lists (CSR) in PyTorch: what the references of several families and their callers share.

A matrix in CSR form is offsets (N+1,) int64, columns int32 ascending in each row, and values.
``csrc/common/csr.h`` has the same for the C++ code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

# Elements that a reference holds in one temporary.
CHUNK = 1 << 21


class Rows(NamedTuple):
    """A CSR matrix: offsets (N+1) int64, columns int32 ascending in each row, values float32."""

    offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def row_ids(offsets: torch.Tensor) -> torch.Tensor:
    """The row of every entry."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff())


def offsets_of(rows: torch.Tensor, count: int) -> torch.Tensor:
    """CSR offsets from the ascending row of every entry."""
    return torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))


def chunks(sizes: torch.Tensor, limit: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose sizes add up to at most the limit (one row at least)."""
    ends = sizes.cumsum(0)
    start = 0
    while start < len(sizes):
        done = int(ends[start - 1]) if start else 0
        stop = int(torch.searchsorted(ends, done + limit, right=True))
        stop = max(stop, start + 1)
        yield start, stop
        start = stop


def places(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of lists of these lengths, one after another: the list of each entry, and its place there."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    inner = torch.arange(len(owner), device=counts.device)
    return owner, inner - (counts.cumsum(0) - counts)[owner]


def sums_in_order(x: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct keys (ascending; given ascending), and the sum of each one's x in order."""
    distinct, counts = torch.unique_consecutive(keys, return_counts=True)
    starts = counts.cumsum(0) - counts
    total = x.new_zeros(len(distinct))
    for place in range(int(counts.max()) if len(counts) else 0):
        live = (counts > place).nonzero().squeeze(1)
        total[live] = total[live] + x[starts[live] + place]
    return distinct, total


def joined(parts: Sequence[tuple[torch.Tensor, ...]], like: torch.Tensor) -> tuple[Any, ...]:
    """One CSR matrix from those of consecutive ranges of rows."""
    if not parts:
        empty = like.new_empty(0)
        return torch.zeros(1, dtype=torch.int64, device=like.device), empty.int(), empty.float()
    if len(parts) == 1:
        return parts[0]
    offsets, done = [parts[0][0][:1]], 0
    for part in parts:
        offsets.append(part[0][1:] + done)
        done += len(part[1])
    return torch.cat(offsets), *(torch.cat(column) for column in list(zip(*parts, strict=True))[1:])


def sparse_tensor(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int | None = None
) -> torch.Tensor:
    """A sparse CSR tensor, square without a width, without torch's notices that these are young."""
    size = len(offsets) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse (CSR|invariant).*")
        return torch.sparse_csr_tensor(
            offsets,
            columns,
            values,
            (size, size if width is None else width),
            check_invariants=False,
        )


def dynamic_size() -> Any:
    """A size that depends on data, in the fake of an op."""
    return torch.library.get_ctx().new_dynamic_size()


def fake_rows(like: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an op that makes a CSR matrix of so many rows returns, in its fake."""
    size = dynamic_size()
    return (
        like.new_empty(rows + 1, dtype=torch.int64),
        like.new_empty(size, dtype=torch.int32),
        like.new_empty(size, dtype=torch.float32),
    )
