"""The distillation losses of other trainers, as they define them, in plain fp64: what a user who comes from there has.

Restated from what each publishes; imports nothing of the package. Logits are [B, S, V], masks [B, S] (true where the
position predicts a trained token); both models' logits are divided by the temperature first.

- TRL 0.25.1, `trl/trainer/gkd_trainer.py: GKDTrainer.generalized_jsd_loss`
- Liger-Kernel 0.8.5, `liger_kernel/chunked_loss/jsd_loss.py` and `fused_linear_distillation.py`
- ms-swift, commit 0550e31, `swift/megatron/trainers/gkd_trainer.py: generalized_jsd_loss`
- NeMo-RL, commit 005a098, `nemo_rl/algorithms/loss_functions.py: DistillationLossFn`
"""

from __future__ import annotations

import torch
from torch import Tensor


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p||q) over the last dimension, of probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).softmax(-1)


def _generalized_jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """TRL's, which Liger and ms-swift share: `beta` weighs the teacher in the mixture and KL(teacher||mixture)."""
    if beta == 0:
        return _kl(t, s)
    if beta == 1:
        return _kl(s, t)
    mixture = (1 - beta) * s + beta * t
    return beta * _kl(t, mixture) + (1 - beta) * _kl(s, mixture)


def trl_gkd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Reduction `batchmean` with labels: the mean over the micro-batch's tokens."""
    s, t = _probabilities(student, temperature), _probabilities(teacher, temperature)
    return _generalized_jsd(s, t, beta)[mask].sum() / mask.sum()


def liger_jsd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """`weight_soft_loss` 1, `weight_hard_loss` 0: sums of chunks over the count of tokens that are not ignored."""
    s, t = _probabilities(student, temperature), _probabilities(teacher, temperature)
    total = sum((_generalized_jsd(a, b, beta) * m).sum() for a, b, m in zip(s, t, mask, strict=True))
    return total / mask.sum().clamp(min=1)


def ms_swift_gkd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Megatron-SWIFT over the whole vocabulary: the mean over the micro-batch's tokens, on all CP ranks together."""
    chosen = [_probabilities(logits[mask], temperature) for logits in (student, teacher)]
    return _generalized_jsd(*chosen, beta).mean()


def nemo_rl_kl(student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], kl_type: str) -> Tensor:
    """Teacher's top-k taken as the whole vocabulary. Each micro-batch's sum is divided by the tokens of the global
    batch, and the micro-batches add up. `forward` is KL(teacher||student), `reverse` KL(student||teacher)."""
    tokens = sum(mask.sum() for mask in masks)
    losses = []
    for s, t, mask in zip(student, teacher, masks, strict=True):
        s, t = _probabilities(s, 1.0), _probabilities(t, 1.0)
        per_token = _kl(t, s) if kl_type == "forward" else _kl(s, t)
        losses.append((per_token * mask).sum() / tokens)
    return torch.stack(losses).sum()
