"""Extreme logits give finite losses and gradients; broken ones are never hidden."""

import math

import objective_cases as cases
import oracle
import pytest
import torch
from objective_cases import Case

from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss, tsdkd_loss_from_hidden

CONFIGS = cases.presets(top_k=4, threshold=0.4)
INF = float("inf")


def one_hot(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == x.amax(-1, keepdim=True), 1e4, -1e4)


def with_dead_columns(x: torch.Tensor) -> torch.Tensor:
    return x.index_fill(-1, torch.tensor([0, 7, 40]), -INF)


EXTREMES = {
    "large": lambda s, t: (s.sign() * 1e4, t.sign() * 1e4),
    "one_hot": lambda s, t: (one_hot(s), one_hot(t)),
    "one_hot_student": lambda s, t: (one_hot(s), t),
    "identical": lambda s, t: (s, s.clone()),
    "identical_one_hot": lambda s, t: (one_hot(s), one_hot(s)),
    "dead_columns": lambda s, t: (with_dead_columns(s), with_dead_columns(t)),
    "dead_in_teacher": lambda s, t: (s, with_dead_columns(t)),
    "dead_below_top_k": lambda s, t: (s.index_fill(-1, torch.arange(2, 41), -INF), t),
    "uniform": lambda s, t: (s * 0, t * 0),
}


def call(student, teacher, config, mask=None):
    student = student.clone().requires_grad_()
    mask = torch.ones(student.shape[:2], dtype=torch.bool) if mask is None else mask
    labels = torch.zeros_like(mask, dtype=torch.int64)  # where columns are dead, this one is
    out = tsdkd_loss(student, teacher, mask, config, labels=labels, sequence_keys=torch.arange(mask.shape[1]))
    out.loss.backward()
    return out, student.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_extreme_logits_stay_finite(name, extreme, dtype):
    excluded = {"dead_in_teacher": ("reverse_kl", "beta_1", "sampled"), "dead_below_top_k": ("forward_kl", "beta_0")}
    infinite = name in excluded.get(extreme, ())
    x = Case().tensors(torch.float64)
    student, teacher = (z.to(dtype) for z in EXTREMES[extreme](x["student"], x["teacher"]))
    out, grad = call(student, teacher, CONFIGS[name])
    assert out.loss.isinf() if infinite else out.loss.isfinite()
    if infinite:  # at the first token; where a random share is trained, at its first one
        sequence, position = out.broken.tolist()
        assert sequence == 0 and (position == 0 or name == "sampled")
        return
    assert grad.dtype == dtype and grad.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())
    assert out.broken.tolist() == [-1, -1]


@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_columns_of_minus_infinity_are_as_if_absent(dead):
    """A divergence stays what it was on the other columns; their gradient is zero."""
    case = Case(ObjectiveConfig(top_k=4))
    x = case.tensors(torch.float64)
    student = with_dead_columns(x["student"]) if dead != "teacher" else x["student"]
    teacher = with_dead_columns(x["teacher"]) if dead != "student" else x["teacher"]
    out, grad = call(student, teacher, case.config)
    mask = torch.ones(case.steps, case.batch, dtype=torch.bool)
    kept = (
        [v for v in range(case.vocab_size) if v not in (0, 7, 40)] if dead == "both" else list(range(case.vocab_size))
    )
    z = torch.where(student == -INF, -700.0, student)[..., kept].requires_grad_()
    t = torch.where(teacher == -INF, -700.0, teacher)[..., kept]
    loss = oracle.loss_sum(z, t, mask, case.config, len(kept))
    loss.backward()
    assert cases.error(out.loss_sum.detach(), loss.detach()) < 1e-10
    assert cases.error(grad[..., kept], z.grad / case.batch) < 1e-10


@pytest.mark.parametrize("probability", [0.5, 1e-38], ids=["likely", "unlikely"])
@pytest.mark.parametrize(("preset", "excluding"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_a_divergence_that_is_infinite_is_so_and_names_its_token(preset, excluding, probability):
    """One model excludes a token to which the other gives a probability, at one position of the second sequence."""
    case = Case(ObjectiveConfig(preset=preset), longest_prompt=0)
    x = case.tensors(torch.float32)
    needing = "teacher" if excluding == "student" else "student"
    position = int(x["mask"][:, 1].nonzero()[2])
    x[excluding][position, 1, 5] = -INF
    x[needing][position, 1] = 0.0
    x[needing][position, 1, 5] = math.log(probability * 40)
    out, _ = call(x["student"], x["teacher"], case.config, x["mask"])
    assert out.loss == INF and out.broken.tolist() == [1, position]
    x["mask"][position, 1] = False
    out, grad = call(x["student"], x["teacher"], case.config, x["mask"])
    assert out.loss.isfinite() and grad.isfinite().all() and out.broken.tolist() == [-1, -1]


def test_packed_sequences_name_a_broken_token_by_sequence_and_position():
    case = Case(steps=24, batch=1, cu_seqlens=(0, 10, 10, 20, 24), longest_prompt=0)
    x = case.tensors(torch.float32)
    x["mask"][13] = True
    x["teacher"][13, 0, 3] = float("nan")
    out = tsdkd_loss(x["student"], x["teacher"], x["mask"], case.config, cu_seqlens=torch.tensor(case.cu_seqlens))
    assert out.loss.isnan() and out.broken.tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    """Against the oracle on the same rounded logits: only the returned gradient is rounded."""
    case = Case(ObjectiveConfig(top_k=5, threshold=0.4), ties=True)
    x = case.tensors(dtype)
    out, grad = call(x["student"], x["teacher"], case.config, x["mask"])
    loss, expected = cases.expected(case, dtype)
    assert out.loss.dtype == torch.float32
    assert cases.error(out.loss_sum.detach(), loss) < 1e-5
    assert cases.error(grad, expected / 2) < torch.finfo(dtype).eps


@pytest.mark.parametrize("preset", ["paper", "reference", "gkd"])
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_broken_logits_of_a_response_surface(bad, model, preset):
    x = Case(longest_prompt=0).tensors(torch.float32)
    x[model][0, 0, 3] = bad
    assert call(x["student"], x["teacher"], ObjectiveConfig(preset=preset), x["mask"])[0].loss.isnan()


def test_a_row_without_any_probability_surfaces():
    x = Case(longest_prompt=0).tensors(torch.float32)
    x["student"][0, 0] = -INF
    assert call(x["student"], x["teacher"], ObjectiveConfig(), x["mask"])[0].loss.isnan()


def test_broken_logits_outside_the_response_are_not_read():
    x = Case().tensors(torch.float32)
    expected, _ = call(x["student"], x["teacher"], ObjectiveConfig(), x["mask"])
    for model in ("student", "teacher"):
        x[model][~x["mask"]] = float("nan")
    out, grad = call(x["student"], x["teacher"], ObjectiveConfig(), x["mask"])
    assert torch.equal(out.loss, expected.loss) and grad.isfinite().all()


def test_a_callers_autocast_rounds_nothing():
    x, mask = Case().hidden(torch.float32), Case().tensors(torch.float32)["mask"]
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    found = []
    for enabled in (False, True):
        inputs = [x[name].clone().requires_grad_(name.startswith("student")) for name in names]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = tsdkd_loss_from_hidden(*inputs, mask, ObjectiveConfig()).loss
            loss.backward()
        found.append((loss.detach(), inputs[0].grad, inputs[1].grad))
    assert all(map(torch.equal, *found))
