"""The objective over tensor- and context-parallel ranks: values and every rank's gradient against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace

import objective_cases as cases
import pytest
import torch
import torch.distributed as dist
from objective_cases import Case
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss, tsdkd_loss_from_hidden
from nemo_tsdkd.objective.rules import RULES

LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]  # one process: tests/unit/test_objective.py
PACKED = (0, 8, 12, 12, 32, 36)
EVEN_PACKED = (0, 8, 16, 16, 36, 40)

CASES = {
    **{name: Case(config) for name, config in cases.presets(top_k=5, tile_logits=70).items()},
    "student_wider": Case(student_padding=3, ties=True),
    "teacher_wider": Case(teacher_padding=14),
    "top_k_above_shard": Case(ObjectiveConfig(top_k=8, tile_logits=27), vocab_size=9, ties=True, teacher_padding=1),
    "empty_shard": Case(ObjectiveConfig(top_k=6, threshold=0.5), vocab_size=9, student_padding=1, scale=1.0),
    "equal_entropies": Case(ObjectiveConfig(top_k=5, threshold=0.5), vocab_size=151, permuted=True, ties=True),
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
    groups = {"tp_group": tp_group, "cp_group": cp_group}
    rows, *_ = part(case, tp_group, cp_group)
    return {"vocab_size": case.vocab_size, "cu_seqlens": cu_seqlens} | groups | case.asked(rows)


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
            worst |= {f"{name} {path} {dtype}": torch.tensor(e).max().item() / tolerance for path, e in errors.items()}
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
                asked = {"cu_seqlens": cu_seqlens, "return_seen": True} | case.asked()
                whole = tsdkd_loss(x["student"], x["teacher"], x["mask"], config, **asked)
                rows, width, _ = part(case, tp_group, cp_group)
                student, teacher = (
                    cases.vocab_shard(x[model][rows], -1, width, tp_group.rank(), tp)
                    for model in ("student", "teacher")
                )
                fields = call_fields(case, tp_group, cp_group) | {"return_seen": True}
                out = tsdkd_loss(student, teacher, x["mask"][rows], config, **fields)
                found = out.metrics | {f"seen.{key}": value for key, value in vars(out.seen).items()}
                expected = whole.metrics | {f"seen.{key}": value for key, value in vars(whole.seen).items()}
                for key, value in expected.items():
                    differences[f"{place}={name} packed={bounds is not None} {key}"] = cases.error(
                        found[key].double(), value.double()
                    )
    return differences


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_every_rule_chooses_the_same_tokens_in_every_layout(tp, cp):
    for differences in run_ranks(rule_differences, tp * cp, tp, cp):
        assert len(differences) == 3 * len(RULES) * 2 * (9 + 7)
        too_large = {k: v for k, v in differences.items() if not v < 1e-12}
        assert not too_large


class Collectives(TorchDispatchMode):
    """Records (operation, elements this rank gives) of every collective, whoever calls it."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[0][0] if func.__name__.startswith("allreduce") else args[1]
            self.seen.append((func.__name__.split(".")[0], given.numel()))
        return func(*args, **(kwargs or {}))


CONFIG = ObjectiveConfig(top_k=3, tile_logits=35, threshold=0.2)
ASKING = replace(CONFIG, gate_rule="importance_weight", entropy_rule="tip")
COUNTED = {
    "even": Case(CONFIG, steps=32, batch=1),
    "uneven": Case(CONFIG, steps=32, batch=1, teacher_padding=1),
    "asking": Case(ASKING, steps=32, batch=1),
}


def count_collectives(name: str, path: str) -> tuple[list, list, int]:
    """Collectives of the forward and of the backward, and the opener's tokens."""
    case, group, tp, rank = COUNTED[name], dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x = case.tensors(torch.float32) | case.hidden(torch.float32)
    width, wide = case.width(tp, case.student_padding), case.width(tp, case.teacher_padding)
    fields = {"vocab_size": case.vocab_size, "tp_group": group} | case.asked()
    if path == "logits":
        call = tsdkd_loss
        student = [cases.vocab_shard(x["student"], -1, width, rank, tp).requires_grad_()]
        teacher = [cases.vocab_shard(x["teacher"], -1, wide, rank, tp)]
    else:
        call, fields["sequence_parallel"] = tsdkd_loss_from_hidden, path == "sequence_parallel"
        rows = slice(None) if path == "hidden" else slice(rank * case.steps // tp, (rank + 1) * case.steps // tp)
        weight = cases.vocab_shard(x["student_weight"], 0, width, rank, tp).requires_grad_()
        student = [x["student_hidden"][rows].requires_grad_(), weight]
        teacher = [x["teacher_hidden"][rows], cases.vocab_shard(x["teacher_weight"], 0, wide, rank, tp)]
    with Collectives() as forward:
        out = call(*student, *teacher, x["mask"], case.config, **fields)
    with Collectives() as backward:
        out.loss_sum.backward()
    opener = round(float(out.metrics["opener_fraction"] * out.metrics["response_tokens"]))
    return forward.seen, backward.seen, opener


def count_all() -> dict[tuple[str, str], tuple[list, list, int]]:
    paths = ("logits", "hidden", "sequence_parallel")
    return {(name, path): count_collectives(name, path) for name in COUNTED for path in paths}


def test_collectives_are_as_many_and_as_large_as_docs_math_states():
    counted = [(rank, *key, *seen) for rank, each in enumerate(run_ranks(count_all, 2)) for key, seen in each.items()]
    assert len(counted) == 18
    for rank, name, path, forward, backward, m in counted:
        case = COUNTED[name]
        n, hidden = int(case.tensors(torch.float32)["mask"].sum()), case.steps * case.student_size
        assert 1 < m < n / 2
        asks = name == "asking"
        candidates = [("_allgather_base_", 2 * m * case.config.top_k)]  # of the opener
        divergence = [
            ("allreduce_", 2 * n)
        ]  # its two sums; before the choice where a rule looks at it, and never twice
        objective = [
            ("allreduce_", 2 * n),  # maxima of both models
            ("allreduce_", 6 * n if asks else 4 * n),  # masses and moments of both models; logits of the sampled token
            *(divergence + candidates if asks else candidates + divergence),
        ]
        # The vocabulary's 41 ids are 21 + 20 in the student's shards and 22 + 19 in the teacher's: one column moves.
        edge = n if path == "logits" else case.teacher_size
        before = [("alltoall_base_", edge * (rank == 0))] if name == "uneven" else []
        after = [] if path == "logits" else [("allreduce_", n * case.student_size)]
        if path == "sequence_parallel":
            before += [("_allgather_base_", hidden // 2), ("_allgather_base_", case.steps * case.teacher_size // 2)]
            after = [("_reduce_scatter_base_", hidden)]
        assert forward == before + objective
        assert backward == after


def count_over_context(config: ObjectiveConfig) -> tuple[list, list]:
    """Collectives of the forward and of the backward where two ranks share the sequences alone."""
    case, group = Case(config), dist.group.WORLD
    rows = cases.sequence_shard(case.steps, None, group.rank(), 2)
    x = case.tensors(torch.float32)
    with Collectives() as forward:
        out = tsdkd_loss(
            x["student"][rows].requires_grad_(),
            x["teacher"][rows],
            x["mask"][rows],
            case.config,
            cp_group=group,
            **case.asked(rows),
        )
    with Collectives() as backward:
        out.loss_sum.backward()
    return forward.seen, backward.seen


def count_both_over_context() -> list[tuple[list, list]]:
    return [count_over_context(config) for config in (ObjectiveConfig(), ASKING)]


def test_context_parallel_collectives_are_those_that_docs_math_states():
    case = Case()
    for counted in run_ranks(count_both_over_context, 2):
        for numbers, (forward, backward) in zip((4, 7), counted, strict=True):
            assert forward == [("_allgather_base_", numbers * case.steps * case.batch // 2), ("allreduce_", 9)]
            assert backward == []
