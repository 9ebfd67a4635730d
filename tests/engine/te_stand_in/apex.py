"""Apex's kernel by which Megatron's own linear layers (embedding and head) add a weight's gradient to DDP's buffer."""

from torch import Tensor


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    rows, grads = (x.reshape(-1, x.shape[-1]).float() for x in (total_input, grad_output))
    main_grad.add_(grads.t() @ rows)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
