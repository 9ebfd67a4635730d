"""The noise and the sampling rules on one rank; `multirank/test_sampling_ranks.py` repeats the draws on shards."""

import math

import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_tsdkd.distributed.counters import fold, step_key, uniform
from nemo_tsdkd.rollout import sampling
from nemo_tsdkd.rollout.sampling import gumbel, keep_top_k, keep_top_p, on_policy, sample


def test_fold_is_splitmix64():
    zero = torch.tensor(0)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its first outputs from state 0
    assert [fold(zero, i).item() % 2**64 for i in range(3)] == published


def test_uniform_is_inside_the_interval_at_both_ends_and_gumbel_finite(monkeypatch):
    bits = torch.tensor([[0, -(2**63), 2**63 - 1, -1]])  # uniform drops the sign
    ends = uniform(bits)
    assert ((ends > 0) & (ends < 1)).all()
    monkeypatch.setattr(sampling, "fold", lambda key, counter: bits)
    most, least = 64 * math.log(2), -math.log(24 * math.log(2))
    assert gumbel(torch.tensor([0]), torch.arange(4)).tolist() == [pytest.approx([most, most, least, least])]


def test_gumbel_noise_has_its_distribution():
    noise = gumbel(step_key(1, 2)[None], torch.arange(200_000)).double().sort().values[0]
    cdf = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(len(cdf))  # Kolmogorov-Smirnov at the 0.1 % level


@pytest.mark.parametrize("neighbour", ["seed", "step", "sample", "position", "token"])
def test_noise_of_neighbouring_counters_is_independent(neighbour):
    """Pairs (noise here, noise one counter on), in 8 x 8 equally likely cells."""
    n = 40_000

    def noise(shift):
        at = {name: int(name == neighbour) * shift for name in ("seed", "step", "sample", "position", "token")}
        key = fold(fold(step_key(11 + at["seed"], at["step"]), torch.arange(200) + at["sample"]), 5 + at["position"])
        return uniform(fold(key[:, None], torch.arange(n // 200) + at["token"])).flatten()

    cells = (noise(0) * 8).long() * 8 + (noise(1) * 8).long()
    counts = torch.bincount(cells, minlength=64).double()
    assert p_value(counts, torch.full((64,), n / 64, dtype=torch.float64)) > 1e-3


def test_on_policy_has_its_chance_and_its_ends():
    decisions = [on_policy(3, step, 0.3) for step in range(4000)]
    assert abs(sum(decisions) / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert decisions[:200] == [on_policy(3, step, 0.3) for step in range(200)]
    assert decisions[:200] != [on_policy(4, step, 0.3) for step in range(200)]
    assert all(on_policy(3, step, 1.0) for step in range(200))
    assert not any(on_policy(3, step, 0.0) for step in range(200))


def test_greedy_takes_the_lower_of_tied_tokens_and_no_padding():
    logits = torch.tensor([[0.0, 2.0, 2.0, 9.0], [1.0, 1.0, 1.0, 9.0]])
    assert sample(logits, torch.zeros(2, dtype=torch.int64), temperature=0.0, vocab_size=3).tolist() == [1, 0]


def test_sampling_leaves_the_logits_alone():
    logits = torch.randn(3, 8)
    before = logits.clone()
    for rule in ({}, {"top_k": 2}, {"top_p": 0.5}):
        sample(logits, torch.arange(3), temperature=0.7, vocab_size=6, **rule)
    assert torch.equal(logits, before)


def test_a_draw_depends_on_its_key_only():
    logits = torch.randn(1, 50).expand(6, -1)
    keys = fold(step_key(0, 0), torch.arange(6))
    drawn = sample(logits, keys, temperature=2.0, vocab_size=50)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(sample(logits, keys[order], temperature=2.0, vocab_size=50), drawn[order])
    assert drawn.unique().numel() > 1


def test_top_k_keeps_ties_with_the_last():
    kept = keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.0]]), 3) > -torch.inf
    assert kept.tolist() == [[True, True, True, True, False]]


def nucleus(scores: list[float], top_p: float) -> list[bool]:
    """The definition, by sorting: the strictly likelier tokens together hold less than top_p."""
    mass = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return [mass[torch.tensor(scores) > s].sum().item() < top_p for s in scores]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 1.0, 2.5, 1e-30, -1e-30, 20.0]), min_size=1, max_size=12),
    st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.913, 0.999]),
)
def test_top_p_is_the_nucleus(scores, top_p):
    kept = keep_top_p(torch.tensor([scores, scores]), top_p) > -torch.inf
    assert kept.tolist() == [nucleus(scores, top_p)] * 2


def test_top_p_after_top_k_counts_the_mass_that_is_left():
    scores = torch.tensor([[4.0, 3.9, 3.8, 3.7, 3.6]])
    assert (keep_top_p(scores, 0.5) > -torch.inf).sum() == 3
    assert (keep_top_p(keep_top_k(scores, 2), 0.5) > -torch.inf).sum() == 1


def test_no_state_of_a_generator_is_read():
    logits, keys = torch.randn(4, 30), torch.arange(4)
    torch.manual_seed(1)
    first = sampling.sample(logits, keys, temperature=1.0, vocab_size=30)
    torch.manual_seed(2)
    assert torch.equal(first, sampling.sample(logits, keys, temperature=1.0, vocab_size=30))


NAN, INF = math.nan, math.inf
BROKEN = {
    "nan": [0.0, NAN, 1.0, 9.0],
    "negative_nan": [0.0, -NAN, 1.0, 9.0],
    "infinite": [0.0, INF, 1.0, 9.0],
    "nothing": [-INF, -INF, -INF, 9.0],
}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 1, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("name", BROKEN)
def test_from_broken_logits_nothing_is_drawn(name, rule, temperature):
    """The second of three rows; the last column is padding."""
    logits = torch.tensor([[0.0, 1.0, 2.0, NAN], BROKEN[name], [0.0, -INF, 2.0, INF]])
    fields = {"temperature": temperature, "vocab_size": 3, **rule}
    with pytest.raises(FloatingPointError, match=r"logits of rows \[1\]: NaN, \+inf or nothing but -inf"):
        sample(logits, torch.arange(3), **fields)
    drawn = sample(logits, torch.arange(3), check=False, **fields).tolist()
    assert drawn[1] == sampling.NO_TOKEN and {drawn[0], drawn[2]} <= {0, 1, 2}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"top_p": 0.0}, r"top_p = 0.0: must lie in \(0, 1\]"),
        ({"top_p": NAN}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1: must not be negative"),
        ({"temperature": -1.0}, "temperature = -1.0: must be finite and not negative"),
        ({"temperature": INF}, "temperature = inf"),
    ],
    ids=str,
)
def test_a_rule_out_of_its_range_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), **{"temperature": 1.0, "vocab_size": 4, **field})


@pytest.mark.parametrize("temperature", [1e-45, 1e-31, 1e-29, 1e-10])
def test_a_tiny_temperature_takes_the_largest_logit(temperature):
    logits = 1e4 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, torch.arange(200), temperature=temperature, vocab_size=50)
    assert torch.equal(drawn, logits.argmax(-1))
