"""What the objective returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.tokens import SeenTokens


class Metrics(NamedTuple):
    """What the objective measures. Each is a sum over sequences of the sequence's mean (times the sequence's
    response tokens with `objective.reduction: token`), but for the last."""

    direct: Tensor  # the three terms before their weights
    indirect: Tensor
    entropy: Tensor
    student_entropy: Tensor  # nats a response token
    teacher_entropy: Tensor
    gate_mean: Tensor
    opener_fraction: Tensor  # share of the response's tokens in the opener
    rank_agreement: Tensor  # share of candidate pairs in the opener that both models order alike: 1 all, 0 none
    response_tokens: Tensor  # their number


# The metrics of each term, by the field of its weight.
TERM_METRICS = {
    "direct_weight": ("direct", "gate_mean"),
    "indirect_kd_alpha": ("indirect", "opener_fraction", "rank_agreement"),
    "entropy_weight": ("entropy",),
}
ALWAYS_REPORTED = tuple(name for name in Metrics._fields if name not in sum(TERM_METRICS.values(), ()))


def reported(config: ObjectiveConfig) -> tuple[str, ...]:
    """The metrics that a resolved config's objective reports: a term of weight 0 is not computed and has none."""
    off = sum((names for weight, names in TERM_METRICS.items() if getattr(config, weight) == 0), ())
    return (*(name for name in Metrics._fields if name not in off), *config.extra_terms)


def weighted(config: ObjectiveConfig, means: Mapping[str, float]) -> dict[str, float]:
    """`NAME_weighted` of each term that a resolved config's objective reports: as it enters the loss, which is their
    sum. `means` holds the terms before their weights."""
    weights = {names[0]: getattr(config, weight) for weight, names in TERM_METRICS.items()} | config.extra_terms
    return {f"{name}_weighted": weight * means[name] for name, weight in weights.items() if weight}


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of one call and its metrics.

    Under tensor and context parallelism every rank holds the same values: those of the whole sequences. Sums over
    sequences add up over micro-batches and data-parallel ranks; divided by the added `count` they are the figures of
    the global batch.

    Attributes:
        loss: scalar with gradient, `loss_sum / count`; zero where no sequence has a response.
        loss_sum: scalar with gradient, the sum over sequences of all terms by their weights (eq. 1).
        num_sequences: int64 scalar, sequences with at least one response token.
        count: int64 scalar, what the sums are divided by: `num_sequences`, or the response tokens with
            `objective.reduction: token`.
        broken: int64 [2], the first token, by its sequence in the call and its position there (prompt included), whose
            divergence or entropy is infinite or NaN; -1, -1 where there is none. Under context parallelism, of this
            rank's tokens. A KL is infinite where one model excludes (-inf) a token that the other needs.
        direct, indirect, entropy: detached scalars, each term before its weight, divided by `count`; None for a term of
            weight 0, which is not computed.
        metrics: detached scalars by name, those of `reported(config)`: the fields of `Metrics` without those of terms
            of weight 0, and the terms of `objective.extra_terms`.
        seen: what the objective saw at each response token, where the caller asked for it.
    """

    loss: Tensor
    loss_sum: Tensor
    num_sequences: Tensor
    count: Tensor
    broken: Tensor
    direct: Tensor | None
    indirect: Tensor | None
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    seen: SeenTokens | None = None
