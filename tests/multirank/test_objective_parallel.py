"""The objective over tensor- and context-parallel ranks: values and every rank's gradient against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace

import objective_cases as cases
import pytest
import torch
import torch.distributed as dist
from objective_cases import Case
from ranks import run_ranks

from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss, tsdkd_loss_from_hidden
from nemo_tsdkd.objective.selection import RULES

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
PACKED = (0, 8, 12, 12, 32, 36)
EVEN_PACKED = (0, 8, 16, 16, 36, 40)

CASES = {
    **{name: Case(config) for name, config in cases.presets(top_k=5, chunk_tokens=2).items()},
    "student_wider": Case(student_padding=3, ties=True),
    "teacher_wider": Case(teacher_padding=14),
    "top_k_above_shard": Case(ObjectiveConfig(top_k=8, chunk_tokens=3), vocab_size=9, ties=True, teacher_padding=1),
    "empty_shard": Case(ObjectiveConfig(top_k=6, threshold=0.5), vocab_size=9, student_padding=1, scale=1.0),
    "packed": Case(steps=40, batch=1, cu_seqlens=EVEN_PACKED, student_padding=2),
    "no_response": Case(steps=8, batch=1, cu_seqlens=(0, 0, 8)),
}


def groups(tp: int, cp: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's tensor- and context-parallel group; tensor-parallel ranks are neighbours, as in Megatron."""
    ranks = range(tp * cp)
    tp_groups = [dist.new_group([r for r in ranks if r // tp == i]) for i in range(cp)]
    cp_groups = [dist.new_group([r for r in ranks if r % tp == i]) for i in range(tp)]
    return tp_groups[dist.get_rank() // tp], cp_groups[dist.get_rank() % tp]


def part(case: Case, tp_group, cp_group):
    """(rows, student width, teacher width, whole-row bounds) of this rank."""
    tp = tp_group.size()
    rows = cases.sequence_shard(case.steps, case.cu_seqlens, cp_group.rank(), cp_group.size())
    return rows, case.width(tp, case.student_padding), case.width(tp, case.teacher_padding)


def call_fields(case: Case, tp_group, cp_group) -> dict:
    cu_seqlens = torch.tensor(case.cu_seqlens) if case.cu_seqlens else None
    return {"vocab_size": case.vocab_size, "tp_group": tp_group, "cp_group": cp_group, "cu_seqlens": cu_seqlens}


def logits_errors(case: Case, dtype: torch.dtype, tp_group, cp_group) -> tuple[float, float]:
    """Errors of loss_sum and of this rank's gradient on the logits path."""
    tp, rank = tp_group.size(), tp_group.rank()
    rows, student_width, teacher_width = part(case, tp_group, cp_group)
    x = case.tensors(dtype)
    student = cases.vocab_shard(x["student"][rows], -1, student_width, rank, tp).requires_grad_()
    teacher = cases.vocab_shard(x["teacher"][rows], -1, teacher_width, rank, tp)
    out = tsdkd_loss(student, teacher, x["mask"][rows], case.config, **call_fields(case, tp_group, cp_group))
    out.loss_sum.backward()
    loss, grad = cases.expected(case, dtype)
    padded = torch.cat([grad, grad.new_zeros(*grad.shape[:2], tp * student_width - case.vocab_size)], -1)
    own = padded[rows].narrow(-1, rank * student_width, student_width)
    return cases.error(out.loss_sum.detach(), loss), float((student.grad - own).abs().max() / scale_of(grad))


def hidden_errors(case: Case, dtype: torch.dtype, tp_group, cp_group, sequence_parallel: bool) -> tuple[float, ...]:
    """Errors of loss_sum and of this rank's gradients of hidden states and weight on the fused path."""
    tp, rank = tp_group.size(), tp_group.rank()
    rows, student_width, teacher_width = part(case, tp_group, cp_group)
    mask = case.tensors(dtype)["mask"][rows]
    if sequence_parallel:
        rows = rows.chunk(tp)[rank]
    x = case.hidden(dtype)
    hidden = x["student_hidden"][rows].requires_grad_()
    weight = cases.vocab_shard(x["student_weight"], 0, student_width, rank, tp).requires_grad_()
    teacher_weight = cases.vocab_shard(x["teacher_weight"], 0, teacher_width, rank, tp)
    fields = call_fields(case, tp_group, cp_group) | {"sequence_parallel": sequence_parallel}
    teacher_hidden = x["teacher_hidden"][rows]
    out = tsdkd_loss_from_hidden(hidden, weight, teacher_hidden, teacher_weight, mask, case.config, **fields)
    out.loss_sum.backward()
    # The weights' gradient is a sum over tokens: data-parallel reduction adds the context-parallel parts.
    dist.all_reduce(weight.grad, group=cp_group)
    loss, hidden_grad, weight_grad = cases.expected_from_hidden(case, dtype)
    own = torch.cat([weight_grad, weight_grad.new_zeros(tp * student_width - case.vocab_size, weight_grad.shape[1])])
    own = own.narrow(0, rank * student_width, student_width)
    return (
        cases.error(out.loss_sum.detach(), loss),
        float((hidden.grad - hidden_grad[rows]).abs().max() / scale_of(hidden_grad)),
        float((weight.grad - own).abs().max() / scale_of(weight_grad)),
    )


def scale_of(grad: torch.Tensor) -> torch.Tensor:
    return grad.abs().max().clamp(min=1e-30)


def compare_all(tp: int, cp: int) -> dict[str, float]:
    """Worst error of this rank for each case, path and dtype, as a multiple of the dtype's tolerance."""
    tp_group, cp_group = groups(tp, cp)
    worst = {}
    for name, case in CASES.items():
        for dtype, tolerance in cases.TOLERANCE.items():
            errors = {"logits": logits_errors(case, dtype, tp_group, cp_group)}
            for sp in (False, True):
                errors[f"hidden sp={sp}"] = hidden_errors(case, dtype, tp_group, cp_group, sp)
            worst |= {f"{name} {path} {dtype}": max(e) / tolerance for path, e in errors.items()}
    return worst


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_every_rank_has_the_oracles_value_and_gradient_slice(tp, cp):
    for rank, worst in enumerate(run_ranks(compare_all, tp * cp, tp, cp)):
        failed = {name: e for name, e in worst.items() if not e < 1}
        assert not failed, f"rank {rank}: errors in multiples of the tolerance: {failed}"


def rule_differences(tp: int, cp: int) -> dict[str, float]:
    """Each registered rule in each place: this rank's loss against the same call on whole tensors."""
    tp_group, cp_group = groups(tp, cp)
    differences = {}
    for place in ("opener_rule", "entropy_rule", "gate_rule"):
        for name in RULES:
            config = replace(ObjectiveConfig(top_k=5, threshold=0.4), **{place: name})
            for bounds in (None, EVEN_PACKED):
                case = Case(config, steps=40, batch=1 if bounds else 3, cu_seqlens=bounds, ties=True)
                x = case.tensors(torch.float64)
                cu_seqlens = torch.tensor(bounds) if bounds else None
                whole = tsdkd_loss(x["student"], x["teacher"], x["mask"], config, cu_seqlens=cu_seqlens)
                rows, width, _ = part(case, tp_group, cp_group)
                student, teacher = (
                    cases.vocab_shard(x[model][rows], -1, width, tp_group.rank(), tp)
                    for model in ("student", "teacher")
                )
                fields = call_fields(case, tp_group, cp_group)
                out = tsdkd_loss(student, teacher, x["mask"][rows], config, **fields)
                for key, value in whole.metrics.items():
                    differences[f"{place}={name} packed={bounds is not None} {key}"] = cases.error(
                        out.metrics[key], value
                    )
    return differences


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS[1:])
def test_every_rule_chooses_the_same_tokens_in_every_layout(tp, cp):
    for differences in run_ranks(rule_differences, tp * cp, tp, cp):
        assert len(differences) == 3 * len(RULES) * 2 * 9
        assert max(differences.values()) < 1e-12, {k: v for k, v in differences.items() if v >= 1e-12}


def collectives(path: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(name, bytes sent by this rank) of each collective in the forward and in the backward of one call at TP 2."""
    case = Case(ObjectiveConfig(top_k=3, chunk_tokens=1), student_padding=1)
    group, tp = dist.group.WORLD, dist.get_world_size()
    mask = case.tensors(torch.float32)["mask"]
    if path == "logits":
        x, dim, call = case.tensors(torch.float32), -1, tsdkd_loss
        names = ["student", "teacher"]
    else:
        x, dim, call = case.hidden(torch.float32), 0, tsdkd_loss_from_hidden
        names = ["student_weight", "teacher_weight"]
    width = case.width(tp, case.student_padding)
    tensors = [cases.vocab_shard(x[name], dim, width, group.rank(), tp).requires_grad_() for name in names]
    if path == "hidden":
        student_hidden = x["student_hidden"].requires_grad_()
        tensors = [student_hidden, tensors[0], x["teacher_hidden"], tensors[1]]
    phases = []
    with torch.profiler.profile(record_shapes=True) as forward:
        loss = call(*tensors, mask, case.config, vocab_size=case.vocab_size, tp_group=group).loss_sum
    with torch.profiler.profile(record_shapes=True) as backward:
        loss.backward()
    for profile in (forward, backward):
        events = [e for e in profile.events() if e.name.startswith("c10d::")]
        phases.append([(e.name, largest_input(e)) for e in events])
    return phases[0], phases[1]


def largest_input(event) -> int:
    return max((torch.Size(shape).numel() for shape in event.input_shapes if shape), default=0)


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_collectives_are_as_many_as_documented(path):
    print(run_ranks(collectives, 2, path))
