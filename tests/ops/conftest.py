import pytest

from dhcl_ops import _build
from tests.cuda_host import build


@pytest.fixture(scope="session")
def host_module():
    """Builds a family's .cu for the host, once."""
    if build.missing() is not None:
        pytest.skip(str(build.missing()))
    folder = _build.source_dir()

    def load(family):
        sources = [folder / f"{family}.cu", build.HERE / f"{family}_binding.cpp"]
        return build.load(f"{family}_host", sources, [folder], sanitize=build.SANITIZE)

    return load


@pytest.fixture
def host(host_module, request):
    """The kernels of the family that a test_FAMILY_host.py is about, on the host."""
    name = request.module.__name__.rpartition(".")[2]
    return host_module(name.removeprefix("test_").removesuffix("_host"))


@pytest.fixture(params=["shuffle:1"] if build.SANITIZE else ["forward", "reverse", "shuffle:1"])
def kernels(host, request):
    """The order in which threads and blocks run must not show."""
    host.set_schedule(request.param)
    yield host
    host.set_schedule("")
