"""Draws tokens from vocabulary-sharded logits: exact, without gathering the vocabulary, the same at any layout.

A token is drawn by the Gumbel-max rule: `argmax_v (z_v / temperature + g_v)` with independent Gumbel noise `g_v` is a
sample of the softmax. Each tensor-parallel rank takes the maximum of its own shard, so ranks exchange one pair
(score, token) per sequence. The noise is a function of the counters (seed, step, sample, position, token), so neither
the layout nor the other sequences of its batch change a response (distributed/counters.py).

Shapes: `B` sequences, `V_local` this rank's columns of the padded vocabulary. Without a `tp_group`, or with one of a
single rank, the vocabulary is whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tsdkd.distributed.counters import fold, step_key, uniform
from nemo_tsdkd.distributed.vocab_parallel import Group, all_gather, all_reduce, group_rank

NO_TOKEN = -1  # in place of a token where none could be drawn
_COLDEST = 1e-30  # below it a draw is the argmax: noise of at most 45 nats then parts no two logits
_ON_POLICY = -1  # in place of a sample id, which is never negative


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel(0, 1) noise [B, N] fp32 for keys [B] and the token ids [N] or [B, N]: -log(-log(1 - u))."""
    return uniform(fold(keys[:, None], token_ids)).neg_().log1p_().neg_().log_().neg_()


def on_policy(seed: int, step: int, lmbda: float) -> bool:
    """Whether the student writes the batch of `step`: true with chance `lmbda`, the same on every rank and run."""
    return uniform(fold(step_key(seed, step), _ON_POLICY)).item() < lmbda


def vocab_parallel_argmax(scores: Tensor, token_ids: Tensor, tp_group: Group = None) -> Tensor:
    """Token ids [B] of the largest scores [B, N], whose columns are the tokens [N]; ties go to the lower token id.
    NO_TOKEN where all scores are -inf, or one is +inf or NaN."""
    best, column = scores.max(dim=-1)  # the first of equals; NaN where there is one
    pairs = all_gather(torch.stack((best.double(), token_ids[column].double())), tp_group)  # [TP, 2, B]
    best, winner = pairs[:, 0].max(dim=0, keepdim=True)
    return pairs[:, 1].gather(0, winner).masked_fill(~(best.abs() < torch.inf), NO_TOKEN)[0].long()


def keep_top_k(scores: Tensor, top_k: int, tp_group: Group = None) -> Tensor:
    """Scores [B, V_local] below the `top_k`-th largest of the whole vocabulary set to -inf; ties with it all stay, and
    so does NaN."""
    candidates = scores.topk(min(top_k, scores.shape[-1])).values
    candidates = all_gather(candidates, tp_group).transpose(0, 1).flatten(1)  # [B, TP * k]
    threshold = candidates.topk(min(top_k, candidates.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: Tensor, top_p: float, tp_group: Group = None) -> Tensor:
    """The nucleus: a token stays if all strictly likelier ones together hold less than `top_p`, else it is -inf.

    The threshold is found by radix selection on the scores' 32 bits: four rounds each sum the probability in 256
    buckets and descend into the one where the mass, counted from the top, passes `top_p`. Ranks exchange
    [B, 256] sums, whatever the size of the nucleus. A row with NaN or +inf has a mass of NaN on every rank and keeps
    all its tokens.
    """
    peak = all_reduce(scores.max(dim=-1, keepdim=True).values, ReduceOp.MAX, tp_group)
    mass = (scores - peak).exp().double()
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 are one score
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31  # unsigned, in the scores' order
    prefix = torch.zeros_like(order[:, :1])
    above = torch.zeros_like(mass[:, :1])  # mass of the tokens above the bucket descended into
    target = None
    for shift in (24, 16, 8, 0):
        inside = mass.masked_fill(order >> (shift + 8) != prefix, 0.0)
        buckets = mass.new_zeros(mass.shape[0], 256).scatter_add_(1, (order >> shift) & 255, inside)
        buckets = all_reduce(buckets, ReduceOp.SUM, tp_group)
        if target is None:
            target = top_p * buckets.sum(dim=-1, keepdim=True)
        over = above + buckets.flip(-1).cumsum(-1).flip(-1) - buckets  # mass over each bucket, falling from 0 to 255
        digit = (over >= target).sum(dim=-1, keepdim=True).clamp_(max=255)
        above = over.gather(1, digit)
        prefix = (prefix << 8) | digit
    return scores.masked_fill(order < prefix, -torch.inf)


@torch.no_grad()
def sample(
    logits: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int,
    tp_group: Group = None,
    check: bool = True,
) -> Tensor:
    """Draw one token per sequence from vocab-parallel logits; every rank of `tp_group` gets the same tokens.

    Args:
        logits: [B, V_local], columns `rank * V_local` onwards of the padded vocabulary, any float dtype.
        keys: [B] int64, one per (sequence, position), from `fold`.
        temperature: divides the logits; 0 (or less than 1e-30, which is as much) takes the largest logit, ties to the
            lower token id.
        top_k: keep the k largest logits (0: all). Applied before `top_p`, as Hugging Face's generate does.
        top_p: keep the likeliest tokens up to this mass (1: all).
        vocab_size: columns from here on are padding and never drawn.
        check: look at the drawn tokens on the host. Without, a row that nothing can be drawn from is NO_TOKEN, and
            the caller must look for it.

    Returns:
        Token ids [B], int64.

    Raises:
        ValueError: `temperature`, `top_k` or `top_p` out of its range.
        FloatingPointError: with `check`, a row with NaN or +inf among its true columns (after the temperature), or
            with nothing but -inf.
    """
    _check(temperature, top_k, top_p)
    # As many columns on every rank, which exchange some; what lies beyond `vocab_size` in all of them costs nothing.
    scores = logits[:, :vocab_size].float()
    first = group_rank(tp_group) * logits.shape[-1]
    token_ids = torch.arange(first, first + scores.shape[-1], device=scores.device)
    if first + scores.shape[-1] > vocab_size:
        scores = scores.masked_fill(token_ids >= vocab_size, -torch.inf)
    greedy = temperature < _COLDEST
    if not greedy and temperature != 1:
        scores = scores / temperature
    if not greedy and 0 < top_k < vocab_size:
        scores = keep_top_k(scores, top_k, tp_group)
    if not greedy and top_p < 1:
        scores = keep_top_p(scores, top_p, tp_group)
    if not greedy:
        scores = scores + gumbel(keys, token_ids)
    tokens = vocab_parallel_argmax(scores, token_ids, tp_group)
    if check and (nothing := (tokens == NO_TOKEN).nonzero().flatten().tolist()):
        raise FloatingPointError(
            f"logits of rows {nothing}: NaN, +inf or nothing but -inf, so no token can be drawn. Look at the weights."
        )
    return tokens


def _check(temperature: float, top_k: int, top_p: float) -> None:
    for name, value, ok, rule in (
        ("temperature", temperature, 0 <= temperature < math.inf, "must be finite and not negative"),
        ("top_k", top_k, top_k >= 0, "must not be negative; 0 keeps all"),
        ("top_p", top_p, 0 < top_p <= 1, "must lie in (0, 1]; 1 keeps all"),
    ):
        if not ok:
            raise ValueError(f"{name} = {value}: {rule}.")
