import os

# Processes of pytest-xdist share the cores, and OpenMP reads this when torch is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))

import pytest
import torch

# A GPU build machine must fail loudly rather than skip its CUDA tests.
if os.environ.get("DHCL_REQUIRE_CUDA") and not torch.cuda.is_available():
    raise SystemExit("DHCL_REQUIRE_CUDA is set and no GPU is visible")

# What takes a minute or more is left out of the suite, which has to end in half an hour.
LONG = os.environ.get("DHCL_LONG") == "1"


def pytest_collection_modifyitems(items):
    if not LONG:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: DHCL_LONG=1 runs it"))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["compiled", "reference"])
def implementation(request):
    """Runs the test once on what the library gives and once on the PyTorch reference."""
    return request.param
