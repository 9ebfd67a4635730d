"""The objective in plain fp64, one sequence and one position at a time: what every fast path is compared with.

Written from the definitions alone (docs/math.md); imports nothing of the package and shares no formula with it.
Gradients come from autograd.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

# Entropies closer than SLACK * (1 + H) count as equal (docs/math.md): rounding alone could part them.
SLACK = 2.0**-19


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
        if running >= c * total - SLACK * (total + len(h)):
            return m
    return len(h)


def uncertain_positions(h: list[float], fraction: float) -> list[int]:
    count = math.ceil(Fraction(str(fraction)) * len(h))
    if not count:
        return []
    least = sorted(h)[-count]
    above = [i for i, value in enumerate(h) if value > least + SLACK * (1 + least)]
    tied = [i for i, value in enumerate(h) if abs(value - least) <= SLACK * (1 + least)]
    return above + tied[: count - len(above)]


def sequence_terms(z: Tensor, t: Tensor, config) -> dict[str, Tensor]:
    """The three terms of one response: logits [L, V] of both models, already divided by the temperature."""
    log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
    h_s, h_t = entropy(log_s), entropy(log_t)
    h = h_s.detach().tolist()
    gate = torch.sigmoid((h_s.detach() - h_t) / config.gate_temperature)
    opener = range(opener_length(h, config.threshold))
    ranked = [plackett_luce(z[i], teacher_ranking(z[i].detach(), t[i], config.top_k)) for i in opener]
    chosen = uncertain_positions(h, config.entropy_fraction)
    if config.gate_rule == "top_fraction":  # chooses instead of weighing
        gate = h_s.new_zeros(len(h)).index_fill(
            0, torch.tensor(chosen, dtype=torch.int64), len(h) / max(len(chosen), 1)
        )
    beta = {"forward_kl": 0, "reverse_kl": 1}.get(config.preset, config.beta)
    is_square = config.divergence == "half_square"
    divergence = (log_s.exp() - log_t.exp()).square().sum(-1) / 2 if is_square else jsd(log_s, log_t, beta)
    return {
        "direct": ((gate if config.preset == "paper" else 1) * divergence).mean(),
        "indirect": torch.stack(ranked).mean(),
        "entropy": h_s[chosen].mean() if chosen else z.new_zeros(()),
        "entropy_gap": (h_s - h_t).square().mean(),  # this and the next: what the tests register
        "squared_divergence": divergence.square().mean(),
    }


def weighted(terms: dict[str, Tensor], config) -> Tensor:
    if config.preset in ("gkd", "forward_kl", "reverse_kl"):
        return config.direct_weight * terms["direct"]
    indirect, entropy = config.indirect_kd_alpha * terms["indirect"], config.entropy_weight * terms["entropy"]
    extra = sum(weight * terms[name] for name, weight in config.extra_terms.items())
    return config.direct_weight * terms["direct"] + indirect + entropy + extra


def reference_loss(z: Tensor, t: Tensor, mask: Tensor, config) -> Tensor:
    """The public trainer's loss as docs/math.md restates it; logits [B, S, V], mask [B, S]."""
    log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
    h_s, h_t = entropy(log_s), entropy(log_t)
    gate = torch.sigmoid(h_s.detach() - h_t)
    direct = (gate * jsd(log_s, log_t, config.beta))[mask].sum() / mask.sum()
    h = h_s.detach()[mask]
    # As if every row's prompt had been cut off, and the batch were as long as its longest response.
    column = torch.arange(mask.shape[1]) - mask.int().argmax(1)[:, None]
    q = torch.quantile(h, config.threshold)
    chosen = (h_s.detach() >= q - SLACK * (1 + q)) & (column >= 0) & (column <= column[mask].max())
    d = opener_length(h.tolist(), config.threshold) - 1
    losses = []
    for b, s in (mask & (column < d)).nonzero().tolist():
        ranking = teacher_ranking(z[b, s].detach(), t[b, s], config.top_k)
        losses += [plackett_luce(z[b, s], ranking[::-1])]
    indirect = torch.stack(losses).mean() if losses else z.new_zeros(())
    return weighted({"direct": direct, "indirect": indirect, "entropy": h_s[chosen].mean()}, config)


def loss_sum(student: Tensor, teacher: Tensor, mask: Tensor, config, vocab_size: int, cu_seqlens=None) -> Tensor:
    """Sum over sequences of the loss. Logits [S, B, V], mask [S, B]; columns from vocab_size on are padding.

    `cu_seqlens` are the bounds of sequences packed in the one row.
    """
    z = student[..., :vocab_size].double() / config.temperature
    t = teacher[..., :vocab_size].double() / config.temperature
    if config.preset == "reference":
        z, t, mask = z.transpose(0, 1), t.transpose(0, 1), mask.T
        return reference_loss(z, t, mask, config) * mask.any(1).sum()
    total = z[:0].sum()
    bounds = cu_seqlens or [0, len(mask)]
    for first, end in pairwise(bounds):
        for b in range(mask.shape[1]):
            rows = torch.arange(first, end)[mask[first:end, b]]
            if len(rows):
                weight = len(rows) if config.reduction == "token" else 1
                total = total + weight * weighted(sequence_terms(z[rows, b], t[rows, b], config), config)
    return total
