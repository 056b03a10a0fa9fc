"""The host runs of all .cu files once more, under AddressSanitizer and UBSan."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host import build

FILES = sorted(Path(__file__).parent.glob("test_*_host.py"))


def selection(file):
    """The tests of a file that reach every line once, if all would take long: ten times slower."""
    found = re.search(r'^SANITIZED = "(.*)"$', file.read_text(), re.MULTILINE)
    return ["-k", found[1]] if found else []


def run(file, environment):
    """The tests of a file, in a process of their own."""
    options = ["-q", "-x", "-p", "no:cacheprovider", *selection(file)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**environment, "DHCL_HOST_SANITIZE": "1", "DHCL_BUILD": "off"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request):
    """The runs of all files that are asked for, two at a time.

    They are few and long, so a suite that is spread over processes begins with others and would end
    by waiting for these, one after another, on one core.
    """
    try:
        environment = build.sanitizer_env()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    wanted = [
        item.callspec.params["file"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run, file, environment) for file in wanted}


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("file", FILES, ids=[path.stem for path in FILES])
def test_under_address_and_undefined_behaviour_sanitizers(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
