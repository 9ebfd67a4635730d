"""The TSD-KD loss on vocabulary-sharded logits: every rank gathers the vocabulary and computes the whole loss."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config import ObjectiveConfig
from nemo_tsdkd.objective.output import ObjectiveOutput


class _GatherVocabulary(torch.autograd.Function):
    """All ranks compute the same loss from the gathered logits, so each takes its own slice of the gradient."""

    @staticmethod
    def forward(ctx, logits, group):
        ctx.width, ctx.rank = logits.shape[-1], group.rank()
        shards = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(shards, logits.contiguous(), group=group)
        return torch.cat(shards, -1)

    @staticmethod
    def backward(ctx, grad):
        return grad[..., ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width].contiguous(), None


def _whole(logits: Tensor, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> Tensor:
    if tp_group is not None and tp_group.size() > 1:
        logits = _GatherVocabulary.apply(logits, tp_group)
    return logits[..., :vocab_size].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * (log_t.exp() * (log_t - log_m)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)


def tsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_mask: Tensor,
    config: ObjectiveConfig,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> ObjectiveOutput:
    """TSD-KD loss (arXiv 2603.13260) of logits [S, B, V_local]; mask [S, B] True: the next token is a response."""
    if cp_group is not None and cp_group.size() > 1:
        raise ValueError("cp_group: context parallelism is not supported yet. Set context_parallel_size=1.")
    if vocab_size is None:
        size = tp_group.size() if tp_group is not None else 1
        vocab_size = size * min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = _whole(student_logits, vocab_size, tp_group) / config.temperature
    teacher = _whole(teacher_logits.detach(), vocab_size, tp_group) / config.temperature
    names = "direct indirect entropy student_entropy teacher_entropy gate_mean opener_fraction rank_agreement"
    sums = {name: student.new_zeros(()) for name in names.split()}
    mask = response_mask.bool()
    for b in mask.any(0).nonzero().flatten().tolist():
        z, t = student[mask[:, b], b], teacher[mask[:, b], b]
        log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
        h_s, h_t = -(log_s.exp() * log_s).sum(-1), -(log_t.exp() * log_t).sum(-1)
        length, h = len(z), h_s.detach().double()
        gate = torch.sigmoid((h_s.detach() - h_t) / config.gate_temperature)
        reached = h.cumsum(0) >= config.threshold * h.sum()
        opener = int(reached.int().argmax()) + 1 if reached.any() else length
        candidates = z[:opener].detach().sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        rank = t[:opener].gather(-1, candidates).sort(dim=-1, descending=True, stable=True).indices
        ranked = z[:opener].gather(-1, candidates.gather(-1, rank))
        lse = ranked.flip(-1).logcumsumexp(-1).flip(-1)
        uncertain = h.sort(dim=0, descending=True, stable=True).indices[: math.ceil(config.entropy_fraction * length)]
        place = rank.argsort(-1)
        ahead = torch.triu(place[:, None, :] > place[:, :, None], diagonal=1).sum((1, 2)).to(z.dtype)
        pairs = config.top_k * (config.top_k - 1) / 2
        values = {
            "direct": (gate * _jsd(log_s, log_t, config.beta)).mean(),
            "indirect": (lse - ranked).sum(-1).mean(),
            "entropy": h_s[uncertain].mean() if len(uncertain) else z.new_zeros(()),
            "student_entropy": h_s.mean(),
            "teacher_entropy": h_t.mean(),
            "gate_mean": gate.mean(),
            "opener_fraction": z.new_tensor(opener / length),
            "rank_agreement": (ahead / pairs).mean() if pairs else z.new_ones(()),
        }
        sums = {name: sums[name] + values[name] for name in sums}
    num_sequences = mask.any(0).sum()
    loss_sum = (
        config.direct_weight * sums["direct"]
        + config.indirect_kd_alpha * sums["indirect"]
        + config.entropy_weight * sums["entropy"]
        + 0.0 * student[:0].sum()
    )
    metrics = {name: value.detach() for name, value in sums.items()} | {"response_tokens": mask.sum()}
    share = num_sequences.clamp(min=1)
    terms = {name: metrics[name] / share for name in ("direct", "indirect", "entropy")}
    return ObjectiveOutput(loss_sum / share, loss_sum, num_sequences, **terms, metrics=metrics)
