import signal

import pytest
from dhcl import errors
from dhcl.words import counted, did_you_mean, first_line, first_ones, show


def test_the_nearest_name_is_offered_whatever_its_case_and_punctuation():
    names = ("market1501", "msmt17_v1", "cuhk03-np")
    assert did_you_mean("Market-1510", names) == "; did you mean 'market1501'?"
    assert did_you_mean("MSMT17 V1", names, before=", ") == ", did you mean 'msmt17_v1'?"
    assert did_you_mean("zzz", names) == ""
    assert did_you_mean("", ()) == ""


def test_long_lists_end_with_how_many_are_left_out():
    assert first_ones(["a", "b"], 2) == ["a", "b"]
    assert first_ones(["a", "b", "c"], 2) == ["a", "b", "and 1 more"]
    assert first_ones([str(i) for i in range(2010)])[9:] == ["9", "and 2,000 more"]
    assert first_ones([]) == []


def test_one_of_a_thing_is_singular():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(ValueError(" ")) == "ValueError"


def test_names_of_any_bytes_can_be_printed():
    assert show("a\udcff") == "a\\udcff"
    assert show("人") == "人"
    assert show("a b\u00a0ü\u200dé") == "a b\u00a0ü\u200dé"


def test_names_are_shown_on_one_line():
    assert show("a\nb\tc\x1b[0m") == "a\\nb\\tc\\x1b[0m"
    assert show("a\u2028b\x85") == "a\\u2028b\\x85"
    for number in (*range(32), *range(127, 160), 0x2028, 0x2029):
        assert len(f"{show(chr(number))}.".splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "builtin", "status"),
    [
        (errors.ConfigError, ValueError, 2),
        (errors.DataError, ValueError, 2),
        (errors.FeatureError, ValueError, 2),
        (errors.UnavailableWeights, RuntimeError, 2),
        (errors.CheckpointError, RuntimeError, 1),
        (errors.Diverged, RuntimeError, 1),
        (errors.NoClusters, RuntimeError, 1),
    ],
)
def test_errors_are_one_family_with_a_status(kind, builtin, status):
    error = kind("why")
    assert isinstance(error, errors.DHCLError)
    assert isinstance(error, builtin)
    assert (str(error), error.status) == ("why", status)


def test_an_interruption_has_the_status_of_its_signal():
    error = errors.Interrupted(signal.SIGTERM)
    assert (str(error), error.status, error.signal_number) == ("stopped by SIGTERM", 143, 15)
    assert isinstance(error, errors.DHCLError)
