"""Which tokens each term trains: small rules, by name in one registry. To add one: CONTRIBUTING.md. Equations are
numbered as in docs/math.md.

A rule takes the response tokens of whole sequences and the config, and returns one value per token:
a boolean choice (the term is the mean over the chosen tokens of a sequence) or a weight (the term is the weighted
mean over all of the sequence's response). `objective.opener_rule`, `entropy_rule` and `gate_rule` name the rules of
the indirect, the entropy and the direct term; any rule serves in any place.

What is promised: all ranks of a layout choose the same, for they see bit-equal entropies and compare sums of integers.
Two layouts add logits up in another order, which moves an entropy by its last digits. So that they choose the same
too, entropies within `tokens.slack` of the one that decides count as equal to it, and the earlier position goes first;
a running sum reaches its share where that slack is all it lacks. Equal logits then give equal choices in any layout,
unless an entropy (or a sum) lies within rounding, 2^-21 (1 + H), of the edge of the slack itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_tsdkd.config.registry import Registry
from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.tokens import SLACK, Tokens, fixed_point, slack

Rule = Callable[[Tokens, ObjectiveConfig], Tensor]
RULES: Registry[Rule] = Registry("selection rule")
rule = RULES.register


@rule("cumulative_entropy")
def cumulative_entropy(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The opener (eq. 6): the shortest prefix that holds the share `threshold` of the response's student entropy."""
    entropy = fixed_point(tokens.student_entropy)
    total, length = tokens.total(entropy).double(), tokens.last - tokens.first + 1
    return tokens.is_first | (tokens.before(entropy) < config.threshold * total - SLACK * (total + length * 2.0**32))


@rule("top_fraction")
def top_fraction(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The `ceil(entropy_fraction * L)` tokens of each response with the largest student entropy (eq. 7)."""
    entropy, length = tokens.student_entropy, tokens.last - tokens.first + 1
    # Less 1e-9: as floats 0.07 * 100 is more than 7, and its ceiling 8.
    count = torch.ceil(config.entropy_fraction * length.double() - 1e-9).long()
    order = entropy.sort(dim=0, descending=True, stable=True).indices
    order = order[tokens.sequence[order].sort(dim=0, stable=True).indices]
    least = entropy[order][tokens.first + (count - 1).clamp(min=0)]  # the last one chosen, of each token's sequence
    # Negated, so that NaN is chosen and shows in the loss.
    above = ~(entropy <= least + slack(least))
    tied = ~above & (entropy >= least - slack(least))
    return (count > 0) & (above | (tied & (tokens.before(tied.long()) < count - tokens.total(above))))


@rule("confidence")
def confidence(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The gate (eq. 5): near 1 where the teacher is surer than the student, near 0 where the student is."""
    return torch.sigmoid((tokens.student_entropy - tokens.teacher_entropy) / config.gate_temperature)


@rule("identity")
def identity(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """Every response token."""
    return torch.ones_like(tokens.response)
