"""One process for each run folder: who holds the lock, when it counts as dead, and what the loser does."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_tsdkd.checkpoints import run_lock
from nemo_tsdkd.checkpoints.run_lock import Holder, lock

HOLD = """
import sys, time
from pathlib import Path
from nemo_tsdkd.checkpoints.run_lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def soon(monkeypatch):
    """Times of a lock in tenths of a second, and a watch that does not sleep long."""
    monkeypatch.setattr(run_lock, "REFRESH", 0.05)
    monkeypatch.setattr(run_lock, "STALE", 0.6)
    sleep = time.sleep
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: sleep(seconds / 20))


@pytest.fixture
def held_elsewhere(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def holder(run_dir):
    (path,) = (run_dir / "lock").iterdir()
    return Holder(**json.loads(path.read_text()))


def left_by(run_dir, **changes):
    """A lock as a process of this machine leaves it, but for `changes`."""
    (run_dir / "lock").mkdir(parents=True)
    values = asdict(replace(Holder.this_process(), **changes))
    (run_dir / "lock" / "7.json").write_text(json.dumps(values))


def test_a_second_process_gets_the_holder_s_name(held_elsewhere, tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError) as error, lock(tmp_path):
        pass
    who = f"{os.uname().nodename}, process {held_elsewhere.pid}, since {holder(tmp_path).since}"
    assert str(error.value) == (f"run_dir = '{tmp_path}': in use by {who}. Wait for its end, or give another run_dir.")
    assert time.monotonic() - started < 5


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_at_once(held_elsewhere, tmp_path):
    held_elsewhere.kill()
    held_elsewhere.wait()
    started = time.monotonic()
    with lock(tmp_path) as claim:
        claim.require_held()
        assert claim.number == 2 and holder(tmp_path).pid == os.getpid()
    assert time.monotonic() - started < 5


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    left_by(tmp_path, pid=os.getppid(), process_start=1)
    with lock(tmp_path) as claim:
        assert claim.number == 8


def test_a_zombie_does_not_write(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
        while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]:
            time.sleep(0.01)
        with lock(tmp_path):
            pass


def test_a_released_lock_is_taken_at_once_and_numbers_only_grow(tmp_path):
    for number in (1, 2, 3):
        with lock(tmp_path) as claim:
            assert claim.number == number and not holder(tmp_path).released
        assert holder(tmp_path).released
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError("an error releases it too")
    assert holder(tmp_path).released


ELSEWHERE = {"host": "node7", "machine": "another boot", "pid": 1}


@pytest.mark.parametrize(
    ("job", "restarts", "waits"),
    [("12", "0", False), ("12", "1", True), ("13", "0", True)],
    ids=["requeued", "same attempt", "another job"],
)
def test_a_requeued_job_does_not_wait_for_its_earlier_attempt(job, restarts, waits, tmp_path, monkeypatch, soon):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left_by(tmp_path, **ELSEWHERE, job=job, restarts=restarts)
    watched = []
    monkeypatch.setattr(run_lock, "_now", lambda run_dir: watched.append(1) or time.time())
    with lock(tmp_path):
        pass
    assert bool(watched) is waits


def test_an_earlier_attempt_of_the_job_that_is_still_dying_is_no_reason_to_wait(held_elsewhere, tmp_path, monkeypatch):
    path = tmp_path / "lock" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": "12", "restarts": "0"}))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock(tmp_path) as claim:
        assert claim.number == 2 and held_elsewhere.poll() is None


def test_the_lock_of_another_machine_is_watched_until_it_is_stale(tmp_path, soon):
    left_by(tmp_path, **ELSEWHERE)
    started = time.monotonic()
    with lock(tmp_path) as claim:
        assert claim.number == 8
    assert time.monotonic() - started >= 0.5


def test_a_holder_on_another_machine_that_refreshes_is_alive(tmp_path, soon, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    left_by(tmp_path, **ELSEWHERE, job="12", restarts="0")
    timer = threading.Timer(0.2, lambda: os.utime(tmp_path / "lock" / "7.json"))
    timer.start()
    with pytest.raises(ValueError, match=r"in use by node7, process 1, Slurm job 12, since"), lock(tmp_path):
        pass
    timer.join()


def test_a_stale_lock_of_another_machine_is_taken_at_once(tmp_path, monkeypatch):
    left_by(tmp_path, **ELSEWHERE)
    old = time.time() - run_lock.STALE - 5
    os.utime(tmp_path / "lock" / "7.json", (old, old))
    monkeypatch.setattr(run_lock.time, "sleep", pytest.fail)
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", '{"host": 1}', "[]", "\0" * 50, "[" * 100_000], ids=str.__len__)
def test_a_lock_that_cannot_be_read_counts_until_it_is_stale(text, tmp_path, soon):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "3.json").write_text(text)
    (tmp_path / "lock" / "notes.json").write_text("a stranger's")
    started = time.monotonic()
    with lock(tmp_path) as claim:
        assert claim.number == 4
    assert time.monotonic() - started >= 0.5


def test_a_holder_refreshes_its_lock(tmp_path, soon):
    with lock(tmp_path):
        path = tmp_path / "lock" / "1.json"
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert path.stat().st_mtime_ns > first


def test_who_was_taken_for_dead_stops_and_does_not_release_the_other_s_lock(tmp_path, soon):
    """A suspended process: its lock went stale, another took over, and then it comes back."""
    with lock(tmp_path) as claim:
        claim.require_held()
        values = asdict(replace(Holder.this_process(), host="node9", pid=77))
        (tmp_path / "lock" / "2.json").write_text(json.dumps(values))
        (tmp_path / "lock" / "1.json").unlink()
        with pytest.raises(ValueError, match=r"was taken over by node9, process 77, since .* writes no more"):
            claim.require_held()
    assert holder(tmp_path) == Holder(**values)


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    left_by(tmp_path, pid=os.getppid(), process_start=1)
    script = HOLD.replace("time.sleep(600)", "time.sleep(2)").replace(
        "with lock", "go = Path(sys.argv[2])\nwhile not go.exists(): pass\nwith lock"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "go")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(5)
    ]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    outputs = [process.communicate()[0] for process in processes]
    assert outputs.count(b"held\n") == 1 and outputs.count(b"") == 4
    assert [process.returncode for process in processes].count(1) == 4


def test_a_late_newcomer_that_looked_long_ago_gets_nothing(tmp_path, monkeypatch):
    """It judged lock 7; meanwhile others took 8 and 9, and removed what lay below."""
    left_by(tmp_path, pid=os.getppid(), process_start=1)
    folder, has_ended = tmp_path / "lock", run_lock._has_ended

    def slow(run_dir, number, me):
        ended = has_ended(run_dir, number, me)
        if number == 7:
            (folder / "7.json").rename(folder / "9.json")
            (folder / "9.json").write_text(json.dumps(asdict(me)))  # this process, which lives
        return ended

    monkeypatch.setattr(run_lock, "_has_ended", slow)
    with pytest.raises(ValueError, match="in use by"), lock(tmp_path):
        pass
    assert [p.name for p in folder.iterdir()] == ["9.json"]


def test_a_full_disk_leaves_no_empty_lock(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lock, "sync", full)
    with pytest.raises(OSError, match="No space left"), lock(tmp_path):
        pass
    assert list((tmp_path / "lock").iterdir()) == []
