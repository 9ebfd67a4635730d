"""The objective in plain fp64, one sequence and one position at a time: what every fast path is compared with.

Written from the definitions alone (docs/math.md); imports nothing of the package and shares no formula with it.
Gradients come from autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(log_p: Tensor) -> Tensor:
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q); columns without probability under p add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl(log_t, log_s)
    if beta == 1:
        return kl(log_s, log_t)
    m = beta * log_t.exp() + (1 - beta) * log_s.exp()
    log_m = torch.where(m > 0, m, 1).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def teacher_ranking(z: Tensor, t: Tensor, k: int) -> list[int]:
    """The student's k best tokens of one position in the teacher's order, best first; both sorts stable by id."""
    proposed = sorted(range(len(z)), key=lambda v: (-float(z[v]), v))[:k]
    return sorted(proposed, key=lambda v: -float(t[v]))


def plackett_luce(z: Tensor, ranking: list[int]) -> Tensor:
    terms = [torch.logsumexp(z[ranking[j:]], 0) - z[ranking[j]] for j in range(len(ranking))]
    return torch.stack(terms).sum()


def opener_length(h: list[float], c: float) -> int:
    total, running = math.fsum(h), 0.0
    for m in range(1, len(h) + 1):
        running = math.fsum(h[:m])
        if running >= c * total:
            return m
    return len(h)


def uncertain_positions(h: list[float], fraction: float) -> list[int]:
    return sorted(range(len(h)), key=lambda i: (-h[i], i))[: math.ceil(fraction * len(h))]


def sequence_terms(z: Tensor, t: Tensor, config) -> dict[str, Tensor]:
    """The three terms of one response: logits [L, V] of both models, already divided by the temperature."""
    log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
    h_s, h_t = entropy(log_s), entropy(log_t)
    h = h_s.detach().tolist()
    gate = torch.sigmoid((h_s.detach() - h_t) / config.gate_temperature)
    opener = range(opener_length(h, config.threshold))
    ranked = [plackett_luce(z[i], teacher_ranking(z[i].detach(), t[i], config.top_k)) for i in opener]
    chosen = uncertain_positions(h, config.entropy_fraction)
    return {
        "direct": (gate * jsd(log_s, log_t, config.beta)).mean(),
        "indirect": torch.stack(ranked).mean(),
        "entropy": h_s[chosen].mean() if chosen else z.new_zeros(()),
    }


def loss_sum(student: Tensor, teacher: Tensor, mask: Tensor, config, vocab_size: int) -> Tensor:
    """Sum over sequences of the paper's loss. Logits [S, B, V], mask [S, B]; columns from vocab_size on are padding."""
    z = student[..., :vocab_size].double() / config.temperature
    t = teacher[..., :vocab_size].double() / config.temperature
    total = z.new_zeros(())
    for b in range(mask.shape[1]):
        rows = mask[:, b]
        if rows.any():
            terms = sequence_terms(z[rows, b], t[rows, b], config)
            total = total + config.direct_weight * terms["direct"]
            total = total + config.indirect_kd_alpha * terms["indirect"] + config.entropy_weight * terms["entropy"]
    return total
