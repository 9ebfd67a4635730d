"""Draws from vocabulary shards have the softmax's distribution and do not depend on the number of shards."""

import functools

import pytest
import torch
import torch.distributed as dist
from chi_square import p_value
from ranks import run_ranks

from nemo_tsdkd.distributed.counters import fold, step_key
from nemo_tsdkd.rollout.sampling import NO_TOKEN, sample

VOCAB, PADDED, DRAWS = 45, 64, 8_000  # at TP 4 the last shard is padding only; top_k exceeds a shard
TEMPERATURE = 1.4
RULES = {"plain": {}, "top_k": {"top_k": 20}, "top_p": {"top_p": 0.7}, "both": {"top_k": 20, "top_p": 0.7}}


def _logits():
    """[PADDED], some of them tied; the padding would win every draw."""
    logits = 2.5 * torch.randn(PADDED, generator=torch.Generator().manual_seed(0))
    logits[20:24] = logits[3]
    logits[VOCAB:] = 1e4
    return logits


def _draws():
    """Counts [VOCAB] for each rule, drawn on this world's shards, and a few greedy choices."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    shard = _logits().chunk(dist.get_world_size())[dist.get_rank()].expand(DRAWS, -1)
    keys = fold(step_key(7, 3), torch.arange(DRAWS))
    drawn = {
        name: sample(shard, keys, temperature=TEMPERATURE, vocab_size=VOCAB, tp_group=group, **rule)
        for name, rule in RULES.items()
    }
    tied = torch.zeros(2, PADDED)
    tied[1, [9, 17, 33]] = 1.0
    tied = tied.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    drawn["greedy"] = sample(tied, keys[:2], temperature=0.0, vocab_size=VOCAB, tp_group=group)
    broken = _logits().expand(4, -1).clone()
    broken[1, 44] = torch.nan  # the last token; its shard is not the first at any size
    broken[3, 44] = torch.inf
    broken = broken.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    for name, rule in RULES.items():
        drawn[f"broken {name}"] = sample(
            broken, keys[:4], temperature=1.0, vocab_size=VOCAB, tp_group=group, check=False, **rule
        )
    return drawn


@functools.cache
def draws(tp):
    ranks = run_ranks(_draws, tp)
    assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks for name in rank)
    return ranks[0]


def allowed(rule: str) -> torch.Tensor:
    """The probabilities [VOCAB] a rule draws from, by its definition and not by thresholds on shards."""
    scores = _logits()[:VOCAB].double() / TEMPERATURE
    if "top_k" in RULES[rule]:
        scores = scores.masked_fill(scores < scores.sort(descending=True).values[RULES[rule]["top_k"] - 1], -torch.inf)
    mass = scores.softmax(0)
    if "top_p" in RULES[rule]:
        likelier = torch.stack([mass[scores > s].sum() for s in scores])
        mass = mass.masked_fill(likelier >= RULES[rule]["top_p"], 0.0)
    return mass / mass.sum()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_drawn_from_the_softmax(tp, rule):
    counts = torch.bincount(draws(tp)[rule], minlength=VOCAB)
    assert len(counts) == VOCAB, "a padding column was drawn"
    assert p_value(counts.double(), allowed(rule) * DRAWS) > 1e-3


@pytest.mark.parametrize("tp", [2, 4])
def test_the_same_draws_at_any_number_of_shards(tp):
    for name, tokens in draws(1).items():
        assert torch.equal(tokens, draws(tp)[name]), name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_greedy_ties_go_to_the_lower_token(tp):
    assert draws(tp)["greedy"].tolist() == [0, 9]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_nan_and_infinity_in_one_shard_are_seen_on_every_rank(tp):
    for name in RULES:
        drawn = draws(tp)[f"broken {name}"].tolist()
        assert drawn[1] == drawn[3] == NO_TOKEN and drawn[0] >= 0 and drawn[2] >= 0


def test_the_test_would_see_a_wrong_temperature():
    counts = torch.bincount(draws(1)["plain"], minlength=VOCAB).double()
    assert p_value(counts, _logits()[:VOCAB].double().softmax(0) * DRAWS) < 1e-9
