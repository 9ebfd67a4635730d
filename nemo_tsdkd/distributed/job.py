"""The ranks of a training job: those that train the student and, with `teacher.nodes`, those that only read for it.

Either side has a default process group of its own, so that NeMo and Megatron meet a world of their own size; what
passes between the sides goes through groups of all ranks.
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

from nemo_tsdkd.config.schema import TrainConfig
from nemo_tsdkd.distributed.groups import COLLECTIVE_TIMEOUT, LONG_TIMEOUT, meeting, process_group


@dataclass(frozen=True)
class Job:
    """Groups of all ranks of a job.

    Attributes:
        rank, world_size: among all ranks of the job; the student's come first.
        everyone: moves tensors on the device.
        messages: moves tensors on the host and waits for hours; None where the sides are one.
        reads_only: this rank is one of the teacher's nodes.
    """

    rank: int
    world_size: int
    everyone: Any  # a ProcessGroup, or a backend of one: both have the same collectives
    messages: Any = None
    reads_only: bool = False

    def begin(self, trains: bool | None = None) -> bool:
        """Whether the student's ranks train in this attempt: they say so, the teacher's nodes ask. Collective."""
        return self.messages is None or bool(self.tell(torch.tensor([bool(trains)], dtype=torch.int64)))

    def tell(self, tensor: Tensor) -> Tensor:
        """Give what rank 0 holds to all ranks, in place. Collective over both sides; may wait for a rollout."""
        self.messages.broadcast(tensor, 0).wait()
        return tensor


@contextmanager
def job_groups(config: TrainConfig) -> Iterator[Job]:
    """Let the ranks of a training job meet; after an error the groups stay, since other ranks may wait in them."""
    if not config.teacher.nodes:
        with process_group():
            yield Job(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return
    assert not dist.is_initialized(), "the sides meet before anything else does"
    with meeting():
        store, rank, world_size = next(iter(dist.rendezvous("env://")))
    first = config.student_world_size
    reads_only = rank >= first
    side, members = ("teacher", world_size - first) if reads_only else ("student", first)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(side, store),
        rank=rank - first if reads_only else rank,
        world_size=members,
        timeout=COLLECTIVE_TIMEOUT,
    )
    os.environ["WORLD_SIZE"] = str(members)  # Lightning compares it with its own devices x nodes
    messages: Any = dist.ProcessGroupGloo(dist.PrefixStore("messages", store), rank, world_size, LONG_TIMEOUT)
    everyone = messages
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        everyone = dist.ProcessGroupNCCL(dist.PrefixStore("everyone", store), rank, world_size, options)
    yield Job(rank, world_size, everyone, messages, reads_only)
    messages.allreduce([torch.zeros(1)]).wait()  # nobody leaves before the others are done
    dist.destroy_process_group()
