"""Hidden states reach the ranks that need them, whatever the two layouts: all ranks of a job played in one process.

The expectation takes another way than the plan: tensors of the whole batch, cut as Megatron cuts them.
"""

import numpy as np
import pytest
import torch

from nemo_tsdkd.data.global_batch import GlobalBatch, slices_of
from nemo_tsdkd.distributed.hidden_exchange import HiddenExchange, share_size
from nemo_tsdkd.distributed.layout import Layout

PAIRS = {  # (teacher, student)
    "same": (Layout(2, 1, 1, 2, True), Layout(2, 1, 1, 2, True)),
    "same_without_sp": (Layout(2, 1, 1, 2), Layout(2, 1, 1, 2)),
    "tp4_dp4": (Layout(4), Layout(data=4)),
    "tp4_sp_dp4": (Layout(4, sequence_parallel=True), Layout(data=4)),
    "dp4_tp4": (Layout(data=4), Layout(4)),
    "pp4_tp2_dp2": (Layout(pipeline=4), Layout(2, data=2, sequence_parallel=True)),
    "sp_of_both": (Layout(4, data=2, sequence_parallel=True), Layout(2, 2, data=2, sequence_parallel=True)),
    "context": (Layout(2, context=2, data=2, sequence_parallel=True), Layout(data=4, context=2)),
    "context_of_both": (Layout(1, context=4, data=1), Layout(2, context=2, sequence_parallel=True)),
    "ranks_of_its_own": (Layout(2, 2, first_rank=4), Layout(2, data=2)),
}


def batch_of(rows: int, seed: int, *, empty: bool) -> GlobalBatch:
    random = np.random.default_rng(seed)
    prompt, response = random.integers(1, 9, rows), random.integers(0, 30, rows)
    if empty:
        response[random.integers(0, rows, rows // 2)] = 0
    return GlobalBatch(np.stack([random.permutation(rows), prompt, response], 1), torch.empty(0, 0))


def shards(batch: GlobalBatch, layout: Layout, split, rank: int, *, sequence_parallel: bool) -> list[torch.Tensor]:
    """What a rank of the last stage holds of each of its micro-batches: numbers that name (row, position), from whole
    padded rows that are cut over context- and tensor-parallel ranks."""
    place = layout.on_last_stage(rank)
    if place is None:
        return []
    tensor, context, data = place
    held = []
    for m in sorted(set(split.micro_batch[split.data == data])):
        rows = np.flatnonzero((split.data == data) & (split.micro_batch == m))
        rows = rows[np.argsort(split.slot[rows])]
        width = split.width[rows[0]]
        names = torch.from_numpy(rows)[:, None] * 1000 + torch.arange(width)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            mask[b, batch.prompt[row] - 1 : batch.prompt[row] - 1 + batch.response[row]] = True
        halves = torch.tensor([context, 2 * layout.context - 1 - context])
        if layout.context > 1:
            names, mask = (
                x.unflatten(1, (2 * layout.context, -1)).index_select(1, halves).flatten(1) for x in (names, mask)
            )
        if sequence_parallel:
            names, mask = (x.chunk(layout.tensor, dim=1)[tensor] for x in (names, mask))
        held.append(names[mask])
    return held


def play(plans: list[HiddenExchange], buffers: list[torch.Tensor], micro_batch: int) -> list[torch.Tensor]:
    """The exchange of all ranks: blocks go from each rank's list of sends to the others' lists of receives."""
    transfers = [plan.transfers[micro_batch] for plan in plans]
    blocks = [b[t.send].split(t.send_counts) for b, t in zip(buffers, transfers, strict=True)]
    shares = []
    for rank, transfer in enumerate(transfers):
        incoming = [sent[rank] for sent in blocks]
        assert [len(block) for block in incoming] == transfer.receive_counts
        share = torch.empty(len(transfer.order), dtype=torch.int64)
        share[transfer.order] = torch.cat(incoming)
        shares.append(share)
    return shares


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("tokens", [0, 80])
def test_every_position_arrives_where_the_student_needs_it(name, empty, tokens):
    teacher, student = PAIRS[name]
    rows, micro_batch_size, teacher_rows = 16, 2, 2 if name.startswith("same") else 3
    batch = batch_of(rows, seed=len(name), empty=empty)
    multiple = 2 * student.sequence_shards * max(1, student.context)
    student_split = batch.student_split(student.data, micro_batch_size, multiple, micro_batch_tokens=tokens)
    same = name.startswith("same")
    teacher_split = (
        slices_of(student_split, 1)
        if same
        else batch.balanced_split(teacher.data, teacher_rows, 2 * teacher.sequence_shards * max(1, teacher.context))
    )
    world = max(teacher.ranks.stop, student.ranks.stop)
    plans = [
        HiddenExchange.plan(
            batch.starts, batch.response, (teacher, teacher_split), (student, student_split), rank, world
        )
        for rank in range(world)
    ]
    buffers = []
    for rank in range(world):
        parts = shards(batch, teacher, teacher_split, rank, sequence_parallel=teacher.sequence_parallel)
        buffers.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))
        assert len(buffers[-1]) == plans[rank].rows_held
    wire = 0
    count = rows // student.data // micro_batch_size if not tokens else 1 + max(student_split.micro_batch)
    assert {len(plan.transfers) for plan in plans} == {count}
    for m in range(count):
        shares = play(plans, buffers, m)
        for rank in range(world):
            transfer = plans[rank].transfers[m]
            wire += sum(transfer.send_counts) - transfer.send_counts[rank]
            place = student.on_last_stage(rank)
            if place is None:
                assert len(shares[rank]) == 0
                continue
            wanted = shards(batch, student, student_split, rank, sequence_parallel=student.sequence_parallel)[m]
            if not student.sequence_parallel:
                size = int(share_size(np.asarray(len(wanted)), student.tensor))
                wanted = wanted[place[0] * size : (place[0] + 1) * size]
            assert shares[rank].tolist() == wanted.tolist(), (rank, m)
    assert {plan.rows_moved for plan in plans} == {wire}
    # Nothing travels in one layout, nor where every rank of a single teacher holds all of its hidden states.
    assert (wire == 0) == (same or name == "tp4_dp4")
    assert wire <= batch.response.sum()  # no position travels twice


def test_rows_are_dealt_out_by_length():
    batch = batch_of(64, seed=1, empty=False)
    split = batch.balanced_split(4, 3, 1)
    length = batch.prompt + batch.response
    loads = [int(length[split.data == rank].sum()) for rank in range(4)]
    assert max(loads) - min(loads) <= length.max() and sum(loads) == length.sum()
    for rank in range(4):
        mine = np.flatnonzero(split.data == rank)
        order = mine[np.lexsort((split.slot[mine], split.micro_batch[mine]))]
        assert (np.diff(length[order]) <= 0).all()
        assert all(split.width[row] >= length[row] for row in mine)
