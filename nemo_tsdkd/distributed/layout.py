"""Which rank holds which token of a global batch, under a TP x PP x CP x DP layout. Arithmetic, equal on every rank.

Shapes: `G` rows of the global batch, `E` response positions of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The ranks of one model, `first_rank` onwards, in Megatron's order: TP ranks are neighbours, then CP, DP, PP."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    first_rank: int = 0

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.world_size)

    @property
    def token_shards(self) -> int:
        """Tensor-parallel ranks that hold a part each of a micro-batch's final hidden states."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequence_shards(self) -> int:
        """Ranks that hold a part each of one row's final hidden states."""
        return self.context * self.token_shards

    def on_last_stage(self, rank: int) -> tuple[int, int, int] | None:
        """(tensor, context, data) coordinates of a global rank on the last pipeline stage; None elsewhere."""
        at, per_stage = rank - self.first_rank, self.world_size // self.pipeline
        if at not in range(self.world_size - per_stage, self.world_size):
            return None
        at %= per_stage
        return at % self.tensor, at // self.tensor % self.context, at // (self.tensor * self.context)

    def last_stage(self, tensor: Ints, context: Ints, data: Ints) -> Ints:
        """Global ranks of the last pipeline stage at these coordinates."""
        stage = self.pipeline - 1
        return self.first_rank + tensor + self.tensor * (context + self.context * (data + self.data * stage))


def student_layout(config: TrainConfig) -> Layout:
    """The student's layout: the job's first ranks."""
    return _layout(config.parallel, config.student_world_size, 0)


def teacher_layout(config: TrainConfig) -> Layout:
    """The teacher's layout: the student's ranks, or with `teacher.nodes` those of the last nodes."""
    first = config.student_world_size if config.teacher.nodes else 0
    return _layout(config.teacher_parallel, config.teacher_world_size, first)


def hidden_state_shards(config: TrainConfig) -> int:
    """Ranks of the student's last stage that keep a part each of the teacher's hidden states of one row: in one layout
    each keeps what it computes, else its share of what it receives."""
    student = student_layout(config)
    return student.sequence_shards if config.one_layout else student.context * student.tensor


def _layout(parallel: ParallelConfig, world_size: int, first_rank: int) -> Layout:
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        data=world_size // parallel.model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        first_rank=first_rank,
    )


@dataclass(frozen=True)
class BatchSplit:
    """How the rows of a global batch are split into one model's micro-batches; int64 arrays `[G]`.

    Attributes:
        data: the data-parallel rank that computes a row.
        micro_batch: which of that rank's micro-batches it is in.
        slot: its row there.
        width: tokens the micro-batch is padded to, a multiple of what sequence and context parallelism need.
    """

    data: Ints
    micro_batch: Ints
    slot: Ints
    width: Ints

    def micro_batches_of_ranks(self) -> Ints:
        """How many micro-batches each data-parallel rank with a row has."""
        pairs = np.unique(np.stack([self.data, self.micro_batch]), axis=1)
        return np.unique(pairs[0], return_counts=True)[1]


@dataclass(frozen=True)
class TokenOwners:
    """Which ranks of a model's last pipeline stage hold E response positions; int64 arrays `[E]`.

    Attributes:
        data, context: coordinates of the rank.
        shard: its tensor-parallel rank under sequence parallelism, else 0, and all tensor-parallel ranks hold it.
        micro_batch: of that rank.
        key: sorts the positions of all ranks by (data, context, shard, micro-batch, row, position).
    """

    data: Ints
    context: Ints
    shard: Ints
    micro_batch: Ints
    key: Ints

    @classmethod
    def of(cls, layout: Layout, split: BatchSplit, rows: Ints, positions: Ints) -> TokenOwners:
        """The owners of position `positions[e]` of row `rows[e]`."""
        width = split.width[rows]
        context, local = _zig_zag(positions, width, layout.context)
        width = width // layout.context
        shard = local // (width // layout.token_shards)
        data, micro_batch = split.data[rows], split.micro_batch[rows]
        key = np.zeros_like(rows)
        for part in (data, context, shard, micro_batch, split.slot[rows], local):
            key = key * (part.max(initial=0) + 1) + part
        return cls(data, context, shard, micro_batch, key)

    def take(self, index: Ints) -> TokenOwners:
        return TokenOwners(*(values[index] for values in vars(self).values()))


def _zig_zag(positions: Ints, width: Ints, context: int) -> tuple[Ints, Ints]:
    """(context-parallel rank, position there) in Megatron's order: rank r has chunks r and 2 CP - 1 - r of 2 CP."""
    if context == 1:
        return np.zeros_like(positions), positions
    size = width // (2 * context)
    chunk = positions // size
    last = 2 * context - 1
    return np.minimum(chunk, last - chunk), positions % size + np.where(chunk >= context, size, 0)


def index_in_group(*groups: Ints) -> Ints:
    """For entries sorted by `groups`: the number of entries before it in its group."""
    count = np.arange(len(groups[0]))
    first = np.ones(len(count), dtype=bool)
    first[1:] = np.any([g[1:] != g[:-1] for g in groups], axis=0)
    return count - np.maximum.accumulate(np.where(first, count, 0))
