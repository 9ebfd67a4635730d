"""Each formula alone: its gradient is that of its value, its limits are exact, its sums merge."""

import math

import pytest
import torch

from nemo_tsdkd.distributed.vocab_parallel import top_k_by_id
from nemo_tsdkd.objective import ObjectiveConfig
from nemo_tsdkd.objective.terms import SoftmaxSums, add_entropy_grad_, divergence, plackett_luce, rank_agreement

BETAS = [0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0]


def logits(*shape, scale=2.0, seed=0, dtype=torch.float64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_grad(beta, z, t):
    """The divergence of logits z and t by terms.py: values [n] and their gradient [n, V]."""
    rule, log_t = divergence(ObjectiveConfig(beta=beta)), t.log_softmax(-1)
    sums = rule.sums_(z.log_softmax(-1), log_t.clone())
    log_s = z.log_softmax(-1)
    return rule.value(sums), rule.grad_(log_s, log_t, log_s.exp(), sums)


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergences_gradient_is_that_of_its_definition(beta):
    z, t = logits(4, 9).requires_grad_(), logits(4, 9, seed=1)
    log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
    s, p = log_s.exp(), log_t.exp()
    if beta in (0.0, 1.0):
        expected = ((p if beta == 0 else s) * (log_t - log_s) * (1 if beta == 0 else -1)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * s).log()
        expected = beta * (p * (log_t - log_m)).sum(-1) + (1 - beta) * (s * (log_s - log_m)).sum(-1)
    (grad,) = torch.autograd.grad(expected.sum(), z)
    value, ours = value_and_grad(beta, z.detach(), t)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_exactly_no_divergence(beta):
    z = logits(3, 1000, dtype=torch.float32)
    value, grad = value_and_grad(beta, z, z.clone())
    assert not value.any() and not grad.any()


def test_nearly_equal_models_keep_their_relative_precision_in_fp32():
    """A mixture taken as the log of a sum would leave only rounding error here."""
    z = logits(3, 1000, dtype=torch.float32)
    t = z + 1e-3 * logits(3, 1000, seed=1, dtype=torch.float32)
    value, grad = value_and_grad(0.9, z, t)
    exact, exact_grad = value_and_grad(0.9, z.double(), t.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    assert (grad - exact_grad).norm() < 1e-3 * exact_grad.norm()


def test_the_entropy_and_its_gradient():
    z = logits(4, 9).requires_grad_()
    log_s = z.log_softmax(-1)
    expected = -(log_s.exp() * log_s).sum(-1)
    weight = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    (grad,) = torch.autograd.grad((weight * expected).sum(), z)
    sums = SoftmaxSums.of_(z.detach().clone())
    torch.testing.assert_close(sums.entropy(), expected.detach())
    log_s = log_s.detach()
    torch.testing.assert_close(sums.log_probabilities_(z.detach().clone()), log_s)
    start = torch.ones_like(log_s)
    ours = add_entropy_grad_(start, log_s.clone(), log_s.exp(), sums.entropy()[:, None], weight[:, None])
    torch.testing.assert_close(ours, 1 + grad)


def test_softmax_sums_merge_in_any_cut():
    z = logits(4, 12, scale=40)
    z[0, :7] = -1e30
    whole = SoftmaxSums.of_(z.clone())
    parts = [SoftmaxSums.of_(part.clone()) for part in z.split([7, 1, 4], -1)]
    merged = SoftmaxSums.empty(whole.peak)
    for part in parts:
        merged = merged.merge(part)
    for name in SoftmaxSums._fields:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_plackett_luce_and_its_gradient(k):
    z = logits(5, k).requires_grad_()
    expected = torch.stack([z[:, j:].logsumexp(-1) - z[:, j] for j in range(k)]).sum(0)
    (grad,) = torch.autograd.grad(expected.sum(), z)
    value, ours = plackett_luce(z.detach(), torch.ones_like(z, dtype=torch.bool))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-12)


def test_plackett_luce_leaves_invalid_candidates_out():
    z, keep = logits(1, 6), torch.tensor([[True, False, True, True, False, True]])
    value, grad = plackett_luce(z, keep)
    fewer, fewer_grad = plackett_luce(z[keep][None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(value, fewer)
    torch.testing.assert_close(grad[keep], fewer_grad[0])
    assert not grad[~keep].any()


def test_plackett_luce_is_the_share_of_the_ranking_among_all():
    z = torch.tensor([0.3, -1.0, 2.0]).log_softmax(0).double()
    orders = [(a, b, c) for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3]
    ranked = torch.stack([z[list(order)] for order in orders])
    value, _ = plackett_luce(ranked, torch.ones_like(ranked, dtype=torch.bool))
    assert math.isclose(float((-value).exp().sum()), 1.0, rel_tol=1e-12)


def test_rank_agreement_counts_ordered_pairs():
    places = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 2, 3]])
    assert rank_agreement(places).tolist() == pytest.approx([1.0, 0.0, 5 / 6])
    assert rank_agreement(places[:, :1]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_k_orders_ties_by_column(dtype):
    scores = logits(20, 50, scale=1.0).mul(2).round().div(2).to(dtype)
    scores[0] = 0.0
    scores[1, ::2] = -0.0
    for k in (1, 7, 50):
        values, columns = top_k_by_id(scores, k)
        expected = scores.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(columns, expected)
        assert torch.equal(values, scores.gather(-1, expected))
