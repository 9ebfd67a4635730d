"""The tokens of whole sequences, as selection rules see them, and sums over them that are exact in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

DIVERGENCE, SAMPLED, KEY = "divergence", "sampled", "key"
# What a rule must declare that it needs, and the properties of `Tokens` that it then may read.
ASKED = {
    DIVERGENCE: ("divergence",),
    SAMPLED: ("student_log_probability", "teacher_log_probability"),
    KEY: ("key",),
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of whole sequences, in order of (sequence, position); all fields [n]."""

    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    sequence: Tensor  # int64, ascending
    position: Tensor  # int64, place in the sequence, prompt included
    response: Tensor  # bool
    asked: Mapping[str, Tensor] = field(default_factory=dict)  # by property: what was computed because a rule needs it

    def _asked(self, name: str) -> Tensor:
        if name not in self.asked:
            need = next(need for need, names in ASKED.items() if name in names)
            raise RuntimeError(f"a rule reads {name} and does not declare it: register it with needs=[{need!r}].")
        return self.asked[name]

    @property
    def divergence(self) -> Tensor:
        """Nats between teacher and student by `objective.divergence`; infinite where a KL is."""
        return self._asked("divergence")

    @property
    def student_log_probability(self) -> Tensor:
        """Log-probability of the token that the response has here, in nats, at `objective.temperature`; -1e30 and less
        where the model excludes it."""
        return self._asked("student_log_probability")

    @property
    def teacher_log_probability(self) -> Tensor:
        return self._asked("teacher_log_probability")

    @property
    def key(self) -> Tensor:
        """int64, the key of the token's sequence, to draw from (`distributed.counters.fold`)."""
        return self._asked("key")

    @cached_property
    def place(self) -> Tensor:
        """int64, the token's place in the response: 0 for its first token."""
        return self.before(self.response.long())

    @cached_property
    def length(self) -> Tensor:
        """int64, response tokens of the token's sequence."""
        return self.total(self.response)

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
        return (self.is_first & (self.length > 0)).sum()

    def ranked(self, values: Tensor, rank: Tensor | int) -> Tensor:
        """The value of rank `rank` [n] among those of each token's own sequence, 0 the smallest; NaN is the largest."""
        order = values.sort(dim=0, stable=True).indices
        order = order[self.sequence[order].sort(dim=0, stable=True).indices]
        return values[order][self.first + rank]

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
# 64 rows of 152,064 logits at five scales, cut for TP 1 to 8), and a divergence by no more. What lies closer together
# counts as equal.
SLACK = 2.0**-19


def slack(entropy: Tensor) -> Tensor:
    """Nats [n] by which entropies [n] may differ and still count as equal."""
    return SLACK * (1 + entropy)


UNIT = 2.0**-32  # nats


def fixed_point(nats: Tensor) -> Tensor:
    """Nats [n] as integers of 2^-32 nats, below fp32's error: their sum is exact, in any order. It must stay below
    2^31 nats a sequence."""
    return (nats.double() / UNIT).round().long()
