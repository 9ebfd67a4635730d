"""The positions of a rank's tokens in whole sequences: batches, packed rows, and context parallelism.

Selections and means belong to whole sequences, logits to a rank's slice of them. The two meet here: a few numbers of
each token are gathered over `cp_group`, put in order, judged, and the verdicts handed back to each rank's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tsdkd.distributed.vocab_parallel import Group, all_gather, group_rank, group_size
from nemo_tsdkd.objective.check_input import check_bounds
from nemo_tsdkd.objective.tokens import Tokens


def _zigzag(cu_seqlens: Tensor, steps: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """(sequence, position) of each of a rank's `steps` columns.

    Megatron cuts each sequence into 2 * size chunks and gives rank r the r-th from the front and the r-th from the
    back, which balances causal attention.
    """
    column = torch.arange(steps, device=cu_seqlens.device)
    starts = cu_seqlens // size
    sequence = torch.searchsorted(starts, column, right=True) - 1
    offset = column - starts[sequence]
    if size == 1:
        return sequence, offset
    chunk = (cu_seqlens.diff() // (2 * size))[sequence]
    front = rank * chunk + offset
    back = (2 * size - 1 - rank) * chunk + offset - chunk
    return sequence, torch.where(offset < chunk, front, back)


@dataclass(frozen=True)
class SequenceLayout:
    """Sequence and position of every token of the context-parallel group; both [cp * S * B], rank by rank."""

    sequence: Tensor
    position: Tensor
    cp_group: Group

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None, cp_group: Group) -> SequenceLayout:
        """Layout of this rank's mask [S, B]. Raises ValueError when rows or packed sequences cannot be cut so."""
        (steps, batch), size = mask.shape, group_size(cp_group)
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, steps * size], device=mask.device)
        else:
            check_bounds(cu_seqlens, batch, steps * size)
            cu_seqlens = cu_seqlens.to(mask.device, torch.int64)
        if size > 1 and (cu_seqlens % (2 * size)).any():
            raise ValueError(
                f"sequence lengths {cu_seqlens.diff().tolist()}: must be multiples of {2 * size} under context "
                f"parallelism {size}. Pad every sequence to such a length."
            )
        places = [_zigzag(cu_seqlens, steps, size, rank) for rank in range(size)]
        sequence, position = (torch.stack(x).unsqueeze(-1) for x in zip(*places, strict=True))
        rows = torch.arange(batch, device=mask.device) * (len(cu_seqlens) - 1)
        return cls((sequence + rows).flatten(), position.expand(-1, -1, batch).flatten(), cp_group)

    def gather(self, mask: Tensor, index: Tensor, values: Mapping[str, Tensor]) -> tuple[Tokens, Tensor]:
        """Tokens of whole sequences, and the place of each in this layout, from this rank's n tokens.

        Args:
            mask: response mask [S, B].
            index: [n] tokens as s * B + b.
            values: [n] each, by name: `student_entropy`, `teacher_entropy`, and what rules asked for.
        """
        rows = torch.stack(list(values.values()))
        dense = rows.new_zeros((2 + len(rows), mask.numel()))
        dense[0, index] = 1
        dense[1] = mask.flatten()
        dense[2:, index] = rows
        included, response, *gathered = all_gather(dense, self.cp_group).transpose(0, 1).flatten(1)
        place = included.nonzero().flatten()
        order = self.sequence[place] * (self.position.max() + 1) + self.position[place]
        place = place[order.argsort()]
        asked = {name: value[place] for name, value in zip(values, gathered, strict=True)}
        entropies = asked.pop("student_entropy"), asked.pop("teacher_entropy")
        at = self.sequence[place], self.position[place]
        return Tokens(*entropies, *at, response[place].bool(), asked), place

    def first_place(self, chosen: Tensor, index: Tensor) -> Tensor:
        """(sequence, position) [2] of the first of this rank's n tokens that is `chosen` [n]; -1, -1 if none is."""
        places = torch.stack([self.sequence, self.position]).unflatten(1, (group_size(self.cp_group), -1))
        sequence, position = places[:, group_rank(self.cp_group)][:, index]
        none = sequence.new_full((1,), 2**62)
        key = torch.cat([torch.where(chosen, sequence << 32 | position, 2**62), none]).min()
        return torch.where(key == none, -1, torch.stack([key >> 32, key & (2**32 - 1)]))

    def local(self, values: Tensor, place: Tensor, index: Tensor) -> Tensor:
        """This rank's part [m, n] of values [m, tokens] that belong to gather()'s tokens."""
        dense = values.new_zeros((len(values), len(self.sequence)))
        dense[:, place] = values
        mine = dense.unflatten(1, (group_size(self.cp_group), -1))[:, group_rank(self.cp_group)]
        return mine[:, index]
