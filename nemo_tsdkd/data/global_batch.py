"""The global batch on every rank: the lengths of all rows, and how they are split into each model's micro-batches.

Rows are numbered in the order of the student's data-parallel ranks: `[rank 0's samples, rank 1's, ...]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config.integers import ceil_div, round_up
from nemo_tsdkd.data.batch import MicroBatch, cut_rows, pad_rows
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.distributed.layout import Cut, Ints


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
    def gather(
        cls,
        samples: Sequence[Sample],
        responses: Sequence[Sequence[int]],
        *,
        with_tokens: bool,
        dp_group: dist.ProcessGroup,
        device: torch.device | str,
    ) -> GlobalBatch:
        """Gather the lengths of all data-parallel ranks' rows, and with `with_tokens` the rows too.

        Collective over `dp_group`, whose ranks have equally many samples; `device` is the one of its backend.
        """
        mine = torch.tensor(
            [[s.index, len(s.prompt_ids), len(r)] for s, r in zip(samples, responses, strict=True)], device=device
        )
        rows = mine.new_empty(dp_group.size() * len(mine), 3)
        dist.all_gather_into_tensor(rows, mine, group=dp_group)
        lengths = rows.cpu().numpy()
        tokens = torch.zeros(len(mine), int(lengths[:, 1:].sum(1).max()), dtype=torch.int32)
        for row, sample, written in zip(tokens, samples, responses, strict=True):
            row[: len(sample.prompt_ids) + len(written)] = torch.tensor([*sample.prompt_ids, *written])
        if not with_tokens:
            return cls(lengths, tokens, first_row=dp_group.rank() * len(mine))
        all_tokens = torch.empty(len(lengths), tokens.shape[1], dtype=torch.int32, device=device)
        dist.all_gather_into_tensor(all_tokens, tokens.to(device), group=dp_group)
        return cls(lengths, all_tokens.cpu())

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

    def student_cut(self, data_parallel_size: int, micro_batch_size: int, multiple: int) -> Cut:
        """The cut of `make_micro_batches` on each data-parallel rank."""
        rows = len(self.index) // data_parallel_size
        return self._cut(
            [list(range(first, first + rows)) for first in range(0, len(self.index), rows)], micro_batch_size, multiple
        )

    def balanced_cut(self, data_parallel_size: int, micro_batch_size: int, multiple: int) -> Cut:
        """Rows by descending length, each to the rank with the fewest tokens so far: all ranks finish together."""
        shares: list[list[int]] = [[] for _ in range(data_parallel_size)]
        tokens = np.zeros(data_parallel_size, dtype=np.int64)
        length = self.prompt + self.response
        for row in sorted(range(len(length)), key=lambda row: (-length[row], self.index[row])):
            rank = int(tokens.argmin())
            shares[rank].append(row)
            tokens[rank] += length[row]
        return self._cut(shares, micro_batch_size, multiple)

    def _cut(self, shares: Sequence[Sequence[int]], micro_batch_size: int, multiple: int) -> Cut:
        data, micro_batch, slot, width = np.zeros((4, len(self.index)), dtype=np.int64)
        length = self.prompt + self.response
        for rank, share in enumerate(shares):
            chunks = cut_rows(length[share].tolist(), self.index[share].tolist(), micro_batch_size)
            for m, chunk in enumerate(chunks):
                rows = np.asarray(share)[chunk]
                data[rows], micro_batch[rows], slot[rows] = rank, m, range(len(rows))
                width[rows] = round_up(int(length[rows[0]]), multiple)
        return Cut(data, micro_batch, slot, width)

    def micro_batches(self, cut: Cut, data_rank: int, *, pad_id: int, device: torch.device | str) -> list[MicroBatch]:
        """The micro-batches of one data-parallel rank under `cut`; this rank must hold their rows."""
        mine = np.flatnonzero(cut.data == data_rank)
        mine = mine[np.lexsort((cut.slot[mine], cut.micro_batch[mine]))]
        chunks = np.split(mine, np.flatnonzero(np.diff(cut.micro_batch[mine])) + 1) if len(mine) else []
        length = self.prompt + self.response
        return [
            pad_rows(
                [self.tokens[row - self.first_row, : length[row]] for row in rows],
                *(values[rows].tolist() for values in (self.prompt, self.response, self.index)),
                width=int(cut.width[rows[0]]),
                pad_id=pad_id,
                device=device,
            )
            for rows in chunks
        ]


def slices_of(cut: Cut, micro_batch_size: int, rows: int) -> Cut:
    """The cut of a model that reads another's micro-batches of up to `micro_batch_size` rows in slices of `rows`: their
    padding stays, so that both models' shards hold the same positions."""
    slices = ceil_div(micro_batch_size, rows)
    return Cut(cut.data, cut.micro_batch * slices + cut.slot // rows, cut.slot % rows, cut.width)
