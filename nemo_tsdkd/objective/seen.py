"""What the objective sees at each response token, for a person to look at. It is no part of the loss."""

from __future__ import annotations

import torch

from nemo_tsdkd.distributed.vocab_parallel import all_gather
from nemo_tsdkd.objective.function import Call, Head, divergence_sums, softmax_sums
from nemo_tsdkd.objective.terms import divergence
from nemo_tsdkd.objective.tokens import SeenTokens


@torch.no_grad()
def seen_tokens(head: Head, call: Call) -> SeenTokens:
    """Of a call of the objective. Collective over TP and CP, as the loss is; every rank gets the whole sequences."""
    config, arithmetic = call.objective.config, call.objective.arithmetic
    softmax = softmax_sums(head, config, call.tp_group)
    entropies = softmax.entropy()
    tokens, place = call.layout.gather(call.mask, call.index, entropies)
    weights = arithmetic.token_weights(tokens, config)
    mine = entropies.new_zeros(call.mask.numel())
    mine[call.index] = divergence(config).value(divergence_sums(head, softmax, config, call.tp_group))
    divergences = all_gather(mine, call.layout.cp_group).flatten()[place]
    seen = (
        tokens.sequence,
        tokens.student_entropy,
        tokens.teacher_entropy,
        weights.gate / weights.response,
        (weights.indirect != 0) & (config.indirect_kd_alpha != 0),
        (weights.entropy != 0) & (config.entropy_weight != 0),
        divergences,
    )
    return SeenTokens(*(value[tokens.response].cpu() for value in seen))
