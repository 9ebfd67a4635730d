"""Displays in a log file, which is no terminal."""

import io

import pytest

from nemo_tsdkd.distributed import progress


@pytest.fixture
def log(monkeypatch):
    """What is displayed, and a clock to set."""
    file, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "terminal", lambda: file)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return file, clock


def shown(log, seconds, **options):
    file, clock = log
    with progress.ProgressDisplay("step", len(seconds), **options) as display:
        for done, at in enumerate(seconds, 1):
            clock[0] = at
            display.show(done, "fine")
    return [line.split("  ")[0] for line in file.getvalue().splitlines()]


def test_the_first_the_last_and_a_line_a_minute(log):
    assert shown(log, [1, 2, 62, 63, 64]) == ["step 1/5", "step 3/5", "step 5/5"]
    assert log[0].getvalue().splitlines()[1] == "step 3/5  fine  ETA 0:00:41"


def test_a_short_work_may_be_silent_and_a_long_one_not(log):
    assert shown(log, [1, 2, 3], only_long=True) == []
    assert shown(log, [10, 70, 71], only_long=True) == ["step 2/3", "step 3/3"]


def test_only_rank_zero_displays(log):
    with progress.on_rank_zero(1, "prompt", 4) as display:
        assert display is None
    with progress.on_rank_zero(0, "prompt", 4) as display:
        display.show(1, "90 tokens/s")
    assert log[0].getvalue().startswith("prompt 1/4  90 tokens/s  ETA")
