"""Claims about plumbing/figures.py.

* A table is aligned; seconds are written for people.
* Memory is what the kernel says.
* A clock adds up the seconds of each phase.
"""

import os
import time
from pathlib import Path

import pytest

from plumbing import figures


def test_table_is_aligned():
    assert figures.format_table(["axis", "rows", "mae"], [
        ["politeness", 12, 0.12345], ["safety", 3, -1.0]]) == (
        "axis        rows     mae\n"
        "----------  ----  ------\n"
        "politeness    12   0.123\n"
        "safety         3  -1.000")
    assert figures.format_table(["a", "b"], []) == "a  b\n-  -"


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (75.3, "1 min 15 s"),
    (3599.9, "1 h 0 min"), (7380, "2 h 3 min")])
def test_seconds_for_people(seconds, text):
    assert figures.format_seconds(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_memory_is_what_the_kernel_says():
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))  # KiB
    assert figures.peak_rss_gb() == pytest.approx(peak * 1024 / 1e9, rel=0.1)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1e6 < figures.available_memory() <= total


def test_a_clock_adds_up_the_seconds_of_each_phase(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = figures.Clock()
    for phase, spent in (("sampling", 2.0), ("training", 8.0), ("sampling", 1.0)):
        with clock(phase):
            now[0] += spent
        now[0] += 100  # between two phases nobody counts
    assert clock.seconds == {"sampling": 3.0, "training": 8.0}
