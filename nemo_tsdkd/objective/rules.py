"""Which tokens each term trains: small rules, by name in one registry. To add one: CONTRIBUTING.md. Equations are
numbered as in docs/math.md.

A rule takes the response tokens of whole sequences and the config, and returns one value per token:
a boolean choice (the term is the mean over the chosen tokens of a sequence) or a weight (the term is the weighted
mean over all of the sequence's response). `objective.opener_rule`, `entropy_rule` and `gate_rule` name the rules of
the indirect, the entropy and the direct term; any rule serves in any place. No gradient goes through a rule.

Every rule sees entropies, places and lengths. What costs more it must declare as a need (`tokens.ASKED`), and this is
computed only where a rule of the configuration needs it.

What is promised: all ranks of a layout choose the same, for they see bit-equal numbers and compare sums of integers.
Two layouts add logits up in another order, which moves an entropy by its last digits. So that they choose the same
too, entropies within `tokens.slack` of the one that decides count as equal to it, and the earlier position goes first;
a running sum reaches its share where that slack is all it lacks. Equal logits then give equal choices in any layout,
unless an entropy (or a sum) lies within rounding, 2^-21 (1 + H), of the edge of the slack itself. `tip` treats
divergences alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from nemo_tsdkd.config.registry import Registry
from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.distributed.counters import fold
from nemo_tsdkd.objective.tokens import ASKED, DIVERGENCE, KEY, SAMPLED, SLACK, UNIT, Tokens, fixed_point, slack

Rule = Callable[[Tokens, ObjectiveConfig], Tensor]
RULES: Registry[Rule] = Registry("selection rule")
RULE_FIELDS = ("opener_rule", "entropy_rule", "gate_rule")
_NEEDS: dict[str, frozenset[str]] = {}
_RANDOM_SHARE = -1  # in place of a position, which is never negative: this rule's draws are no other noise
_LARGEST = 1e30  # stands for an infinite divergence
# Nats of a log-ratio that count as excluded: real ones are far smaller, and 2^17 of them still sum up in fixed point.
_EXCLUDED = 1e4


def rule(name: str, *, needs: Collection[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule and what it needs, keys of `tokens.ASKED`. Raises ValueError on an unknown need, or where the
    name is taken."""
    if unknown := sorted(set(needs) - ASKED.keys()):
        raise ValueError(f"selection rule {name!r} needs {unknown}: must be of {', '.join(ASKED)}.")

    def register(function: Rule) -> Rule:
        RULES.register(name)(function)
        _NEEDS[name] = frozenset(needs)
        return function

    return register


def needs(config: ObjectiveConfig) -> frozenset[str]:
    """What the rules that a resolved config names need; they must be registered."""
    return frozenset[str]().union(*(_NEEDS[getattr(config, field)] for field in RULE_FIELDS))


def largest(tokens: Tokens, score: Tensor, share: float, margin_of: Callable[[Tensor], Tensor | float]) -> Tensor:
    """The `ceil(share * L)` tokens of each response with the largest scores [n], as booleans.

    Args:
        margin_of: given the least score chosen [n], by how much another may differ and still count as equal: then the
            earlier position goes first.
    """
    # Less 1e-9: as floats 0.07 * 100 is more than 7, and its ceiling 8.
    count = torch.ceil(share * tokens.length.double() - 1e-9).long()
    # The last one chosen, of each token's sequence.
    least = tokens.ranked(score, (tokens.length - count).minimum(tokens.length - 1))
    margin = margin_of(least)
    # Negated, so that NaN is chosen and shows in the loss.
    above = ~(score <= least + margin)
    tied = ~above & (score >= least - margin)
    return (count > 0) & (above | (tied & (tokens.before(tied.long()) < count - tokens.total(above))))


@rule("cumulative_entropy")
def cumulative_entropy(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The opener (eq. 6): the shortest prefix that holds the share `threshold` of the response's student entropy."""
    entropy = fixed_point(tokens.student_entropy)
    total, length = tokens.total(entropy).double(), tokens.last - tokens.first + 1
    return tokens.is_first | (tokens.before(entropy) < config.threshold * total - SLACK * (total + length / UNIT))


@rule("top_fraction")
def top_fraction(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The `ceil(entropy_fraction * L)` tokens of each response with the largest student entropy (eq. 7)."""
    return largest(tokens, tokens.student_entropy, config.entropy_fraction, slack)


@rule("confidence")
def confidence(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The gate (eq. 5): near 1 where the teacher is surer than the student, near 0 where the student is."""
    return torch.sigmoid((tokens.student_entropy - tokens.teacher_entropy) / config.gate_temperature)


@rule("identity")
def identity(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """Every response token."""
    return torch.ones_like(tokens.response)


@rule("tip", needs=[DIVERGENCE])
def tip(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """Token importance (TIP; Xu et al., arXiv 2604.14084): the `ceil(tip_fraction * L)` tokens of each response with
    the largest `h + d - h d` (eq. 11): uncertain tokens, and those where a sure student differs from its teacher.

    `h` and `d` are student entropy and divergence, each brought to [0, 1] by its least and largest value; entropies
    above their 98th percentile count as this. Here all of that is within a sequence. The paper takes the extremes and
    the percentile over a batch, with which the choice would depend on how a batch is cut; `d` there is the reverse KL,
    here the objective's own divergence (`beta: 1` is the reverse KL). The authors' repository
    (HJSang/OPSD_OnPolicyDistillation) has no code of this score: the percentile is as independent ports have it.
    """
    (h, h_slack), (d, d_slack) = _entropy_score(tokens), _divergence_score(tokens)
    return largest(tokens, h + d - h * d, config.tip_fraction, lambda least: h_slack + d_slack)


def _entropy_score(tokens: Tokens) -> tuple[Tensor, Tensor]:
    entropy = tokens.student_entropy
    percentile = (49 * tokens.length + 49) // 50 - 1  # rank of the smallest value that 98 % do not exceed
    return _min_max(tokens, entropy.minimum(tokens.ranked(entropy, percentile.clamp(min=0))))


def _divergence_score(tokens: Tokens) -> tuple[Tensor, Tensor]:
    return _min_max(tokens, tokens.divergence.clamp(max=_LARGEST))


def _min_max(tokens: Tokens, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n] in [0, 1] by the least and largest of their sequence, 0 where these count as equal; and the slack [n]
    by which two such numbers may differ and still count as equal."""
    least, most = tokens.ranked(values, 0), tokens.ranked(values, tokens.last - tokens.first)
    spread, noise = most - least, 2 * slack(most)
    equal = spread <= noise
    return torch.where(equal, 0, (values - least) / spread), torch.where(equal, 0, noise / spread)


@rule("importance_weight", needs=[SAMPLED])
def importance_weight(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """Weights of importance-weighted on-policy distillation (IW-OPD; Xie et al., arXiv 2606.22600) as a gate (eq. 12):
    from `1 + iw_gamma` at the first token down towards 1, as the models' disagreement about the prefix grows.

    The paper's loss is a policy gradient whose advantage `log t(y) - log s(y)` of the sampled token these weights
    multiply. Here they multiply the divergence over the whole vocabulary instead: not the paper's estimator, the same
    emphasis. `s` is the student that is trained, not the one that wrote the response: with `rollout.reuse` above 1 or
    sampling by top-k and top-p the two differ. What the weights mean presumes on-policy responses: of a response out of
    the data (`rollout.lmbda` below 1) they only say how much the two models differ about somebody else's words.
    """
    ratio = (tokens.teacher_log_probability - tokens.student_log_probability).abs().clamp(max=_EXCLUDED)
    ratio = fixed_point(ratio)
    total = tokens.total(ratio).double().clamp(min=1e-8 / UNIT)
    weight = 1 + config.iw_gamma * (1 - tokens.before(ratio).double() / total)
    return weight.to(tokens.student_entropy.dtype)


@rule("prefix")
def prefix(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The first `prefix_tokens` tokens of each response: what truncated on-policy distillation (Zhang et al., arXiv
    2605.31490) trains, of responses that are generated to their end. `rollout.horizon` generates no more than these."""
    return tokens.place < config.prefix_tokens


@rule("random_share", needs=[KEY])
def random_share(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """A control: `ceil(random_fraction * L)` tokens of each response, drawn without replacement. They depend on the
    sequence's key (in training: seed, step and sample) and the place in the response, not on the models."""
    drawn = fold(fold(tokens.key, _RANDOM_SHARE), tokens.place)
    return largest(tokens, drawn, config.random_fraction, lambda least: 0)
