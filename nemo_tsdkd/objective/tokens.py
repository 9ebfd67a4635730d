"""The tokens of whole sequences, as selection rules see them, and sums over them that are exact in any order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of whole sequences, in order of (sequence, position); all fields [n]."""

    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    sequence: Tensor  # int64, ascending
    position: Tensor  # int64, place in the sequence, prompt included
    response: Tensor  # bool

    @cached_property
    def first(self) -> Tensor:
        """Index of the first token of each token's sequence."""
        return torch.searchsorted(self.sequence, self.sequence)

    @cached_property
    def is_first(self) -> Tensor:
        return self.first == torch.arange(len(self.first), device=self.first.device)

    @cached_property
    def last(self) -> Tensor:
        return torch.searchsorted(self.sequence, self.sequence, right=True) - 1

    def total(self, values: Tensor) -> Tensor:
        """Sum of integers (or booleans) over each token's own sequence, exact in any order."""
        running = values.long().cumsum(0)
        return (running - running[self.first] + values.long()[self.first])[self.last]

    @property
    def num_sequences(self) -> Tensor:
        """How many sequences have a response: int64 scalar."""
        return (self.is_first & (self.total(self.response) > 0)).sum()

    def before(self, values: Tensor) -> Tensor:
        """Sum of integers over the tokens that precede each one in its sequence."""
        running = values.cumsum(0) - values
        return running - running[self.first]


@dataclass(frozen=True)
class SeenTokens:
    """The response tokens of a call's whole sequences, in order of (sequence, position); fields [n], on the host."""

    sequence: Tensor  # int64, row of the call
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    gate: Tensor  # weight in the direct term
    opener: Tensor  # bool: the indirect term trains it
    uncertain: Tensor  # bool: the entropy term trains it
    divergence: Tensor  # nats, before the gate

    def of_sequence(self, row: int) -> dict[str, list[Any]]:
        """The columns of one row of the call, without `sequence`."""
        mine = self.sequence == row
        return {name: value[mine].tolist() for name, value in vars(self).items() if name != "sequence"}


# Sums in another order, over other shards or tiles, move an entropy H by up to 2^-21 (1 + H) nats in fp32 (largest of
# 64 rows of 152,064 logits at five scales, cut for TP 1 to 8). What lies closer together counts as equal.
SLACK = 2.0**-19


def slack(entropy: Tensor) -> Tensor:
    """Nats [n] by which entropies [n] may differ and still count as equal."""
    return SLACK * (1 + entropy)


def fixed_point(entropy: Tensor) -> Tensor:
    """Nats [n] as integers of 2^-32 nats, below fp32's error: their sum is exact, in any order."""
    return (entropy.double() * 2.0**32).round().long()
