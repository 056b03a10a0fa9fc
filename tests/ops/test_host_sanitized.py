"""The host runs of all .cu files once more, under AddressSanitizer and UBSan."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_host import build

# What reaches every line of the kernels once; they run ten times slower there.
JACCARD = "36 or no_rows or not_fit or hub or repeats or softmax or width or block or paths or 2049"


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("family", ["memory", "knn", "jaccard", "contrastive", "ranking"])
def test_under_address_and_undefined_behaviour_sanitizers(family):
    try:
        environment = build.sanitizer_env()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    file = Path(__file__).with_name(f"test_{family}_host.py")
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(("-k", JACCARD) if family == "jaccard" else ()),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**environment, "DHCL_HOST_SANITIZE": "1", "DHCL_BUILD": "off"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
