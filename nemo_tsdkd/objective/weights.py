"""The weight that each token has in each term, under the paper's arithmetic or the public trainer's."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.rules import RULES, confidence
from nemo_tsdkd.objective.tokens import SLACK, Tokens, fixed_point, slack


@dataclass(frozen=True)
class TokenWeights:
    """The weight of each token in the sum over sequences of each term's mean; all fields [n].

    With `objective.reduction: token` the sequences of that sum weigh as much as they have response tokens.
    """

    direct: Tensor
    indirect: Tensor
    entropy: Tensor
    gate: Tensor  # the gate over the response's length, for the metrics
    response: Tensor  # 1 / response length
    opener: Tensor  # 1 / opener length in the opener, else 0

    def stack(self) -> Tensor:
        return torch.stack([getattr(self, field.name) for field in fields(self)])


def _mean(tokens: Tokens, value: Tensor) -> Tensor:
    """A rule's value as weights of a mean within each sequence (rules.py states the two kinds)."""
    over = tokens.total(value if value.dtype == torch.bool else tokens.response)
    return value.to(tokens.student_entropy.dtype) / over.clamp(min=1)


def paper_weights(tokens: Tokens, config: ObjectiveConfig) -> TokenWeights:
    """The paper's: each term is the mean over sequences of a mean within the sequence. Rules must be registered."""
    gate = RULES[config.gate_rule](tokens, config)
    opener = RULES[config.opener_rule](tokens, config)
    uncertain = RULES[config.entropy_rule](tokens, config)
    length = tokens.total(tokens.response) if config.reduction == "token" else 1

    def mean(value: Tensor) -> Tensor:
        return length * _mean(tokens, value)

    response = mean(tokens.response)
    return TokenWeights(
        direct=mean(gate),
        indirect=mean(opener),
        entropy=mean(uncertain),
        gate=gate.to(tokens.student_entropy.dtype) * response,
        response=response,
        opener=mean(opener != 0),
    )


def reference_weights(tokens: Tokens, config: ObjectiveConfig) -> TokenWeights:
    """The public trainer's arithmetic (docs/math.md): one mean over the call's tokens, one opener column for all rows.

    Here `tokens` are all positions of the call, since the public entropy term trains the padding too: every row from
    its first response position to the length of the longest response. Its means do depend on how a batch is cut into
    calls; times the number of sequences they add up like the paper's.
    """
    response, entropy = tokens.response, tokens.student_entropy
    h = entropy[response]
    running = fixed_point(h).cumsum(0)
    total = running[-1:].double()
    opener_columns = (running < config.threshold * total - SLACK * (total + len(h) * 2.0**32)).sum()
    # The public trainer removes the prompts first: its column 0 is the row's first response position.
    begins = response & (tokens.before(response.long()) == 0)
    column = tokens.position - tokens.total(torch.where(begins, tokens.position, 0))
    opener = response & (column < opener_columns)
    uncertain = response
    if len(h):
        inside = (column >= 0) & (column <= column[response].max())
        quantile = torch.quantile(h, config.threshold)
        uncertain = inside & ~(entropy < quantile - slack(quantile))
    gate = confidence(tokens, config) * response

    def mean(chosen: Tensor, value: Tensor) -> Tensor:
        return value * tokens.num_sequences / chosen.sum().clamp(min=1)

    return TokenWeights(
        direct=mean(response, gate),
        indirect=mean(opener, opener.to(entropy.dtype)),
        entropy=mean(uncertain, uncertain.to(entropy.dtype)),
        gate=gate / tokens.total(response).clamp(min=1),
        response=_mean(tokens, response),
        opener=_mean(tokens, opener),
    )
