"""The Slurm lab (lab.sh) from Python: jobs are submitted as a user would, and awaited with a bound."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAB_SH = str(Path(__file__).with_name("lab.sh"))
COMMANDS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter", "gcc")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")


def unavailable() -> str | None:
    """Why the lab cannot run here, or None."""
    if os.geteuid() != 0:
        return "the Slurm lab needs root: it makes network namespaces"
    missing = [c for c in COMMANDS if shutil.which(c) is None]
    if missing or not Path("/usr/include/slurm/spank.h").exists():
        return f"the Slurm lab lacks {', '.join(missing) or 'slurm/spank.h'}: run tests/slurm/install.sh"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "the Slurm lab needs network, UTS and mount namespaces, which this container may not create"
    return None


def lab(*arguments: str, env: dict[str, str] | None = None, check: bool = True) -> str:
    """Run one lab.sh command; its standard output."""
    done = subprocess.run(
        ["bash", LAB_SH, *arguments], cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, f"lab.sh {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what()}"
        time.sleep(0.2)


@dataclass
class Job:
    """A submitted job and its run folder."""

    id: str
    output: Path
    run_dir: Path

    @classmethod
    def submit(
        cls, script: str, run_dir: Path, *arguments: str, flags: tuple[str, ...] = TWO_BY_TWO, **env: str
    ) -> Job:
        """sbatch slurm/SCRIPT, unmodified: flags on the command line only make it smaller than its header."""
        output = run_dir.parent / f"{run_dir.name}-%j.out"
        command = ("sbatch", "--parsable", f"--output={output}", *flags, f"slurm/{script}", *arguments)
        number = lab("run", *command, env={"RUN_DIR": str(run_dir), "ALLOW_CPU": "1", **env})
        return cls(number, Path(str(output).replace("%j", number)), run_dir)

    def field(self, name: str) -> str:
        text = lab("run", "scontrol", "show", "job", "--oneliner", self.id)
        return next(word.split("=", 1)[1] for word in text.split() if word.startswith(f"{name}="))

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else "(no output yet)"

    def logs_of(self, step: str) -> str:
        """What all ranks of a step wrote, over all attempts."""
        return "\n".join(p.read_text() for p in sorted(self.run_dir.glob(f"logs/{self.id}.*/{step}-*.log")))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait for a line in the job's output."""
        wait_until(
            lambda: text in self.log, seconds, lambda: f"no {text!r} in the output of job {self.id}:\n{self.log}"
        )

    def wait_end(self, state: str, seconds: float = 60) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_until(lambda: self.state in ended, seconds, lambda: f"job {self.id} is {self.state}:\n{self.log}")
        assert self.state == state, f"{self.state}:\n{self.log}\n{self.logs_of('train')[-3000:]}"

    def last_step(self) -> int:
        """Step of the newest checkpoint, as the trainer says; 0 before the first."""
        path = self.run_dir / "last_step"
        return int(path.read_text().strip() or 0) if path.exists() else 0

    def process(self, rank: int) -> int:
        """The process of one rank of the training step; nodes of the lab share the machine's process numbers."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={rank}"}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                environment = set((path / "environ").read_text(errors="replace").split("\0"))
            except OSError:
                continue
            if b"train" in words and wanted <= environment:
                return int(path.name)
        raise AssertionError(f"no process of rank {rank}:\n{self.log}")


def preempt(lab: Callable[..., str], job: Job) -> None:
    """A job of a higher partition takes a node; the cluster sends SIGTERM to the tasks, or, where it sends user signals
    (`lab.sh user-signal on`), the job's own --signal first."""
    nodes = lab("run", "scontrol", "show", "hostnames", job.field("NodeList")).split()
    others = [n for n in ("node1", "node2", "node3", "node4") if n not in nodes]
    lab("run", "sbatch", "-p", "urgent", "--exclusive", "--nodes=1", f"--exclude={','.join(others)}", "--wrap=sleep 1")
