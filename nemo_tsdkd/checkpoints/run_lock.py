"""A lock for each run folder: one process at a time writes it. Works on any shared disk and needs no server.

`run_dir/lock/N.json` names the process that writes the run; the greatest N counts. A process takes the lock
over by creating N + 1 with O_EXCL, which only one of several processes can do, on network file systems too. A process
that counted as dead and continues finds a number above its own and stops. A released lock stays, marked as released, so
that numbers only grow.

A holder touches its file every `REFRESH` seconds. It counts as dead

- at once, if its process has ended on this machine, or it was an earlier attempt of this Slurm job;
- otherwise when its file is older than `STALE` seconds by the disk's own clock. Until then the newcomer waits and
  watches: a refresh shows that the holder is alive, and the newcomer gives up.

Readers (export, reports) need no lock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import sync, write_atomically
from nemo_tsdkd.config.validation import UserError

REFRESH, STALE = 15.0, 120.0  # seconds; NFS may show a refresh to other nodes a minute late
LOCK = "lock"  # subfolder of a run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that writes a run, and how to find out whether it still runs."""

    host: str
    pid: int
    process_start: int  # clock ticks after boot: process numbers are used again
    machine: str  # boot id and namespace of process numbers: where `pid` means this process
    job: str | None  # Slurm's, with the number of its restarts
    restarts: str | None
    since: str
    released: bool = False

    @classmethod
    def this_process(cls) -> Holder:
        env = os.environ
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            host=env.get("SLURMD_NODENAME", socket.gethostname()),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or 0,
            machine=f"{boot} {os.readlink('/proc/self/ns/pid')}",
            job=env.get("SLURM_JOB_ID"),
            restarts=env.get("SLURM_RESTART_COUNT", "0") if "SLURM_JOB_ID" in env else None,
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.host}, process {self.pid}{job}, since {self.since}"


@dataclass(frozen=True)
class Claim:
    """The right to write a run. Plain data: every rank may hold and copy it."""

    run_dir: Path
    number: int

    def require_held(self) -> None:
        """Raise UserError once another process has taken the run over: nothing more may be written."""
        if (newest := _newest(self.run_dir)) != self.number:
            raise UserError(
                f"run_dir = {str(self.run_dir)!r}: was taken over by {_read(self.run_dir, newest) or 'another process'}"
                f" because this one had not refreshed its lock for {STALE:.0f} s. This one stops and writes no more."
            )


@contextmanager
def lock(run_dir: Path) -> Iterator[Claim]:
    """Hold a run's lock for the length of the block. Call it on one rank.

    Raises:
        UserError: another living process holds it.
    """
    claim = _acquire(run_dir)
    ended = threading.Event()
    threading.Thread(target=_refresh_until, args=(claim, ended), name="run lock", daemon=True).start()
    try:
        yield claim
    finally:
        ended.set()
        with suppress(OSError):  # the lock of an ended process does not count, released or not
            _release(claim)


def _acquire(run_dir: Path) -> Claim:
    me = Holder.this_process()
    (run_dir / LOCK).mkdir(parents=True, exist_ok=True)
    while True:
        newest = _newest(run_dir)
        if newest and not _has_ended(run_dir, newest, me):
            raise UserError(
                f"run_dir = {str(run_dir)!r}: in use by {_read(run_dir, newest) or 'a process with an unreadable lock'}"
                ". Wait for its end, or give another run_dir."
            )
        claim = Claim(run_dir, newest + 1)
        if not _create(_path(claim), me):
            continue  # another process was faster: look at that one
        if (
            _newest(run_dir) != claim.number
        ):  # too late: another process has taken the run over and created greater numbers
            _path(claim).unlink(missing_ok=True)
            continue
        for number in _numbers(run_dir):
            if number < claim.number:
                _path(Claim(run_dir, number)).unlink(missing_ok=True)
        return claim


def _create(path: Path, me: Holder) -> bool:
    """Whether this process is the one that created the file."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(me), file)
        sync(path)
        sync(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _has_ended(run_dir: Path, number: int, me: Holder) -> bool:
    """Whether the lock's holder has ended; watches its file where nothing else shows it."""
    holder = _read(run_dir, number)
    if holder:
        if holder.released:
            return True
        if holder.job is not None and holder.job == me.job and holder.restarts != me.restarts:
            return True  # Slurm has ended that attempt; what may be left of it on a lost node finds this one's lock
        if holder.machine == me.machine:
            return _process_start(holder.pid) != holder.process_start
    path = _path(Claim(run_dir, number))
    logger.info("%s: held by %s: watching whether it is alive.", path, holder or "an unnamed process")
    refreshed = _modified(path)
    while refreshed is not None and _now(run_dir) - refreshed <= STALE:
        time.sleep(1)
        if _newest(run_dir) != number or _modified(path) != refreshed:
            return False
    return True


def _refresh_until(claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(REFRESH):
        with suppress(OSError):  # the disk may be unavailable for a while; `Claim.require_held` finds a lost lock
            os.utime(_path(claim))


def _release(claim: Claim) -> None:
    if _newest(claim.run_dir) == claim.number and (holder := _read(claim.run_dir, claim.number)):
        write_atomically(_path(claim), json.dumps(asdict(holder) | {"released": True}).encode())


def _path(claim: Claim) -> Path:
    return claim.run_dir / LOCK / f"{claim.number}.json"


def _numbers(run_dir: Path) -> list[int]:
    return [int(p.stem) for p in (run_dir / LOCK).glob("*.json") if p.stem.isascii() and p.stem.isdecimal()]


def _newest(run_dir: Path) -> int:
    return max(_numbers(run_dir), default=0)


def _read(run_dir: Path, number: int) -> Holder | None:
    """None where the file is gone, damaged, or not written to its end yet."""
    try:
        return Holder(**json.loads(_path(Claim(run_dir, number)).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _modified(path: Path) -> float | None:
    try:
        with path.open("rb") as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now(run_dir: Path) -> float:
    """The time by the clock of the run's disk, which sets the times of its files."""
    with tempfile.TemporaryFile(dir=run_dir / LOCK) as file:
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks after boot; None if there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
