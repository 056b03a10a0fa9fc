"""The Chromium that pages are looked at in: the system's, or the one Playwright has fetched."""

import contextlib
import shutil
from pathlib import Path

import pytest


@contextlib.contextmanager
def chromium():
    """A browser, or a reason to skip."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    with api.sync_playwright() as playwright:
        file = found or playwright.chromium.executable_path
        if not Path(file).exists():
            pytest.skip("no Chromium: playwright install chromium")
        opened = playwright.chromium.launch(executable_path=file, args=["--no-sandbox"])
        yield opened
        opened.close()
