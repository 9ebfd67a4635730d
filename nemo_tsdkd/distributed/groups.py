"""Process groups: the default one, and one with a long timeout for work that only some ranks do.

NCCL's and Megatron's groups time out after half an hour, which is how a hang is found. Some work takes longer on one
rank: rank 0 imports a model, or all samples of a data-parallel rank run to the length limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nemo_tsdkd.config.validation import HostError, UserError, is_of_the_host

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # as Megatron's own groups have
LONG_TIMEOUT = timedelta(days=1)
Result = TypeVar("Result")


@contextmanager
def process_group() -> Iterator[None]:
    """Create the default process group before Lightning does, for imports and the resume; Lightning then uses it too.

    Raises:
        HostError: the port is in use, or rank 0 does not answer.
    """
    if dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with rendezvous_errors():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield
    dist.barrier()  # not after an error: the others may be waiting in another collective
    dist.destroy_process_group()


@contextmanager
def rendezvous_errors() -> Iterator[None]:
    """Raise HostError, with the address, where the ranks cannot meet at MASTER_ADDR:MASTER_PORT."""
    try:
        yield
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise HostError(
            f"MASTER_ADDR:MASTER_PORT = {address}: the ranks cannot meet there ({str(error).splitlines()[0]:.160}). "
            "Choose another MASTER_PORT, or try again."
        ) from error


def long_timeout_group() -> ProcessGroup:
    """A gloo group of all ranks in which a collective may take `LONG_TIMEOUT`. Collective; destroyed with the world."""
    return dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)


def rank_zero_first(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0, then on the other ranks, which read rank 0's result from a cache on a shared disk.

    Collective.

    Raises:
        UserError, HostError, RuntimeError: as `from_rank_zero`.
    """
    done: list[Result] = []
    from_rank_zero(lambda: done.append(work()))
    return done[0] if done else work()


def from_rank_zero(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0, however long it takes, and return its result on every rank. Collective.

    Raises:
        UserError, HostError, RuntimeError: rank 0's error, on every rank; RuntimeError for any other error.
    """
    if not dist.is_initialized():
        return work()
    group = long_timeout_group()
    outcome: list = [None, None, RuntimeError]
    cause = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            cause = error
            kind = HostError if is_of_the_host(error) else type(error)
            outcome[1:] = str(error), kind if kind in (UserError, HostError) else RuntimeError
    dist.broadcast_object_list(outcome, src=0, group=group)
    dist.destroy_process_group(group)
    result, message, kind = outcome
    if message is not None:
        raise kind(message) from cause
    return result
