"""The objective in plain fp64, one sequence and one position at a time: what every fast path is compared with.

Written from the definitions alone (docs/math.md); imports nothing of the package and shares no formula with it.
Gradients come from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    return largest_positions(h, fraction, lambda least: SLACK * (1 + least))


def largest_positions(values: list, fraction: float, margin) -> list[int]:
    """Of the ceil(fraction * L) largest; of those that count as equal to the least of them, the first."""
    count = math.ceil(Fraction(str(fraction)) * len(values))
    if not count:
        return []
    least = sorted(values)[-count]
    above = [i for i, value in enumerate(values) if value > least + margin(least)]
    tied = [i for i, value in enumerate(values) if abs(value - least) <= margin(least)]
    return above + tied[: count - len(above)]


def min_max(values: list[float]) -> tuple[list[float], float]:
    """Scaled to [0, 1], and by how much two of them may differ and still count as equal."""
    spread, noise = max(values) - min(values), 2 * SLACK * (1 + max(values))
    if spread <= noise:
        return [0.0] * len(values), 0.0
    return [(value - min(values)) / spread for value in values], noise / spread


def tip_scores(h: list[float], d: list[float]) -> tuple[list[float], float]:
    """Soft-OR of entropy, cut off at its 98th percentile, and divergence; and the margin of equality."""
    most = sorted(h)[math.ceil(Fraction(98, 100) * len(h)) - 1]
    (a, a_margin), (b, b_margin) = min_max([min(x, most) for x in h]), min_max(d)
    return [x + y - x * y for x, y in zip(a, b, strict=True)], a_margin + b_margin


def splitmix64(state: int) -> int:
    """Its output for a state, as published (Steele, Lea, Flood 2014)."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def random_positions(key: int, length: int, fraction: float) -> list[int]:
    """Those with the largest hash, as signed 64 bits, of (key, -1, place)."""
    golden = 0x9E3779B97F4A7C15
    own = splitmix64(key)  # the counter -1 adds nothing
    drawn = [splitmix64(own + (i + 1) * golden) for i in range(length)]
    signed = [x - 2**64 if x >= 2**63 else x for x in drawn]
    return sorted(range(length), key=lambda i: -signed[i])[: math.ceil(Fraction(str(fraction)) * length)]


def importance_weights(ratio: list[float], gamma: float) -> list[float]:
    """1 + gamma * (1 - what the tokens before have of the sum of |log t(y) - log s(y)|)."""
    total = max(math.fsum(ratio), 1e-8)
    return [1 + gamma * (1 - math.fsum(ratio[:i]) / total) for i in range(len(ratio))]


def rule_weights(name: str, seen: dict, config) -> list[float]:
    """The weight of each of a response's L tokens in a term, which is their weighted sum over L."""
    h, length = seen["student_entropy"].tolist(), len(seen["student_entropy"])
    match name:
        case "confidence":
            gate = torch.sigmoid((seen["student_entropy"] - seen["teacher_entropy"]) / config.gate_temperature)
            return gate.tolist()
        case "identity":
            return [1.0] * length
        case "importance_weight":
            ratio = (seen["teacher_log_probability"] - seen["student_log_probability"]).abs()
            ratio = ratio.clamp(max=1e4).tolist()  # a token that one model excludes
            return importance_weights(ratio, config.iw_gamma)
        case "cumulative_entropy":
            chosen = list(range(opener_length(h, config.threshold)))
        case "top_fraction":
            chosen = uncertain_positions(h, config.entropy_fraction)
        case "tip":
            score, margin = tip_scores(h, seen["divergence"].tolist())
            chosen = largest_positions(score, config.tip_fraction, lambda least: margin)
        case "prefix":
            chosen = list(range(min(config.prefix_tokens, length)))
        case "random_share":
            chosen = random_positions(seen["key"], length, config.random_fraction)
    return [length / len(chosen) if i in chosen else 0.0 for i in range(length)]


def sequence_terms(z: Tensor, t: Tensor, config, labels: Tensor | None = None, key: int = 0) -> dict[str, Tensor]:
    """The terms of one response: logits [L, V] of both models, already divided by the temperature.

    `labels` [L] are the response's tokens and `key` is its sequence's key, for the rules that look at them.
    """
    log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
    h_s, h_t = entropy(log_s), entropy(log_t)
    beta = {"forward_kl": 0, "reverse_kl": 1}.get(config.preset, config.beta)
    is_square = config.divergence == "half_square"
    divergence = (log_s.exp() - log_t.exp()).square().sum(-1) / 2 if is_square else jsd(log_s, log_t, beta)
    seen = {"student_entropy": h_s.detach(), "teacher_entropy": h_t, "divergence": divergence.detach(), "key": key}
    if labels is not None:
        row = torch.arange(len(z))
        seen |= {
            "student_log_probability": log_s.detach()[row, labels],
            "teacher_log_probability": log_t[row, labels],
        }

    def mean(name: str, value: Callable[[int], Tensor]) -> Tensor:
        weights = rule_weights(name, seen, config)
        parts = [weight * value(i) for i, weight in enumerate(weights) if weight]
        return torch.stack(parts).sum() / len(z) if parts else z.new_zeros(())

    def ranked(i: int) -> Tensor:
        return plackett_luce(z[i], teacher_ranking(z[i].detach(), t[i], config.top_k))

    gated = config.preset == "paper"
    return {
        "direct": mean(config.gate_rule if gated else "identity", lambda i: divergence[i]),
        "indirect": mean(config.opener_rule, ranked),
        "entropy": mean(config.entropy_rule, lambda i: h_s[i]),
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


def loss_sum(
    student: Tensor, teacher: Tensor, mask: Tensor, config, vocab_size: int, cu_seqlens=None, labels=None, keys=None
) -> Tensor:
    """Sum over sequences of the loss. Logits [S, B, V], mask [S, B]; columns from vocab_size on are padding.

    `cu_seqlens` are the bounds of sequences packed in the one row, `labels` [S, B] the tokens that the positions
    predict and `keys` one integer for each sequence, row by row, for the rules that look at them.
    """
    z = student[..., :vocab_size].double() / config.temperature
    t = teacher[..., :vocab_size].double() / config.temperature
    if config.preset == "reference":
        z, t, mask = z.transpose(0, 1), t.transpose(0, 1), mask.T
        return reference_loss(z, t, mask, config) * mask.any(1).sum()
    total = z[:0].sum()
    bounds = cu_seqlens or [0, len(mask)]
    for i, (first, end) in enumerate(pairwise(bounds)):
        for b in range(mask.shape[1]):
            rows = torch.arange(first, end)[mask[first:end, b]]
            if len(rows):
                weight = len(rows) if config.reduction == "token" else 1
                asked = None if labels is None else labels[rows, b], 0 if keys is None else int(keys[max(i, b)])
                total = total + weight * weighted(sequence_terms(z[rows, b], t[rows, b], config, *asked), config)
    return total
