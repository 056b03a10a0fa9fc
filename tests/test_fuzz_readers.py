"""Every reader of bytes of others, with a few random changes of good files; atheris has more."""

import pytest

from tests import fuzz_readers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz_readers.readers())
def test_a_reader_gives_something_or_a_named_error(name):
    assert fuzz_readers.run_random(name, 100) >= 1


def test_what_is_wrong_is_found_and_kept(monkeypatch, tmp_path):
    def read(_):
        raise IndexError("bare")

    monkeypatch.setattr(fuzz_readers, "BUILD", tmp_path)
    bad = fuzz_readers.Reader("a", lambda _: [b"good"], read, (ValueError,))
    monkeypatch.setattr(fuzz_readers, "readers", lambda: {"bad": bad})
    with pytest.raises(fuzz_readers.Wrong, match="bad: IndexError: bare"):
        fuzz_readers.run_random("bad", 1)
    assert (tmp_path / "bad-wrong").read_bytes() == b"good"
