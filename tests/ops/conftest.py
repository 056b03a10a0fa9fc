import pytest

from dhcl_ops import _build
from tests.cuda_host import build


class Several:
    """The host builds of several families as one module."""

    def __init__(self, modules):
        self.modules = modules

    def __getattr__(self, name):
        found = [getattr(module, name) for module in self.modules if hasattr(module, name)]
        if not found:
            raise AttributeError(name)
        return found[0]

    def set_schedule(self, order):
        for module in self.modules:
            module.set_schedule(order)

    def paths(self):
        return tuple(map(sum, zip(*(module.paths() for module in self.modules), strict=True)))


@pytest.fixture(scope="session")
def host_module():
    """Builds a family's .cu for the host, once."""
    if build.missing() is not None:
        pytest.skip(str(build.missing()))
    folder = _build.source_dir()

    def load(family):
        kernels = [folder / f"{family}.cu"] if family in _build.families() else []
        sources = [*kernels, *_build.common_kernels(), build.HERE / f"{family}_binding.cpp"]
        return build.load(
            f"{family}_host", sources, [folder], sanitize=build.SANITIZE, race=build.RACE
        )

    return load


@pytest.fixture
def host(host_module, request):
    """The kernels of the family that a test_FAMILY_host.py is about, on the host.

    A file that is about several says so in FAMILIES.
    """
    name = request.module.__name__.rpartition(".")[2]
    if hasattr(request.module, "FAMILIES"):
        return Several([host_module(family) for family in request.module.FAMILIES])
    return host_module(name.removeprefix("test_").removesuffix("_host"))


# Under the sanitizers all is slow, and what races there are does not depend on the order.
ONE_ORDER = build.SANITIZE or build.RACE


@pytest.fixture(params=["shuffle:1"] if ONE_ORDER else ["forward", "reverse", "shuffle:1"])
def kernels(host, request):
    """The order in which threads and blocks run must not show."""
    host.set_schedule(request.param)
    yield host
    host.set_schedule("")
