"""Run a function on N gloo ranks that share one import: `run_ranks(fn, 4, *args)`.

Python's fork server imports the heavy stack once and forks every rank from there, so a rank costs a third of a
second instead of fifteen, and no rank inherits autograd threads or a process group from pytest. The function is
pickled by reference: it must live at module level of a test module. What each rank returns comes back as a list.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

PR_SET_PDEATHSIG = 1  # linux/prctl.h
HAS_GPU = Path("/proc/driver/nvidia/version").exists()  # torch would have to ask CUDA
TIMEOUT = 600 if HAS_GPU else 240  # seconds for all ranks of a call

# conftest.py widens this to the Megatron stack when a collected test needs it.
PRELOAD = ["torch", "pytest", "nemo_tsdkd.objective"]
_context: Any = None


def fork_context() -> Any:
    """The fork server's context, started with PRELOAD at its first use. Where there is a GPU, ranks are spawned and
    import for themselves: CUDA does not work in a process forked from one that has asked for it, as imports do."""
    global _context
    if HAS_GPU:
        return mp.get_context("spawn")
    if _context is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        mp.set_forkserver_preload(PRELOAD)
        _context = mp.get_context("forkserver")
    return _context


def start_anew(preload: list[str], path: list[Path]) -> None:
    """End the fork server, which cannot change its mind, and begin one that imports `preload`, also from `path`."""
    global PRELOAD, _context
    PRELOAD, _context = preload, None
    forkserver._forkserver._stop()
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=search):
        fork_context()
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, meet: bool, args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="False",
    )
    os.setpgid(0, 0)  # so that a kill reaches what a rank forks, too
    # No rank outlives a test run that was killed: neither with the fork server, its parent, nor without it, which
    # lives as long as one of its ranks does.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_die_with_the_run, daemon=True).start()
    log = os.open(f"{folder}/{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    code = 0
    try:
        if meet:
            dist.init_process_group("gloo")
        result = fn(*args)
        Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skip atexit hooks of half the stack: the result is written


def _die_with_the_run() -> None:
    run = mp.parent_process()
    assert run is not None
    run.join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = TIMEOUT,
    meet: bool = True,
    kill_when: Callable[[], bool] = lambda: False,
    victims: Sequence[int] = (),
) -> list[Any] | None:
    """Call `fn(*args)` on `world_size` ranks; return their results in rank order.

    The ranks `meet` in a process group before the call, unless `fn` is to start one itself. As soon as `kill_when()`
    holds, all ranks get SIGKILL, as when a node is lost, and the result is None. With `victims` these ranks die first,
    and the others half a second later, as by a launcher that notices.

    Raises AssertionError with the first failed rank's log when a rank fails or the time is up; every rank is
    killed at the first failure, since the others would wait in a collective for ever.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        ranks = [
            fork_context().Process(target=_rank_main, args=(fn, r, world_size, port, folder, meet, args))
            for r in range(world_size)
        ]
        for p in ranks:
            p.start()
        deadline = time.monotonic() + timeout
        killed = False
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline and not killed:
            if any(p.exitcode not in (None, 0) for p in ranks):
                break
            killed = kill_when()
            if not killed:
                time.sleep(0.002)
        late = [r for r, p in enumerate(ranks) if p.is_alive()]
        if killed and victims:
            for rank in victims:
                _kill(ranks[rank])
            time.sleep(0.5)
        for p in ranks:
            _kill(p)
        failed = [r for r, p in enumerate(ranks) if p.exitcode != 0 and r not in late] or late
        if killed and (victims or failed == late):
            return None
        if failed:
            log = Path(folder, f"{failed[0]}.log")
            text = log.read_text(errors="replace")[-6000:] if log.exists() else "(no log)"
            why = "failed" if failed is not late else f"did not finish in {timeout:.0f} s"
            raise AssertionError(f"rank {failed[0]} of {world_size} {why}:\n{text}")
        return [pickle.loads(Path(folder, f"{r}.pkl").read_bytes()) for r in range(world_size)]


def _kill(process: Any) -> None:
    """SIGKILL a rank and all it forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has not come to lead its group yet
    process.join()
