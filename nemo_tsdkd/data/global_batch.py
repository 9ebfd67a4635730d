"""The global batch on every rank: the lengths of all rows, and how they are split into each model's micro-batches.

Rows are numbered in the order of the student's data-parallel ranks: `[rank 0's samples, rank 1's, ...]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config.integers import ceil_div, round_up
from nemo_tsdkd.data.batch import MicroBatch, cut_by_rows, cut_by_tokens, halve_largest, pad_rows
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.distributed.layout import BatchSplit, Ints


@dataclass(frozen=True)
class GlobalBatch:
    """`G` rows of prompt and response.

    Attributes:
        lengths: of each row its sample's index, its prompt's and its response's tokens; int64 `[G, 3]`.
        tokens: int32 `[n, L]`, padded on the right: rows `first_row` to `first_row + n`, those that this rank holds.
    """

    lengths: Ints
    tokens: Tensor
    first_row: int = 0

    @classmethod
    def of(cls, samples: Sequence[Sample], responses: Sequence[Sequence[int]]) -> GlobalBatch:
        """One data-parallel rank's own rows; a response may be empty."""
        pairs = list(zip(samples, responses, strict=True))
        lengths = np.array([[s.index, len(s.prompt_ids), len(r)] for s, r in pairs], dtype=np.int64).reshape(-1, 3)
        tokens = torch.zeros(len(pairs), int(lengths[:, 1:].sum(1).max(initial=0)), dtype=torch.int32)
        for row, (sample, written) in zip(tokens, pairs, strict=True):
            row[: len(sample.prompt_ids) + len(written)] = torch.tensor([*sample.prompt_ids, *written])
        return cls(lengths, tokens)

    def gather(self, *, with_tokens: bool, dp_group: dist.ProcessGroup, device: torch.device | str) -> GlobalBatch:
        """The rows of all data-parallel ranks, each of which has equally many: their lengths, and with `with_tokens`
        their tokens too. Collective over `dp_group`; `device` is the one of its backend."""
        mine, own = torch.from_numpy(self.lengths).to(device), self.tokens
        rows = mine.new_empty(dp_group.size() * len(mine), 3)
        dist.all_gather_into_tensor(rows, mine, group=dp_group)
        lengths = rows.cpu().numpy()
        if not with_tokens:
            return GlobalBatch(lengths, own, first_row=dp_group.rank() * len(mine))
        tokens = torch.zeros(len(own), int(lengths[:, 1:].sum(1).max()), dtype=torch.int32, device=device)
        tokens[:, : own.shape[1]] = own
        all_tokens = tokens.new_empty(len(lengths), tokens.shape[1])
        dist.all_gather_into_tensor(all_tokens, tokens, group=dp_group)
        return GlobalBatch(lengths, all_tokens.cpu())

    @property
    def index(self) -> Ints:
        return self.lengths[:, 0]

    @property
    def prompt(self) -> Ints:
        return self.lengths[:, 1]

    @property
    def response(self) -> Ints:
        return self.lengths[:, 2]

    @property
    def starts(self) -> Ints:
        """The first position of each row whose logits predict a response token."""
        return self.prompt - 1

    @property
    def length(self) -> Ints:
        return self.prompt + self.response

    def student_split(
        self, data_parallel_size: int, micro_batch_size: int, multiple: int, *, micro_batch_tokens: int = 0
    ) -> BatchSplit:
        """Each data-parallel rank's own rows in micro-batches of rows of about the same length.

        All ranks have equally many micro-batches. The longest rows come first: if they do not fit into memory, the step
        fails at once and not in its middle. Rows of one length keep the order of their samples' indices, so the split
        does not depend on the order of a rank's rows.

        Args:
            micro_batch_size: rows of a micro-batch; divides a rank's rows.
            multiple: the padded lengths are multiples of it (`precision.pad_to_multiple`).
            micro_batch_tokens: if not 0, a micro-batch has as many rows as fit into so many tokens, padding included;
                ranks that need fewer micro-batches than another cut their largest into halves.
        """
        size, width = len(self.index) // data_parallel_size, self._padded(multiple)
        shares = [self._longest_first(range(first, first + size)) for first in range(0, len(self.index), size)]
        if not micro_batch_tokens:
            return self._split([cut_by_rows(share, micro_batch_size) for share in shares], width)
        chunks = [cut_by_tokens(share, width, micro_batch_tokens) for share in shares]
        count = max(map(len, chunks))
        return self._split([halve_largest(of_rank, width, count) for of_rank in chunks], width)

    def balanced_split(self, data_parallel_size: int, micro_batch_size: int, multiple: int) -> BatchSplit:
        """Rows by descending length, each to the rank with the fewest tokens so far: all ranks finish together."""
        shares: list[list[int]] = [[] for _ in range(data_parallel_size)]
        tokens, length = np.zeros(data_parallel_size, dtype=np.int64), self.length
        for row in self._longest_first(range(len(self.index))):
            rank = int(tokens.argmin())
            shares[rank].append(row)
            tokens[rank] += length[row]
        return self._split([cut_by_rows(share, micro_batch_size) for share in shares], self._padded(multiple))

    def _longest_first(self, rows: Iterable[int]) -> list[int]:
        length, index = self.length.tolist(), self.index.tolist()
        return sorted(rows, key=lambda row: (-length[row], index[row]))

    def _padded(self, multiple: int) -> dict[int, int]:
        """The length of each row, rounded up."""
        return {row: round_up(length, multiple) for row, length in enumerate(self.length.tolist())}

    def _split(self, chunks: Sequence[Sequence[Sequence[int]]], padded: Mapping[int, int]) -> BatchSplit:
        """The split of each rank's micro-batches of rows, the longest row first."""
        data, micro_batch, slot, width = np.zeros((4, len(self.index)), dtype=np.int64)
        for rank, of_rank in enumerate(chunks):
            for m, rows in enumerate(of_rank):
                at = list(rows)
                data[at], micro_batch[at], slot[at], width[at] = rank, m, range(len(at)), padded[at[0]]
        return BatchSplit(data, micro_batch, slot, width)

    def micro_batches(
        self, split: BatchSplit, data_rank: int, *, pad_id: int, device: torch.device | str
    ) -> list[MicroBatch]:
        """The micro-batches of one data-parallel rank under `split`; this rank must hold their rows."""
        mine = np.flatnonzero(split.data == data_rank)
        mine = mine[np.lexsort((split.slot[mine], split.micro_batch[mine]))]
        chunks = np.split(mine, np.flatnonzero(np.diff(split.micro_batch[mine])) + 1) if len(mine) else []
        length = self.length
        return [
            pad_rows(
                [self.tokens[row - self.first_row, : length[row]] for row in rows],
                *(values[rows].tolist() for values in (self.prompt, self.response, self.index)),
                width=int(split.width[rows[0]]),
                pad_id=pad_id,
                device=device,
            )
            for rows in chunks
        ]


def slices_of(split: BatchSplit, rows: int) -> BatchSplit:
    """The split of a model that reads another's micro-batches in slices of `rows`: their padding stays, so that both
    models' shards hold the same positions."""
    slices = ceil_div(int(split.slot.max(initial=0)) + 1, rows)
    return BatchSplit(split.data, split.micro_batch * slices + split.slot // rows, split.slot % rows, split.width)
