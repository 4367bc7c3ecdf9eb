"""A short part of tests/torture.py: every way of disturbing a run, a few times."""

import re
import subprocess
import sys

import torture
from conftest import ROOT
from runs import ENV


def test_nothing_is_lost_in_a_minute_of_torture():
    """In a process of its own: it forks, which a worker of the test run with its threads should not."""
    words = [sys.executable, str(ROOT / "tests" / "torture.py"), "--minutes", "1"]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=400)
    found = {way: (int(a), int(b)) for way, a, b in re.findall(r"^(\w+) +(\d+) of (\d+) survived", done.stdout, re.M)}
    assert done.returncode == 0 and set(found) == set(torture.WAYS), done.stdout[-3000:] + done.stderr[-3000:]
    assert all(survived == tried for survived, tried in found.values()) and sum(t for _, t in found.values()) >= 6
