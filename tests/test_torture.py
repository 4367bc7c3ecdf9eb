"""A short part of tests/torture.py: every way of disturbing a run, a few times."""

import torture


def test_nothing_is_lost_in_a_minute_of_torture():
    found = torture.main(minutes=1, only=[], seed=0)
    assert set(found) == set(torture.WAYS) and sum(tried for tried, _ in found.values()) >= len(torture.WAYS)
    assert {way: tried for way, (tried, _) in found.items()} == {way: survived for way, (_, survived) in found.items()}
