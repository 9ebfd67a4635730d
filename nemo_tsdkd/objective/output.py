"""What the objective returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of one call and what a user watches beside it.

    Under tensor and context parallelism every rank holds the same values: those of the whole sequences. Sums over
    sequences add up over micro-batches and data-parallel ranks; divided by the added `num_sequences` they are the
    figures of the global batch.

    Attributes:
        loss: scalar with gradient, `loss_sum / num_sequences`; zero where no sequence has a response.
        loss_sum: scalar with gradient, the sum over sequences of the three terms by their weights (eq. 1).
        num_sequences: int64 scalar, sequences with at least one response token.
        direct, indirect, entropy: detached scalars, each term before its weight, mean over sequences.
        metrics: detached scalars, each a sum over sequences of the sequence's mean:
            `direct`, `indirect`, `entropy` (the terms before their weights), `student_entropy`, `teacher_entropy`
            (nats a response token), `gate_mean`, `opener_fraction` (share of the response's tokens in the opener),
            `rank_agreement` (share of candidate pairs, at opener positions, that the teacher orders as the student
            does: 1 the same order, 0 the reverse), and `response_tokens` (a plain count).
    """

    loss: Tensor
    loss_sum: Tensor
    num_sequences: Tensor
    direct: Tensor
    indirect: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
