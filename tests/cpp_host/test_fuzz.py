"""The fuzz targets of the C++ half still build and find nothing, and would find something."""

import subprocess

import pytest

from tests.cpp_host import fuzz

REASON = fuzz.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.parametrize("target", fuzz.targets())
def test_a_short_run(target):
    assert fuzz.run(target, 3000, threads=False, quick=True)


def test_threads():
    assert fuzz.run("ranking", 300, threads=True, quick=True)


@pytest.mark.parametrize(
    ("threads", "good", "bad", "found"),
    [
        # An index past the end of the members.
        (False, "matches[i]", "matches[i + 1]", "AddressSanitizer"),
        # All threads share the scratch of one.
        (True, "thread_local std::vector<int64_t> matches", "static std::vector<int64_t> matches",
         "ThreadSanitizer: data race"),
        # Entries of equal distance in another order.
        (False, "row[g] == row[match] && g < match", "row[g] == row[match] && g > match",
         "wrong result: the rank of a match"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(tmp_path, monkeypatch, capsys, threads, good, bad, found):
    """The C++ of one family, spoiled."""
    spoiled = tmp_path / "csrc"
    subprocess.run(["cp", "-r", str(fuzz.SOURCES), str(spoiled)], check=True)
    source = spoiled / "ranking.cpp"
    text = source.read_text()
    assert good in text
    source.write_text(text.replace(good, bad))
    monkeypatch.setattr(fuzz, "SOURCES", spoiled)
    monkeypatch.setattr(fuzz, "BUILD", tmp_path / "build")
    assert not fuzz.run("ranking", 20_000, threads, quick=True)
    assert found in capsys.readouterr().out
