"""This process's rank: read once, before anything initialises torch.distributed.

torchrun's variables are used as they are. Under `srun` they are derived from Slurm's, so that one command works on
every cluster without torchrun; pyxis and enroot set some of them for PyTorch's images; these values are replaced.
Imports no torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_tsdkd.config.validation import UserError

FIRST_PORT, PORTS = 15000, 10000  # below Linux's ephemeral range (32768-60999), so no outgoing connection holds one

_VARIABLES = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_")
_SLURM = "slurm-"  # begins the run id that we set for srun's ranks


@dataclass(frozen=True)
class Launch:
    """This process's rank and addresses: ranks count tasks over all nodes, `node` counts nodes; both start at 0."""

    rank: int
    local_rank: int
    world_size: int
    node: int
    master_addr: str
    master_port: int


def environment_outside() -> dict[str, str]:
    """This process's environment without what a launcher says of ranks: for a child that is no rank of this job."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_VARIABLES)}


def hosts() -> list[str]:
    """The job's node names in rank order; [this host] outside Slurm.

    `scontrol` is missing inside most containers: the job script expands the list outside and exports `TSDKD_HOSTS`.

    Raises:
        UserError: under Slurm with neither `TSDKD_HOSTS` nor `scontrol`.
    """
    if "TSDKD_HOSTS" in os.environ:
        return os.environ["TSDKD_HOSTS"].split()
    nodelist = os.environ.get("SLURM_STEP_NODELIST")
    if nodelist is None:
        return [socket.gethostname()]
    if shutil.which("scontrol") is None:
        raise UserError(
            f"SLURM_STEP_NODELIST = {nodelist!r}: cannot be expanded, scontrol is not on PATH. "
            'Export TSDKD_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" before srun.'
        )
    listing = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True)
    return listing.stdout.split()


def environment() -> Launch:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, GROUP_RANK, MASTER_ADDR and MASTER_PORT; return their values.

    Order of precedence: torchrun's variables (it also sets TORCHELASTIC_RUN_ID), then the Slurm step's, then those of
    another launcher, then a world of one. MASTER_ADDR and MASTER_PORT stay as they are. Call it once per process,
    before torch.distributed or Lightning is set up.

    Raises:
        UserError: as `hosts`.
    """
    env = os.environ
    # Not SLURM_NTASKS, which is also set outside srun, where rank 0 would wait for the others.
    if "TORCHELASTIC_RUN_ID" not in env and "SLURM_STEP_NUM_TASKS" in env:
        env.update(
            RANK=env["SLURM_PROCID"],
            LOCAL_RANK=env["SLURM_LOCALID"],
            WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
            GROUP_RANK=env["SLURM_NODEID"],
            # Lightning's Slurm environment would answer SIGUSR1 with a checkpoint and a requeue of its own;
            # this variable makes it choose the torchelastic one, which reads the variables above and nothing else.
            TORCHELASTIC_RUN_ID=_SLURM + env["SLURM_JOB_ID"],
        )
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = hosts()[0]
        env.setdefault("MASTER_PORT", str(FIRST_PORT + int(env["SLURM_JOB_ID"]) % PORTS))
    elif "RANK" not in env:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return Launch(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        node=int(env.get("GROUP_RANK", "0")),
        master_addr=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
    )


def command_line(arguments: Sequence[str]) -> str:
    """What to type to run `nemo-tsdkd ARGUMENTS` as it was started here. Call it after `environment`."""
    words = shlex.join(arguments)
    if by_torchrun():
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m nemo_tsdkd {words}"
    return f"{'srun ' if 'SLURM_STEP_NUM_TASKS' in os.environ else ''}nemo-tsdkd {words}"


def by_torchrun() -> bool:
    """Whether torchrun started this rank. Call it after `environment`, which sets torchrun's variable under Slurm."""
    return not os.environ.get("TORCHELASTIC_RUN_ID", _SLURM).startswith(_SLURM)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
