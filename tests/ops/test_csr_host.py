"""csrc/common/csr.cu run on the host; gathering is tested with the families that make rows."""

import pytest
import torch

from tests.checks import same_bits
from tests.ops.stages import run

# What reaches every line of the kernels once, for the sanitizers.
SANITIZED = "2049"


@pytest.mark.parametrize("n", [0, 1, 5, 2048, 2049, 5000])
def test_scan(host, n):
    counts = torch.randint(0, 1 << 40, (n,), generator=torch.Generator().manual_seed(n))
    expected = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert same_bits(run(host, "scan", counts), expected)
