"""What only a GPU can tell: kernels, ours and Transformer Engine's. Skipped, never passed, without one."""

import oracle
import pytest
import torch
from engine_cases import *  # noqa: F403  tests
from objective_cases import Case

from nemo_tsdkd.objective import tsdkd_loss, tsdkd_loss_from_hidden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(1800),  # ranks import NeMo each for itself (ranks.py)
]


def on_gpu(tensors):
    return {name: value.cuda() for name, value in tensors.items()}


# On the same rounded inputs: of bf16 only the gradient that is returned is rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_the_logits_path_equals_the_oracle(dtype, tolerance):
    case = Case()
    cpu = case.tensors(dtype)
    exact = {name: value.double() for name, value in cpu.items() if name != "mask"}
    exact["student"].requires_grad_()
    expected = oracle.loss_sum(exact["student"], exact["teacher"], cpu["mask"], case.config, case.vocab_size)
    expected.backward()
    given = on_gpu(cpu)
    given["student"].requires_grad_()
    out = tsdkd_loss(given["student"], given["teacher"], given["mask"], case.config)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
    error = (given["student"].grad.cpu().double() - exact["student"].grad).norm() / exact["student"].grad.norm()
    assert error < tolerance


def test_the_fused_head_equals_the_logits_path():
    case = Case()
    given, mask = on_gpu(case.hidden(torch.float32)), case.tensors(torch.float32)["mask"].cuda()
    for name in ("student_hidden", "student_weight"):
        given[name].requires_grad_()
    fused = tsdkd_loss_from_hidden(**given, response_mask=mask, config=case.config)
    logits = [given[f"{m}_hidden"] @ given[f"{m}_weight"].T for m in ("student", "teacher")]
    plain = tsdkd_loss(logits[0], logits[1].detach(), mask, case.config)
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)  # TF32 may round the products
    inputs = [given["student_hidden"], given["student_weight"]]
    for a, b in zip(torch.autograd.grad(fused.loss, inputs), torch.autograd.grad(plain.loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
