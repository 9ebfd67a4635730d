"""`gkd`, `forward_kl` and `reverse_kl` are the losses of the same name elsewhere, value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peers.definitions as peers
from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss

JSD = {"TRL": peers.trl_gkd, "Liger": peers.liger_jsd, "ms-swift": peers.ms_swift_gkd}


@st.composite
def batches(draw):
    """(student, teacher [B, S, V] in fp64, mask [B, S] with a token in it)."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(2, 30))
    scale = draw(st.sampled_from([0.3, 2.0, 8.0]))
    student, teacher = (scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(shape[:2], generator=g) < 0.5
    mask[0, -1] = True
    return student, teacher, mask


def ours(student, teacher, mask, **fields):
    """(loss_sum, count, gradient of the loss) of logits [B, S, V]."""
    z = student.clone().requires_grad_()
    logits, truth = z.transpose(0, 1), teacher.transpose(0, 1)
    out = tsdkd_loss(logits, truth, mask.T, ObjectiveConfig(reduction="token", **fields))
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad


def agree(out, grad, loss, z):
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-10, atol=1e-13)
    (expected,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", JSD)
@settings(max_examples=60, deadline=None)
@given(batch=batches(), beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), temperature=st.sampled_from([0.7, 1.0, 2.0]))
def test_gkd_is_the_peers_generalized_jsd_with_their_beta(name, batch, beta, temperature):
    student, teacher, mask = batch
    out, grad = ours(*batch, preset="gkd", beta=beta, temperature=temperature)
    z = student.clone().requires_grad_()
    agree(out, grad, JSD[name](z, teacher, mask, beta, temperature), z)


@pytest.mark.parametrize(("preset", "kl_type"), [("forward_kl", "forward"), ("reverse_kl", "reverse")])
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(batches(), min_size=1, max_size=3))
def test_the_kl_presets_are_nemo_rls_over_any_micro_batches(preset, kl_type, parts):
    """The sums of our calls over the added counts: the mean over the tokens of the global batch, as there."""
    students = [student.clone().requires_grad_() for student, _, _ in parts]
    expected = peers.nemo_rl_kl(students, [t for _, t, _ in parts], [m for _, _, m in parts], kl_type)
    calls = [ours(*part, preset=preset) for part in parts]
    count = sum(int(out.count) for out, _ in calls)
    assert count == sum(int(mask.sum()) for _, _, mask in parts)
    torch.testing.assert_close(sum(out.loss_sum for out, _ in calls).detach() / count, expected.detach())
    for (out, grad), z_grad in zip(calls, torch.autograd.grad(expected, students), strict=True):
        torch.testing.assert_close(grad * (int(out.count) / count), z_grad, rtol=1e-9, atol=1e-12)


def test_a_mean_over_sequences_differs_from_one_over_tokens():
    """Two responses of one and three tokens, of which the short one's divergence is all there is."""
    student = torch.zeros(2, 3, 4, dtype=torch.float64)
    teacher = student.clone()
    teacher[0, 0, 0] = 3.0
    mask = torch.tensor([[True, False, False], [True, True, True]])
    by_token = peers.trl_gkd(student, teacher, mask, 0.0)
    logits = student.transpose(0, 1), teacher.transpose(0, 1), mask.T
    losses = {
        r: tsdkd_loss(*logits, ObjectiveConfig(preset="forward_kl", reduction=r)).loss for r in ("token", "sequence")
    }
    torch.testing.assert_close(losses["token"], by_token)
    torch.testing.assert_close(losses["sequence"], 2 * by_token)
