"""Runs the host tests of the kernels under the race detector (race.h).

    python -m tests.cuda_host.races                    # all of them
    python -m tests.cuda_host.races --short jaccard    # a family's, what reaches every line once
    python -m tests.cuda_host.races --mutate           # and each barrier of csrc/ taken away

A test fails if a kernel that it launches has a race. With `--mutate` a test runs again for each
barrier that it passes and that no test before it has shown to be needed, and this barrier orders
nothing then. A barrier that no test passes fails the run. One that is passed and never missed is
named: votes are, whose result counts and not their order, and guards of memory that is used again,
where another barrier stands between or where only longer inputs use it again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/ops"
BARRIER = re.compile(r"\b__sync(threads|threads_or|threads_and|threads_count|warp)\(")


def barriers() -> list[str]:
    """Every barrier of the kernels, as "file.cu:LINE"."""
    return [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in {".cu", ".h"}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.search(line.partition("//")[0])
    ]


class Short:
    """A plugin of pytest which keeps what a file calls enough to reach every line once."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.keeps(item)]

    @staticmethod
    def keeps(item: pytest.Item) -> bool:
        words = getattr(getattr(item, "module", None), "SANITIZED", "")
        return any(word in item.name for word in words.split(" or "))


class Mutations:
    """A plugin of pytest which runs each test again without each barrier that it passes."""

    def __init__(self, folder: str) -> None:
        self.places = barriers()
        self.needed: set[str] = set()
        self.passed: set[str] = set()
        self.record = Path(folder, "barriers")
        self.again = False

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
        if self.again:
            return (yield)
        self.record.write_text("")
        os.environ["DHCL_HOST_RACE_BARRIERS"] = str(self.record)
        try:
            result = yield
        finally:
            del os.environ["DHCL_HOST_RACE_BARRIERS"]
        self.again = True
        passed = set(self.record.read_text().split())
        self.passed |= passed
        for place in sorted(passed - self.needed):
            if self.is_missed(pyfuncitem, place):
                self.needed.add(place)
        self.again = False
        return result

    @staticmethod
    def is_missed(item: pytest.Function, place: str) -> bool:
        os.environ["DHCL_HOST_RACE_WITHOUT"] = place
        try:
            item.runtest()
        except (Exception, pytest.fail.Exception) as error:
            if "data race in kernel" not in str(error):
                raise
            return True
        finally:
            del os.environ["DHCL_HOST_RACE_WITHOUT"]
        return False


def main() -> int:
    """The exit status of pytest, or 1 if a barrier was not missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "families", nargs="*", help="stems of tests/ops/test_*_host.py; all by default"
    )
    parser.add_argument("--short", action="store_true", help="only what reaches every line once")
    parser.add_argument("--mutate", action="store_true", help="take away each barrier in turn")
    options = parser.parse_args()
    # Before tests / cuda_host / build.py is imported, which reads it.
    os.environ.update(DHCL_HOST_RACE="1", DHCL_BUILD="off")
    names = options.families or ["*"]
    files = sorted({str(file) for name in names for file in TESTS.glob(f"test_{name}_host.py")})
    with tempfile.TemporaryDirectory() as folder:
        mutations = Mutations(folder)
        plugins = [Short()] * options.short + [mutations] * options.mutate
        status = int(pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=plugins))
    if not options.mutate or status != 0:
        return status
    redundant = sorted(mutations.passed - mutations.needed)
    unreached = sorted(set(mutations.places) - mutations.passed)
    print(f"barriers: {len(mutations.needed)} of {len(mutations.places)} are missed")
    print(f"passed and not missed: {' '.join(redundant) or 'none'}")
    print(f"passed by no test: {' '.join(unreached) or 'none'}")
    # A selection of families does not reach the others' barriers.
    return int(bool(unreached) and not options.families)


if __name__ == "__main__":
    sys.exit(main())
