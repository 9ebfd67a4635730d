"""The ranks of a training job: those that train the student and, with `teacher.nodes`, those that run the teacher only.

Each side has its own default process group, because NeMo and Megatron take the default group's size as the world size.
Data passes between the sides through groups of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.groups import COLLECTIVE_TIMEOUT, LONG_TIMEOUT, process_group, rendezvous_errors


@dataclass(frozen=True)
class Job:
    """Groups of all ranks of a job.

    Attributes:
        rank, world_size: among all ranks of the job; the student's come first.
        device_group: all ranks, for tensors on the device.
        host_group: all ranks, for tensors on the host, with a timeout of a day; None without `teacher.nodes`.
        teacher_only: this rank belongs to the teacher's nodes.
    """

    rank: int
    world_size: int
    device_group: Any  # a ProcessGroup, or a backend of one: both have the same collectives
    host_group: Any = None
    teacher_only: bool = False

    def agree_to_train(self, trains: bool | None = None) -> bool:
        """Whether the student's ranks train in this attempt. They pass `trains`; the teacher's get it. Collective."""
        return self.host_group is None or bool(self.broadcast(torch.tensor([bool(trains)], dtype=torch.int64)))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast rank 0's tensor to all ranks, in place. Collective over both sides; may wait for a rollout."""
        self.host_group.broadcast(tensor, 0).wait()
        return tensor


@contextmanager
def job_groups(config: TrainConfig) -> Iterator[Job]:
    """Create the groups of a training job. After an error they stay, because other ranks may wait in them."""
    if not config.teacher.nodes:
        with process_group():
            yield Job(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return
    assert not dist.is_initialized(), "the groups of a job are created first"
    with rendezvous_errors():
        store, rank, world_size = next(iter(dist.rendezvous("env://")))
    first = config.student_world_size
    teacher_only = rank >= first
    side, members = ("teacher", world_size - first) if teacher_only else ("student", first)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(side, store),
        rank=rank - first if teacher_only else rank,
        world_size=members,
        timeout=COLLECTIVE_TIMEOUT,
    )
    os.environ["WORLD_SIZE"] = str(members)  # Lightning compares it with its own devices x nodes
    host_group: Any = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, world_size, LONG_TIMEOUT)
    device_group = host_group
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        device_group = dist.ProcessGroupNCCL(dist.PrefixStore("device", store), rank, world_size, options)
    yield Job(rank, world_size, device_group, host_group, teacher_only)
    host_group.allreduce([torch.zeros(1)]).wait()  # no rank leaves before the others are done
    dist.destroy_process_group()
