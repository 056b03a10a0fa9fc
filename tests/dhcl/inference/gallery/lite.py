"""A Milvus Lite server on this machine, which tests start, kill and stop."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time

import pytest


class Lite:
    """A server with its data in a folder, on a port of its own that it keeps."""

    def __init__(self, folder):
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process = None

    def address(self, name):
        return f"milvus://127.0.0.1:{self.port}/{name}"

    def start(self):
        """Start it, and wait until it answers."""
        words = ("--data-dir", str(self._folder), "--host", "127.0.0.1", "--port", str(self.port))
        with (self._folder.parent / "lite.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "milvus_lite", "server", *words], stdout=log, stderr=log
            )
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, "the server has ended"
            time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def end(self, kill=False):
        """End it, at once or as it would itself."""
        if self._process is not None:
            (self._process.kill if kill else self._process.terminate)()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


@contextlib.contextmanager
def milvus_lite(folder):
    """A server that answers, or a reason to skip."""
    for needed in ("pymilvus", "milvus_lite"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    server = Lite(folder / "data")
    server.start()
    try:
        yield server
    finally:
        server.end()
