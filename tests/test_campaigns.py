"""A short form of the campaigns; the long ones are `python -m tests.campaigns`."""

from tests.campaigns import WRITERS, campaign


def test_killed_writers_leave_whole_files():
    found = campaign("writers", 3, seed=0)
    assert found.keys() == WRITERS.keys()
    assert all(each["kills"] == 3 for each in found.values())
