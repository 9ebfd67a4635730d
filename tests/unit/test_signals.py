"""Stop signals before training has begun, and ranks that lost their launcher."""

import os
import signal
import subprocess
import sys

import pytest

WAIT = "print('ready', flush=True); time.sleep(600)"
BUILDING = "exit_on_stop_signals('nemo-tsdkd train x=1', prints=True);" + WAIT
# Training notes a signal; the "step" is a library's call that does not return to the interpreter for a while.
TRAINING = (
    "handle_stop_signals(lambda s, f: print(s, flush=True)); print('ready', flush=True)\nwhile True: time.sleep(600)"
)


def start(code, before="pass", **variables):
    script = f"import os, signal, time\nfrom nemo_tsdkd.distributed.signals import *\n{before}\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_while_models_are_built_a_signal_ends_the_process_with_one_line(name):
    process = start(BUILDING)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[name]
    assert err == (
        f"nemo-tsdkd: {name}: stopped before the first step of this attempt, nothing to save. "
        "Start again with: nemo-tsdkd train x=1\n"
    )


def test_what_the_parent_ignores_stays_ignored():
    """As with nohup, and in the background of a script."""
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = start(BUILDING, before=ignored)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once_and_nothing_else_does():
    process = start(TRAINING)
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        process.send_signal(signum)
        assert process.stdout.readline() == f"{int(signum)}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT


RANK = """
import os, signal, time
from nemo_tsdkd.distributed.signals import end_with_torchrun
end_with_torchrun()
signal.signal(signal.SIGTERM, lambda s, f: (print("asked to stop", flush=True), os._exit(0)))
print("ready", flush=True)
time.sleep(8)
print("trains on", flush=True)
"""


def test_a_rank_whose_torchrun_is_gone_is_asked_to_stop(tmp_path):
    """SIGUSR1 ends torchrun without a word to its ranks, which lead sessions of their own."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", str(tmp_path / "rank.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.stdout.read() == "asked to stop\n"
        assert launcher.wait(30) == -signal.SIGUSR1


def test_a_rank_that_torchrun_did_not_start_outlives_its_parent(tmp_path):
    """As with nohup, whose shell ends at once."""
    (tmp_path / "rank.py").write_text(RANK.replace("sleep(8)", "sleep(1)"))
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, {str(tmp_path / 'rank.py')!r}])"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment)
    assert done.stdout == "ready\ntrains on\n"
