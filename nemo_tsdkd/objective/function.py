"""The objective as one autograd function: values in the forward, analytic gradients tile by tile in the backward.

Kept between the two: the head's own inputs and a few numbers a token. The backward needs no collective, because
everything that crosses ranks is in those numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.distributed.vocab_parallel import Group, all_gather, all_reduce, group_rank, group_size, top_k_by_id
from nemo_tsdkd.objective.extra_terms import TokenStatistics, extra_terms
from nemo_tsdkd.objective.heads import Tile
from nemo_tsdkd.objective.observe import Call, Head, divergence_sums, observe, of_models
from nemo_tsdkd.objective.output import Metrics
from nemo_tsdkd.objective.passes import compute_dtype, passes, scaled_
from nemo_tsdkd.objective.terms import FLOOR, SoftmaxSums, divergence, plackett_luce, rank_agreement
from nemo_tsdkd.objective.weights import TokenWeights


@dataclass(frozen=True)
class Candidates:
    """The student's proposals at the m opener tokens.

    Attributes:
        student, teacher: logits [m, k], student's order.
        slot: place [m, k] of each in the list of all ranks' proposals.
        columns: this rank's own proposals [m, k_local] as local columns.
    """

    student: Tensor
    teacher: Tensor
    slot: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Saved:
    """What the backward needs besides the head, for the m tokens that have a gradient; fields [m] unless stated."""

    rows: Tensor  # which of the head's n tokens these are
    softmax: SoftmaxSums  # [2, m] each
    student_entropy: Tensor
    divergence_sums: Tensor | None  # [2, m], zero for tokens without divergence; None where none has one
    compares_all: bool  # every one of the m tokens has a divergence
    direct: Tensor  # derivatives of the loss by the token's divergence and student entropy
    entropy: Tensor
    opener: Tensor  # [o] the opener's tokens among the m
    columns: Tensor  # [o, k_local] candidates among this rank's columns
    columns_grad: Tensor  # [o, k_local]


def candidates(head: Head, config: ObjectiveConfig, tp_group: Group) -> Candidates:
    """The student's top_k best tokens at each of the head's positions: one small all-gather.

    Lists are ordered by (logit descending, token id ascending) throughout: lower columns and lower ranks come first
    and every merge is a stable sort. A rank with fewer columns than k fills up with FLOOR, which never wins.
    """
    k, k_local = config.top_k, min(config.top_k, head.padded_width)
    logits = torch.full(
        (2, head.num_tokens, k_local), FLOOR, dtype=compute_dtype(head.student.dtype), device=head.student.device
    )
    columns = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
    for rows, tile, raw in head.tiles():
        student, teacher = (scaled_(z, config.temperature) for z in raw)
        found, at = top_k_by_id(student, min(k_local, student.shape[1]))
        both = torch.cat([logits[:, rows], torch.stack([found, teacher.gather(-1, at)])], -1)
        order = both[0].sort(dim=-1, descending=True, stable=True).indices[:, :k_local]
        logits[:, rows] = both.gather(-1, order.expand(2, -1, -1))
        columns[rows] = torch.cat([columns[rows], at + tile.start], -1).gather(-1, order)
    student, teacher = all_gather(logits, tp_group).permute(1, 2, 0, 3).flatten(2)
    student, slot = (x[:, :k] for x in student.sort(dim=-1, descending=True, stable=True))
    return Candidates(student, teacher.gather(-1, slot), slot, columns)


def indirect_term(found: Candidates, reverse: bool, tp_group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Ranking loss [m], its gradient [m, k_local] for this rank's own proposals, and the rank agreement [m].

    `reverse` takes the likelihood of the teacher's order reversed, as the public trainer does. In fp64: it is small,
    and its exponents are differences of running sums.
    """
    ranking = found.teacher.sort(dim=-1, descending=True, stable=True).indices
    agreement = rank_agreement(ranking.argsort(-1))
    ranking = ranking.flip(-1) if reverse else ranking
    ranked = found.student.gather(-1, ranking)
    value, grad = plackett_luce(ranked.double(), ~(ranked <= FLOOR))
    ranks, k_local = group_size(tp_group), found.columns.shape[-1]
    by_slot = grad.new_zeros((len(grad), ranks * k_local))
    by_slot.scatter_(-1, found.slot.gather(-1, ranking), grad)
    own = by_slot.unflatten(-1, (ranks, k_local))[:, group_rank(tp_group)]
    return value.to(ranked.dtype), own.to(ranked.dtype), agreement.to(ranked.dtype)


def evaluate(head: Head, call: Call) -> tuple[Saved, Tensor, Tensor, Tensor]:
    """(what the backward needs, `Metrics` and the extra terms in a row, number of sequences, a broken token).

    Entropies are those of all tokens; candidates and divergences of the tokens alone that have weight in their term.
    Where a rule needs divergences to give weights, they are those of all tokens, computed before and once.
    """
    config, arithmetic, tp_group = call.objective.config, call.objective.arithmetic, call.tp_group
    seen = observe(head, call, call.objective.needs)
    softmax, entropies, tokens = seen.softmax, seen.entropies, seen.tokens
    weights = TokenWeights(*call.layout.local(arithmetic.token_weights(tokens, config).stack(), seen.place, call.index))
    opener = _rows(weights.indirect, config.indirect_kd_alpha)
    found = candidates(head.take(opener), config, tp_group)
    ranking_loss, columns_grad, agreement = indirect_term(found, arithmetic.reverses_ranking, tp_group)
    # An extra term may look at the divergence of any response token.
    compared = _rows(weights.response, 1) if config.extra_terms else _rows(weights.direct, config.direct_weight)
    if seen.divergence_sums is None:
        sums = divergence_sums(_part(head, compared), softmax.at(slice(None), compared), config, tp_group)
    else:
        sums = seen.divergence_sums[:, compared]
    divergences = _spread(divergence(config).value(sums), compared, entropies[0])
    extra = extra_terms(TokenStatistics(entropies[0], divergences, entropies[1]), weights.response, config)
    # Not by multiplying with zero: an extra term's token without a gate may have an infinite divergence.
    direct = torch.where(weights.direct != 0, weights.direct * divergences, 0)
    broken = call.layout.first_place(~(direct + entropies.sum(0)).isfinite(), call.index)
    student_entropy, teacher_entropy = (weights.response * entropies).sum(-1)
    values = Metrics(
        direct=direct.sum(),
        indirect=(weights.indirect[opener] * ranking_loss).sum(),
        entropy=(weights.entropy * entropies[0]).sum(),
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        gate_mean=weights.gate.sum(),
        opener_fraction=(weights.response * (weights.opener != 0)).sum(),
        rank_agreement=(weights.opener[opener] * agreement).sum(),
        response_tokens=(weights.response != 0).to(entropies.dtype).sum(),
    )
    metrics = all_reduce(torch.cat([torch.stack(values), extra.values]), dist.ReduceOp.SUM, call.layout.cp_group)
    direct_grad = config.direct_weight * weights.direct + extra.divergence_grad
    entropy_grad = config.entropy_weight * weights.entropy + extra.entropy_grad
    rows = ((direct_grad != 0) | (entropy_grad != 0)).index_fill(0, opener, True).nonzero().flatten()
    saved = Saved(
        rows=rows,
        softmax=softmax.at(slice(None), rows),
        student_entropy=entropies[0][rows],
        divergence_sums=_spread(sums, compared, entropies)[:, rows] if len(compared) else None,
        compares_all=len(compared) == len(rows),
        direct=direct_grad[rows],
        entropy=entropy_grad[rows],
        opener=torch.searchsorted(rows, opener),
        columns=found.columns,
        columns_grad=config.indirect_kd_alpha * weights.indirect[opener, None] * columns_grad,
    )
    return saved, metrics, tokens.num_sequences, broken


def _rows(weight: Tensor, of_term: float) -> Tensor:
    """Which tokens have weight in a term; none where the term has none."""
    return weight.nonzero().flatten() if of_term else torch.empty(0, dtype=torch.int64, device=weight.device)


def _part(head: Head, rows: Tensor) -> Head:
    return head if len(rows) == head.num_tokens else head.take(rows)


def _spread(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Values [..., m] of some tokens among zeros for all, in the shape [..., n] of `like`."""
    return torch.zeros_like(like).index_copy_(-1, rows, values)


def split_metrics(metrics: Tensor) -> tuple[Metrics, tuple[Tensor, ...]]:
    """`evaluate`'s row of metrics as `Metrics` and the values of the extra terms."""
    count = len(Metrics._fields)
    return Metrics(*metrics[:count]), metrics[count:].unbind()


def gradient(head: Head, saved: Saved, config: ObjectiveConfig, scale: Tensor) -> Iterator[Tile]:
    """Tiles of scale * d loss_sum / d student logits of `saved`'s tokens: a third pass, no collective."""
    rule, scale = divergence(config), scale / config.temperature
    sums = saved.divergence_sums
    run, has_entropy = passes(config, head.student.device), bool(config.entropy_weight or config.extra_terms)
    for rows, columns, logits in head.tiles(teacher=sums is not None):
        grad = run.gradient(
            rule,
            tuple(logits),
            of_models(saved.softmax, rows)[: len(logits)],
            run.temperature,
            None if sums is None else sums[:, rows].T,
            scale * saved.direct[rows],
            (saved.student_entropy[rows], scale * saved.entropy[rows]) if has_entropy else None,
            not saved.compares_all,
        )
        _add_candidates_(grad, rows, columns, saved, scale)
        yield rows, columns, grad


def _add_candidates_(grad: Tensor, rows: slice, columns: slice, saved: Saved, scale: Tensor) -> None:
    """Add the indirect term's gradient where it falls in this tile; elsewhere add zeros, so no size is read back."""
    row, column = saved.opener.unsqueeze(-1) - rows.start, saved.columns - columns.start
    inside = (row >= 0) & (row < grad.shape[0]) & (column >= 0) & (column < grad.shape[1])
    at = row.clamp(0, grad.shape[0] - 1).expand_as(column), column.clamp(0, grad.shape[1] - 1)
    grad.index_put_(at, torch.where(inside, saved.columns_grad * scale, 0), accumulate=True)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """A caller's autocast would round the heads' products after all."""
    return torch.autocast(tensor.device.type, enabled=False)


class Objective(torch.autograd.Function):
    """(loss_sum, metrics, num_sequences, a broken token) of a head's tensors."""

    @staticmethod
    def forward(ctx, call: Call, head: Head, *tensors: Tensor):
        with _full_precision(tensors[0]):
            saved, metrics, num_sequences, broken = evaluate(head.bind(*tensors), call)
        # The teacher's too: autograd frees what it saved with the backward, and finds what was changed before it.
        ctx.save_for_backward(*tensors)
        ctx.head, ctx.state, ctx.config = head.bind(*(t.new_empty(0) for t in tensors)), saved, call.objective.config
        config, (terms, extra) = call.objective.config, split_metrics(metrics)
        loss_sum = (
            config.direct_weight * terms.direct
            + config.indirect_kd_alpha * terms.indirect
            + config.entropy_weight * terms.entropy
            + sum(weight * value for weight, value in zip(config.extra_terms.values(), extra, strict=True))
        )
        ctx.mark_non_differentiable(metrics, num_sequences, broken)
        return loss_sum, metrics, num_sequences, broken

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad: Tensor, *_):
        head = ctx.head.bind(*ctx.saved_tensors)
        with _full_precision(loss_grad):
            part = _part(head, ctx.state.rows)
            grads = part.backward(gradient(part, ctx.state, ctx.config, loss_grad))
            grads = grads if part is head else head.spread(grads, ctx.state.rows)
        return None, None, *grads, *[None] * (len(head.tensors) - len(grads))
