"""The multi-tensor kernels that FusedAdam and Megatron's gradient clipping call.

Sources: common/multi_tensor/{adam,l2norm,scale}.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_stand_in import modelled

_Lists = list[list[Tensor]]


def multi_tensor_adam(
    chunk_size: int, noop_flag: Tensor, tensor_lists: _Lists, lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """A step of Adam (mode 0: decay in the gradient) or AdamW (mode 1) on [gradients, weights, m, v (, masters)]."""
    modelled(mode in (0, 1), f"Adam's mode {mode}")
    if noop_flag.item() == 1:
        return
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    with torch.no_grad():
        for grad, parameter, m, v, *master in zip(*tensor_lists, strict=True):
            p, g = (master[0] if master else parameter).float(), grad.float()
            if mode == 0:
                g = g + weight_decay * p
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = (m / correction1) / ((v / correction2).sqrt() + eps)
            if mode == 1:
                update = update + weight_decay * p
            p = p - lr * update
            for target in (parameter, *master):
                target.copy_(p)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: _Lists, scale: float) -> None:
    """[sources, targets]; the flag says that a source was not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        if not torch.isfinite(source).all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: _Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    return multi_tensor_unscale_l2norm(chunk_size, noop_flag, tensor_lists, 1.0, per_tensor)


def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: _Lists, inv_scale: float | Tensor, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm of all, norms of each if asked for)"""
    norms = torch.stack([(x.float() * inv_scale).norm() for x in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)
