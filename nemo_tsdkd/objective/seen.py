"""What the objective sees at each response token, for a person to look at. It is no part of the loss."""

from __future__ import annotations

import torch

from nemo_tsdkd.objective.observe import Call, Head, observe
from nemo_tsdkd.objective.tokens import DIVERGENCE, SeenTokens


@torch.no_grad()
def seen_tokens(head: Head, call: Call) -> SeenTokens:
    """Of a call of the objective. Collective over TP and CP, as the loss is; every rank gets the whole sequences."""
    config, objective = call.objective.config, call.objective
    tokens = observe(head, call, objective.needs | {DIVERGENCE}).tokens
    weights = objective.arithmetic.token_weights(tokens, config)
    seen = (
        tokens.sequence,
        tokens.student_entropy,
        tokens.teacher_entropy,
        weights.gate / weights.response,
        (weights.indirect != 0) & (config.indirect_kd_alpha != 0),
        (weights.entropy != 0) & (config.entropy_weight != 0),
        tokens.divergence,
    )
    return SeenTokens(*(value[tokens.response].cpu() for value in seen))
