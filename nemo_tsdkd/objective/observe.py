"""What a call knows of its tokens before it chooses among them: statistics of the logits, put into whole sequences."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.distributed.vocab_parallel import Group, all_reduce, group_rank
from nemo_tsdkd.objective.heads import FusedHead, LogitsHead
from nemo_tsdkd.objective.passes import compute_dtype, passes, scaled_
from nemo_tsdkd.objective.resolve import ResolvedObjective
from nemo_tsdkd.objective.sequences import SequenceLayout
from nemo_tsdkd.objective.terms import SoftmaxSums, divergence
from nemo_tsdkd.objective.tokens import ASKED, DIVERGENCE, KEY, SAMPLED, Tokens

Head = LogitsHead | FusedHead


@dataclass(frozen=True)
class Call:
    """What a call computes and where: the objective, this rank's mask [S, B], n tokens (s * B + b), the groups.

    Attributes:
        labels: int64 [n], the id of the token that each of the n predicts; None where no rule needs it.
        sequence_keys: int64 [sequences of the call]; None where no rule needs it.
    """

    objective: ResolvedObjective
    mask: Tensor
    index: Tensor
    layout: SequenceLayout
    tp_group: Group
    labels: Tensor | None = None
    sequence_keys: Tensor | None = None


@dataclass(frozen=True)
class Observed:
    """Of a call's n tokens on this rank, and of whole sequences.

    Attributes:
        softmax: [2, n] each, student and teacher.
        entropies: [2, n].
        divergence_sums: [2, n]; None where no rule needs divergences.
        tokens, place: `SequenceLayout.gather`.
    """

    softmax: SoftmaxSums
    entropies: Tensor
    divergence_sums: Tensor | None
    tokens: Tokens
    place: Tensor


def observe(head: Head, call: Call, needs: Collection[str]) -> Observed:
    """Entropies, and what else is needed (keys of `tokens.ASKED`). Collective over TP and CP."""
    config = call.objective.config
    softmax, log_probabilities = softmax_sums(head, config, call.tp_group, call.labels if SAMPLED in needs else None)
    entropies, sums = softmax.entropy(), None
    values = dict(zip(("student_entropy", "teacher_entropy"), entropies, strict=True))
    if DIVERGENCE in needs:
        sums = divergence_sums(head, softmax, config, call.tp_group)
        values["divergence"] = divergence(config).value(sums)
    if log_probabilities is not None:
        values |= zip(ASKED[SAMPLED], log_probabilities, strict=True)
    tokens, place = call.layout.gather(call.mask, call.index, values)
    if KEY in needs:
        assert call.sequence_keys is not None
        tokens = replace(tokens, asked={**tokens.asked, "key": call.sequence_keys[tokens.sequence]})
    return Observed(softmax, entropies, sums, tokens, place)


def softmax_sums(
    head: Head, config: ObjectiveConfig, tp_group: Group, labels: Tensor | None = None
) -> tuple[SoftmaxSums, Tensor | None]:
    """Softmax sums of both models, [2, n] each, over the whole vocabulary: one pass and two packed reductions; and
    log-probabilities [2, n] of the tokens `labels` [n], which travel with the second reduction."""
    sums = SoftmaxSums.empty(head.student.new_empty((2, head.num_tokens), dtype=compute_dtype(head.student.dtype)))
    run = passes(config, head.student.device)
    sampled = sums.mass.new_zeros((0 if labels is None else 2, head.num_tokens))
    for rows, columns, logits in head.tiles():
        if labels is not None:
            own = labels[rows] - group_rank(tp_group) * head.padded_width - columns.start
            sampled[:, rows] += _logits_at(own, logits, config.temperature)
        parts = zip(*(run.softmax(z, run.temperature) for z in logits), strict=True)
        merged = sums.at(slice(None), rows).merge(SoftmaxSums(*map(torch.stack, parts)))
        for whole, part in zip(sums, merged, strict=True):
            whole[:, rows] = part
    peak = all_reduce(sums.peak.clone(), dist.ReduceOp.MAX, tp_group)
    sums = sums.seen_from(peak)
    reduced = all_reduce(torch.cat([sums.mass, sums.moment, sampled]), dist.ReduceOp.SUM, tp_group)
    softmax = SoftmaxSums(peak, reduced[:2], reduced[2:4])
    return softmax, None if labels is None else reduced[4:] - softmax.peak - softmax.mass.log()


def _logits_at(columns: Tensor, logits: list[Tensor], temperature: float) -> Tensor:
    """A tile's logits [2, n] at one column [n] of each row, over the temperature; 0 where the column lies outside."""
    inside = (columns >= 0) & (columns < logits[0].shape[-1])
    at = columns.clamp(0, logits[0].shape[-1] - 1).unsqueeze(-1)
    return torch.stack([torch.where(inside, scaled_(z.gather(-1, at).squeeze(-1), temperature), 0) for z in logits])


def divergence_sums(head: Head, softmax: SoftmaxSums, config: ObjectiveConfig, tp_group: Group) -> Tensor:
    """The divergence's sums over the whole vocabulary, [2, n]: a second pass and one reduction."""
    rule = divergence(config)
    sums = torch.zeros_like(softmax.mass)
    run = passes(config, head.student.device)
    for rows, _, logits in head.tiles():
        sums[:, rows] += run.divergence(rule, tuple(logits), of_models(softmax, rows), run.temperature)
    return all_reduce(sums, dist.ReduceOp.SUM, tp_group)


def of_models(softmax: SoftmaxSums, rows: slice) -> tuple[SoftmaxSums, ...]:
    return tuple(softmax.at(model, rows) for model in range(2))
