"""What belongs to a family of ops is found by its stem, so nothing of it may be missing."""

from pathlib import Path

import pytest

from dhcl_ops import _build, _ops

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *("csrc/{}.h", "csrc/{}.cpp", "csrc/{}.cu", "dhcl_ops/{}.py", "benchmarks/{}.py"),
    *("tests/ops/test_{}.py", "tests/ops/test_{}_host.py", "tests/cuda_host/{}_binding.cpp"),
)


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs a checkout")
@pytest.mark.parametrize("family", _build.families())
def test_a_family_has_all_its_files(family):
    missing = [name for name in FILES if not (ROOT / name.format(family)).is_file()]
    assert not missing, f"family {family}: {', '.join(n.format(family) for n in missing)} missing"


def test_every_op_belongs_to_a_family():
    assert {op.family for op in _ops.OPS.values()} == set(_build.families())
