"""The host runs of all .cu files once more, under AddressSanitizer and UBSan."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host import build

# Their modules take a minute each to compile with sanitizers.
LONG = {"test_contrastive_host", "test_jaccard_host", "test_memory_host", "test_reciprocal_host"}
FILES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem in LONG))
    for path in sorted(Path(__file__).parent.glob("test_*_host.py"))
]


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
        if item.path == request.path
        and hasattr(item, "callspec")
        and not item.get_closest_marker("skip")
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run, file, environment) for file in wanted}


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("file", FILES)
def test_under_address_and_undefined_behaviour_sanitizers(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
