"""The vocabulary split over tensor-parallel ranks: which rank holds which token ids, and collectives over it.

Rank r of `tp_group` holds columns `[r * V_local, (r + 1) * V_local)` of the padded vocabulary, as Megatron shards it.
A group of None, or of one rank, is the dense case: then no function here communicates. Only
`head_rows` is differentiable; its docstring states the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    return 0 if group is None else group.rank()


def all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    """Reduce in place over the group and return the same tensor; every rank ends with the same bits."""
    if group_size(group) > 1 and values.numel():
        dist.all_reduce(values, op, group=group)
    return values


def all_gather(values: Tensor, group: Group) -> Tensor:
    """[...] on each rank to [ranks, ...] on all."""
    if group_size(group) == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty((group_size(group), *values.shape))
    if values.numel():
        dist.all_gather_into_tensor(gathered.flatten(0, 1), values.contiguous(), group=group)
    return gathered


@dataclass(frozen=True)
class Overlap:
    """Which of the teacher's columns match a rank's student columns, and which ranks hold them.

    The two models may pad the same vocabulary to different widths, so that a rank's columns are different token ids
    in each. Columns are given in the teacher's local numbering.

    Attributes:
        uneven: the two padded widths differ, so ranks may have to exchange columns.
        width: true token ids among this rank's student columns; columns from there on are padding.
        own: columns that this rank holds itself, (first, end).
        send: (first, end) for each destination rank; empty for itself.
        receive: number of columns from each source rank; those of lower ranks belong left of `own`, others right.
    """

    uneven: bool
    width: int
    own: tuple[int, int]
    send: list[tuple[int, int]]
    receive: list[int]

    @classmethod
    def between(cls, vocab_size: int, student_width: int, teacher_width: int, group: Group) -> Overlap:
        rank, ranks = group_rank(group), range(group_size(group))

        def part(holder: int, user: int) -> tuple[int, int]:
            """True token ids that `holder` has of the teacher and `user` of the student, in holder's numbering."""
            first = max(holder * teacher_width, user * student_width)
            end = min((holder + 1) * teacher_width, (user + 1) * student_width, vocab_size)
            return (first - holder * teacher_width, max(first, end) - holder * teacher_width)

        return cls(
            uneven=student_width != teacher_width,
            width=max(0, min(vocab_size, (rank + 1) * student_width) - rank * student_width),
            own=part(rank, rank),
            send=[(0, 0) if r == rank else part(rank, r) for r in ranks],
            receive=[0 if r == rank else part(r, rank)[1] - part(r, rank)[0] for r in ranks],
        )

    def exchange(self, sent: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
        """The columns left and right of `own`, [c, ...] each. `sent` holds one block of columns [c, ...] for each rank.

        One all-to-all of the few columns by which the two paddings differ; none where the widths are equal.
        """
        packed, counts = torch.cat(sent), [len(block) for block in sent]
        received = packed.new_empty((sum(self.receive), *packed.shape[1:]))
        if self.uneven and group_size(group) > 1:
            dist.all_to_all_single(received, packed, self.receive, counts, group=group)
        left = sum(self.receive[: group_rank(group)])
        return received[:left], received[left:]


def top_k_by_id(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [n, V], ordered by (score descending, column ascending): values, columns [n, k].

    `torch.topk` does not say which of several equal scores it returns, and in bf16 equal scores are common.
    """
    kth = scores.topk(k).values[:, -1:]
    above_or_tied = (scores > kth).int() + (scores >= kth).int()
    key = above_or_tied * scores.shape[-1] - torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32)
    columns = key.topk(k).indices.sort().values
    values, order = scores.gather(-1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, index: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
        ctx.index, ctx.group, ctx.shape = index, group, hidden.shape
        ctx.scatter = sequence_parallel and group_size(group) > 1
        return (all_gather(hidden, group) if ctx.scatter else hidden).flatten(0, -2)[index]

    @staticmethod
    def backward(ctx, grad: Tensor):
        ranks = group_size(ctx.group) if ctx.scatter else 1
        whole = grad.new_zeros((ranks * ctx.shape[0] * ctx.shape[1], ctx.shape[2]))
        if not ctx.scatter:
            whole[ctx.index] = all_reduce(grad.contiguous(), dist.ReduceOp.SUM, ctx.group)
            return whole.view(ctx.shape), None, None, None
        whole[ctx.index] = grad
        shard = grad.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(shard, whole.unflatten(0, (-1, ctx.shape[1])), group=ctx.group)
        return shard, None, None, None


def head_rows(hidden: Tensor, index: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """The hidden states that a vocabulary-sharded head multiplies: [S, B, H] at tokens `index` (s * B + b) to [n, H].

    With `sequence_parallel` the input is this rank's [S / TP, B, H] and is all-gathered along the sequence first.
    Backward, as Megatron's ColumnParallelLinear: each rank's gradient covers its columns only, so it is summed over
    the ranks (all-reduce), or summed and split along the sequence (reduce-scatter).
    """
    return _HeadRows.apply(hidden, index, group, sequence_parallel)
