"""The public functions: check the input, line the two vocabularies up, call the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_tsdkd.config.schema import TILE_LOGITS, ObjectiveConfig
from nemo_tsdkd.distributed.vocab_parallel import Group, Overlap, group_size, head_rows
from nemo_tsdkd.objective.check_input import check_keys, check_labels, check_mask, check_shapes, check_weight
from nemo_tsdkd.objective.function import Objective, split_metrics
from nemo_tsdkd.objective.heads import FusedHead, LogitsHead
from nemo_tsdkd.objective.observe import Call, Head
from nemo_tsdkd.objective.output import ObjectiveOutput, reported
from nemo_tsdkd.objective.resolve import ResolvedObjective, resolve_objective
from nemo_tsdkd.objective.seen import seen_tokens
from nemo_tsdkd.objective.sequences import SequenceLayout
from nemo_tsdkd.objective.tokens import KEY, SAMPLED


def tsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_mask: Tensor,
    config: ObjectiveConfig | ResolvedObjective,
    *,
    labels: Tensor | None = None,
    sequence_keys: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: Group = None,
    cp_group: Group = None,
    cu_seqlens: Tensor | None = None,
    overwrite_student_logits: bool = False,
    return_seen: bool = False,
) -> ObjectiveOutput:
    """Token-selective dual knowledge distillation (arXiv 2603.13260) of vocabulary-sharded logits.

    Every rank of `tp_group` and `cp_group` calls it and gets the same values. The gradient of a rank's logits is that
    of the whole loss with respect to this shard: no further reduction and no factor of a group's size belongs to it.

    Args:
        student_logits: [S, B, V_local], Megatron's layout; any float dtype. Computed in fp32, or fp64 where it is.
        teacher_logits: [S, B, V_local of the teacher]; its padded width may differ. Gets no gradient.
        response_mask: [S, B], true (or 1) where the position predicts a response token.
        config: the objective's fields; checked and their preset applied here, or once by `resolve_objective(config)`.
        labels: int [S, B], the id of the token that the position predicts: the sequence, one position to the left.
            Read at response positions, and only if a rule of `config` looks at the sampled tokens' probabilities.
        sequence_keys: int64, one for each of the call's sequences: rows, or packed ones. Read only if a rule of
            `config` draws from them (`distributed.counters.fold`).
        vocab_size: true token ids; columns from there on are padding, without probability and with zero gradient.
            None: all columns that both models have.
        tp_group: ranks that share the vocabulary; None for dense logits.
        cp_group: ranks that share the sequences in Megatron's zig-zag order; S is then this rank's part.
        cu_seqlens: int [sequences + 1], bounds of the sequences packed in the one row (B = 1), in tokens of the whole
            row, before context parallelism divides it.
        overwrite_student_logits: the backward writes the gradient over `student_logits` instead of a new tensor. Safe
            where nothing but this loss reads them once it ran; a second backward then raises.
        return_seen: also return what the objective sees at each response token, for two more passes over the logits.

    Raises:
        ValueError: shapes or dtypes that do not match, an empty batch, a mask that is none, a field of `config` out of
            its range or against its preset, an unknown rule, `labels` or `sequence_keys` that a rule needs and that are
            missing or wrong, `vocab_size` above the columns, rows or packed sequences that context parallelism cannot
            divide.
    """
    check_shapes(response_mask, student_logits=student_logits, teacher_logits=teacher_logits)
    vocab_size, overlap = _vocabulary(vocab_size, student_logits.shape[-1], teacher_logits.shape[-1], tp_group)
    objective = _resolved(config, vocab_size)
    call = _call(objective, response_mask, cu_seqlens, tp_group, cp_group, labels, sequence_keys, vocab_size)
    # Rows of tokens: a view in Megatron's layout.
    student, teacher = student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1)
    left, right = overlap.exchange([teacher[call.index, first:end].T for first, end in overlap.send], tp_group)
    head = LogitsHead(
        student=student,
        teacher=teacher,
        left=left.T,
        right=right.T,
        index=call.index,
        overlap=overlap,
        tile_logits=_tile_logits(objective.config, student),
        overwrite=overwrite_student_logits,
    )
    return _run(call, head, return_seen)


def tsdkd_loss_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    response_mask: Tensor,
    config: ObjectiveConfig | ResolvedObjective,
    *,
    labels: Tensor | None = None,
    sequence_keys: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: Group = None,
    cp_group: Group = None,
    cu_seqlens: Tensor | None = None,
    sequence_parallel: bool = False,
    return_seen: bool = False,
) -> ObjectiveOutput:
    """The same objective from final hidden states and output weights (`objective.head: fused`).

    Projects response tokens only and never holds a [tokens, V_local] tensor: logits are computed a block of columns
    at a time, and again in the backward. Gradients go to the student's hidden states and output weight, with the
    reduction over `tp_group` that Megatron's ColumnParallelLinear makes.

    Args:
        student_hidden: [S, B, H_s], or this rank's [S / TP, B, H_s] with `sequence_parallel`; after the final norm.
        student_weight: [V_local, H_s], this rank's rows of the output layer.
        teacher_hidden, teacher_weight: the teacher's; its hidden size and padded width may differ. Get no gradient.
        response_mask: [S, B], whole along the sequence also with `sequence_parallel`.
        labels: as in `tsdkd_loss`; whole along the sequence also with `sequence_parallel`.
        sequence_parallel: both models' hidden states are split along the sequence over `tp_group`.
        config, sequence_keys, vocab_size, tp_group, cp_group, cu_seqlens, return_seen: as in `tsdkd_loss`.

    Raises:
        ValueError: as in `tsdkd_loss`; sizes or dtypes of hidden states and weights that do not match.
    """
    split = group_size(tp_group) if sequence_parallel else 1
    check_shapes(response_mask, split, student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    check_weight("student", student_hidden, student_weight)
    check_weight("teacher", teacher_hidden, teacher_weight)
    vocab_size, overlap = _vocabulary(vocab_size, len(student_weight), len(teacher_weight), tp_group)
    objective = _resolved(config, vocab_size)
    call = _call(objective, response_mask, cu_seqlens, tp_group, cp_group, labels, sequence_keys, vocab_size)
    weight = teacher_weight.detach()
    left, right = overlap.exchange([weight[first:end] for first, end in overlap.send], tp_group)
    head = FusedHead(
        student=head_rows(student_hidden, call.index, tp_group, sequence_parallel),
        student_weight=student_weight,
        teacher=head_rows(teacher_hidden.detach(), call.index, tp_group, sequence_parallel),
        teacher_weight=(left, weight[slice(*overlap.own)], right),
        overlap=overlap,
        tile_logits=_tile_logits(objective.config, student_hidden),
    )
    return _run(call, head, return_seen)


def _tile_logits(config: ObjectiveConfig, tensor: Tensor) -> int:
    return config.tile_logits or TILE_LOGITS["cuda" if tensor.is_cuda else "cpu"]


def _resolved(config: ObjectiveConfig | ResolvedObjective, vocab_size: int) -> ResolvedObjective:
    objective = config if isinstance(config, ResolvedObjective) else resolve_objective(config)
    objective.config.validate_vocabulary(vocab_size)
    return objective


def _vocabulary(vocab_size: int | None, student_width: int, teacher_width: int, group: Group) -> tuple[int, Overlap]:
    common = group_size(group) * min(student_width, teacher_width)
    vocab_size = common if vocab_size is None else vocab_size
    if not 0 < vocab_size <= common:
        raise ValueError(f"vocab_size = {vocab_size}: must lie in 1 to {common}, the columns that both models have.")
    return vocab_size, Overlap.between(vocab_size, student_width, teacher_width, group)


def _call(
    objective: ResolvedObjective,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    tp_group: Group,
    cp_group: Group,
    labels: Tensor | None,
    sequence_keys: Tensor | None,
    vocab_size: int,
) -> Call:
    if cu_seqlens is not None and not objective.arithmetic.has_packed_form:
        raise ValueError(
            f"objective.preset = {objective.config.preset!r} with packed rows: its opener is one column of a batch of "
            "rows. Leave cu_seqlens out, or use preset paper."
        )
    mask = check_mask(mask)
    tokens = torch.ones_like(mask) if objective.arithmetic.trains_padding else mask
    index = tokens.flatten().nonzero().flatten()
    sequences = mask.shape[1] if cu_seqlens is None else len(cu_seqlens) - 1
    layout = SequenceLayout.of(mask, cu_seqlens, cp_group)
    return Call(
        objective=objective,
        mask=mask,
        index=index,
        layout=layout,
        tp_group=tp_group,
        labels=check_labels(labels, mask, index, vocab_size) if SAMPLED in objective.needs else None,
        sequence_keys=check_keys(sequence_keys, sequences, mask) if KEY in objective.needs else None,
    )


def _run(call: Call, head: Head, return_seen: bool) -> ObjectiveOutput:
    seen = seen_tokens(head, call) if return_seen else None
    loss_sum, values, num_sequences, broken = Objective.apply(call, head, *head.tensors)
    config = call.objective.config
    metrics, extra = split_metrics(values)
    count = metrics.response_tokens.long() if config.reduction == "token" else num_sequences
    divisor = count.clamp(min=1)
    named = metrics._asdict() | dict(zip(config.extra_terms, extra, strict=True))
    named = {name: named[name] for name in reported(config)}
    terms = {name: named[name] / divisor if name in named else None for name in ("direct", "indirect", "entropy")}
    return ObjectiveOutput(
        loss=loss_sum / divisor,
        loss_sum=loss_sum,
        num_sequences=num_sequences,
        count=count,
        broken=broken,
        metrics=named,
        seen=seen,
        **terms,
    )
