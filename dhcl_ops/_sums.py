"""The stated order of summation over the elements of a row, in PyTorch.

``csrc/common/sums.h`` states it, and has it once for the CPU and once for CUDA.
"""

from __future__ import annotations

import torch
from torch import nn

# As in csrc/common/sums.h.
COLUMNS = 128


def sum_elements(rows: torch.Tensor) -> torch.Tensor:
    """Sums (n,) of the rows (n, d): into 128 columns first, then halving the columns."""
    # A row without elements is padded to one block of zeros, whose sum is 0.
    missing = -rows.shape[1] % COLUMNS if rows.shape[1] else COLUMNS
    rows = nn.functional.pad(rows, (0, missing))
    columns = rows.new_zeros(len(rows), COLUMNS)
    for block in rows.split(COLUMNS, dim=1):
        columns = columns + block
    while columns.shape[1] > 1:
        half = columns.shape[1] // 2
        columns = columns[:, :half] + columns[:, half:]
    return columns.squeeze(1)
