import pytest
from dhcl import ReID

from tests.dhcl.toy import make_run, write_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model(run):
    return ReID.load(run, device="cpu")
