"""Send the teacher's hidden states from the ranks that computed them to the ranks whose loss needs them.

Every rank computes the same table of all response positions from the rows' lengths, so no sizes are sent. Each position
is sent once, to one rank: if all of the student's tensor-parallel ranks need it (no sequence parallelism), each
receives a share, and they gather the shares before the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_tsdkd.distributed.layout import BatchSplit, Ints, Layout, TokenOwners, index_in_group


@dataclass(frozen=True)
class Transfer:
    """One rank's part of the exchange for one of the student's micro-batches.

    Attributes:
        send: rows of the rank's teacher buffer, in the order of the ranks they go to.
        send_counts, receive_counts: rows for and from each rank of the job.
        order: where each received row belongs in the rank's share of the micro-batch.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor


@dataclass(frozen=True)
class HiddenExchange:
    """One rank's part of one step's exchange.

    Attributes:
        transfers: one for each of the student's micro-batches, equally many on all ranks.
        rows_held: response positions that this rank's teacher shard computes, in the order of its micro-batches.
        rows_moved: positions that are sent to another rank in this step, over all ranks.
    """

    transfers: list[Transfer]
    rows_held: int
    rows_moved: int

    @classmethod
    def plan(
        cls,
        starts: Ints,
        lengths: Ints,
        teacher: tuple[Layout, BatchSplit],
        student: tuple[Layout, BatchSplit],
        rank: int,
        world_size: int,
    ) -> HiddenExchange:
        """Compute what each rank sends to which rank.

        Args:
            starts, lengths: first response position and number of response positions of each row, `[G]`.
            teacher, student: each model's layout and split of the same rows.
            rank, world_size: this rank's number and the ranks of the job, teacher's and student's.
        """
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = starts[rows] + index_in_group(rows)
        needed = TokenOwners.of(*student, rows, positions)
        order = np.argsort(needed.key, kind="stable")  # entries from here on: in the order of the student's shares
        needed = needed.take(order)
        held = TokenOwners.of(*teacher, rows[order], positions[order])

        layout = student[0]
        tensor = needed.shard
        if not layout.sequence_parallel:  # every tensor-parallel rank gets consecutive positions of the micro-batch
            group = (needed.data, needed.context, needed.micro_batch)
            tensor = index_in_group(*group) // share_size(_group_sizes(*group), layout.tensor)
        target = layout.last_stage(tensor, needed.context, needed.data)
        layout = teacher[0]
        replica = held.shard if layout.sequence_parallel else target % layout.tensor
        source = layout.last_stage(replica, held.context, held.data)

        by_source = np.argsort(held.key, kind="stable")
        at = np.empty_like(by_source)  # an entry's row in its source's buffer
        at[by_source] = index_in_group(*(x[by_source] for x in (held.data, held.context, held.shard)))
        transfers = [
            _transfer(source[m], target[m], at[m], rank, world_size)
            for m in (needed.micro_batch == i for i in range(student[1].micro_batch.max(initial=-1) + 1))
        ]
        return cls(transfers, _held_by(rank, layout, held), int((source != target).sum()))

    def exchange(self, micro_batch: int, buffer: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """This rank's share `[n, H]` of the teacher's hidden states for a micro-batch of the student's. Collective over
        the job, teacher's and student's ranks, unless nothing changes ranks in this step.

        Args:
            buffer: `[rows_held, H]` on the device or the host.
            group: all ranks of the job.
        """
        transfer = self.transfers[micro_batch]
        sent = _rows_of(buffer, transfer.send)
        if not self.rows_moved:
            return sent  # all rows are this rank's own, in the order of the share
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else buffer.device
        sent = sent.to(device)
        received = sent.new_empty(len(transfer.order), buffer.shape[1])
        group.alltoall_base(received, sent, transfer.receive_counts, transfer.send_counts).wait()
        share = torch.empty_like(received)
        share[transfer.order.to(device)] = received
        return share


def _rows_of(buffer: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor, without a copy if they are consecutive."""
    first, count = int(index[0]) if len(index) else 0, len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return buffer[first : first + count]
    return buffer[index.to(buffer.device)]


def share_size(count: Ints, ranks: int) -> Ints:
    """Positions in the share of each of `ranks` tensor-parallel ranks that split `count`; the last may have fewer."""
    return np.maximum(1, (count + ranks - 1) // ranks)


def _held_by(rank: int, layout: Layout, held: TokenOwners) -> int:
    here = layout.on_last_stage(rank)
    if here is None:
        return 0
    tensor, context, data = here
    mine = (held.context == context) & (held.data == data)
    return int((mine & (held.shard == tensor)).sum() if layout.sequence_parallel else mine.sum())


def _group_sizes(*groups: Ints) -> Ints:
    """For entries sorted by `groups`: the size of each one's group."""
    index = index_in_group(*groups)
    last = np.append(index[1:] == 0, True) if len(index) else np.zeros(0, dtype=bool)
    ends = np.flatnonzero(last)
    return np.repeat(index[ends] + 1, index[ends] + 1)


def _transfer(source: Ints, target: Ints, at: Ints, rank: int, world_size: int) -> Transfer:
    sent = np.flatnonzero(source == rank)
    sent = sent[np.argsort(target[sent], kind="stable")]
    received = source[target == rank]
    return Transfer(
        send=torch.from_numpy(at[sent]),
        send_counts=np.bincount(target[sent], minlength=world_size).tolist(),
        receive_counts=np.bincount(received, minlength=world_size).tolist(),
        order=torch.from_numpy(np.argsort(received, kind="stable")),
    )
