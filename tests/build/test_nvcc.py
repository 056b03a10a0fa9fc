"""Every .cu compiled by nvcc for the GPUs the project is meant for, warnings as errors."""

import re
import subprocess

import pytest

from dhcl_ops import _build

NVCC = _build.find_nvcc()
KERNELS = sorted(_build.source_dir().rglob("*.cu"))
# What torch's extension builder passes, which decides what compiles.
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", KERNELS, ids=[path.name for path in KERNELS])
def test_compiles_without_warnings_or_spills(kernel, architecture, tmp_path):
    if architecture == "sm_100" and tuple(map(int, NVCC.release.split("."))) < (12, 8):
        pytest.skip(f"nvcc {NVCC.release} does not know sm_100")
    done = subprocess.run(
        [
            *(f"{NVCC.home}/bin/nvcc", f"-arch={architecture}", "-Werror", "all-warnings"),
            *("-Xptxas", "-v,--warn-on-spills", f"-I{_build.source_dir()}", "-c", str(kernel)),
            *("-o", str(tmp_path / "kernel.o"), *_build.nvcc_flags(), *TORCH_FLAGS),
        ],
        capture_output=True,
        text=True,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills
    assert all(pair == ("0", "0") for pair in spills), report[-4000:]


def test_all_kernels_are_built():
    assert {path for path in _build.sources(cuda=True) if path.suffix == ".cu"} == set(KERNELS)
    assert len(_build.families()) > 5
