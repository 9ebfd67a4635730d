"""Bad input of the public functions is one ValueError that names what is wrong."""

import math

import pytest
import torch

from nemo_tsdkd.objective import ObjectiveConfig, resolve_objective, tsdkd_loss, tsdkd_loss_from_hidden

STUDENT, TEACHER, MASK = torch.zeros(8, 2, 12), torch.zeros(8, 2, 16), torch.ones(8, 2, dtype=torch.bool)
HIDDEN, WEIGHT = torch.zeros(8, 2, 4), torch.zeros(12, 4)
LIFT = torch.arange(16.0)  # so that the models differ
ROWS = {"student_logits": STUDENT, "teacher_logits": TEACHER, "response_mask": MASK}
LOGITS_ERRORS = {
    "mask": ({"response_mask": MASK[:, 0]}, r"response_mask has shape \(8,\): must be \[S, B\]"),
    "teacher": ({"teacher_logits": TEACHER[:7]}, r"teacher_logits has shape \(7, 2, 16\): must be \[8, 2, size\]"),
    "student": ({"student_logits": STUDENT[0]}, r"student_logits has shape \(2, 12\)"),
    "vocab_size": ({"vocab_size": 13}, "vocab_size = 13: must lie in 1 to 12"),
    "top_k": ({"config": ObjectiveConfig(top_k=11), "vocab_size": 10}, r"objective.top_k = 11: must not exceed"),
    "top_k_default": ({"config": ObjectiveConfig(top_k=13)}, r"objective.top_k = 13: must not exceed"),
    "beta": ({"config": ObjectiveConfig(beta=1.5)}, r"objective.beta = 1.5: must lie in \[0, 1\]"),
    "rule": ({"config": ObjectiveConfig(opener_rule="first")}, "objective.opener_rule = 'first'"),
    "empty_batch": (
        {name: x[:, :0] for name, x in ROWS.items()},
        r"response_mask has shape \(8, 0\): must be \[S, B\]",
    ),
    "empty_sequence": (
        {name: x[:0] for name, x in ROWS.items()},
        r"response_mask has shape \(0, 2\): must be \[S, B\]",
    ),
    "labels": ({"response_mask": torch.tensor([[-100, 7]] * 8)}, "response_mask holds values from -100 to 7: must be"),
    "whole_numbers": (
        {"teacher_logits": TEACHER.long()},
        "teacher_logits has dtype torch.int64: must be floating-point",
    ),
    "no_vocabulary": ({"vocab_size": 0}, "vocab_size = 0: must lie in 1 to 12"),
    "top_k_type": ({"config": ObjectiveConfig(top_k=4.0)}, "objective.top_k = 4.0: must be of type int"),
    "beta_type": ({"config": ObjectiveConfig(beta="0.9")}, "objective.beta = '0.9': must be of type float"),
    "boolean": ({"config": ObjectiveConfig(top_k=True)}, "objective.top_k = True: must be of type int"),
    "temperature": ({"config": ObjectiveConfig(temperature=math.inf)}, "objective.temperature = inf: must be finite"),
    "alpha": (
        {"config": ObjectiveConfig(indirect_kd_alpha=math.inf)},
        "objective.indirect_kd_alpha = inf: must be finite",
    ),
    "preset": (
        {"config": ObjectiveConfig(preset="gkd", entropy_weight=0.5)},
        "objective.entropy_weight = 0.5: objective.preset = gkd sets it to 0.0",
    ),
    "reduction": (
        {"config": ObjectiveConfig(preset="reference", reduction="token")},
        "objective.reduction = 'token': objective.preset = reference sets it to sequence",
    ),
    "no_reduction": ({"config": ObjectiveConfig(reduction="batch")}, "objective.reduction = 'batch': must be one of"),
    "no_labels": (
        {"config": ObjectiveConfig(gate_rule="importance_weight")},
        r"labels = None: a rule of the configuration looks at the probability of each response token. Pass labels",
    ),
    "labels_shape": (
        {"config": ObjectiveConfig(gate_rule="importance_weight"), "labels": MASK.long()[:7]},
        r"labels have shape \(7, 2\) and dtype torch.int64: must be integers of shape \(8, 2\), as response_mask",
    ),
    "labels_type": (
        {"config": ObjectiveConfig(gate_rule="importance_weight"), "labels": MASK},
        r"labels have shape \(8, 2\) and dtype torch.bool: must be integers",
    ),
    "labels_range": (
        {"config": ObjectiveConfig(gate_rule="importance_weight"), "labels": 12 * MASK.long()},
        "labels hold ids from 12 to 12 where response_mask is true: must lie in 0 to 11, the vocabulary",
    ),
    "no_keys": (
        {"config": ObjectiveConfig(opener_rule="random_share")},
        "sequence_keys = None: a rule of the configuration draws tokens at random. Pass one int64 key",
    ),
    "keys": (
        {"config": ObjectiveConfig(opener_rule="random_share"), "sequence_keys": torch.arange(3)},
        r"sequence_keys have shape \(3,\) and dtype torch.int64: must be int64 of shape \(2,\)",
    ),
    "prefix": ({"config": ObjectiveConfig(prefix_tokens=0)}, "objective.prefix_tokens = 0: must be greater than 0"),
    "gamma": ({"config": ObjectiveConfig(iw_gamma=-0.5)}, "objective.iw_gamma = -0.5: must not be negative"),
    "tip": ({"config": ObjectiveConfig(tip_fraction=1.5)}, r"objective.tip_fraction = 1.5: must lie in \[0, 1\]"),
    "random": ({"config": ObjectiveConfig(random_fraction=-1.0)}, r"objective.random_fraction = -1.0: must lie in"),
    "packed_batch": ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens with 2 rows: a packed call holds one row"),
}


@pytest.mark.parametrize("name", LOGITS_ERRORS)
def test_tsdkd_loss_refuses(name):
    given, message = LOGITS_ERRORS[name]
    fields = {"student_logits": STUDENT, "teacher_logits": TEACHER, "response_mask": MASK, "config": ObjectiveConfig()}
    with pytest.raises(ValueError, match=message):
        tsdkd_loss(**(fields | given))


@pytest.mark.parametrize("bounds", [[1, 8], [0, 7], [0, 5, 3, 8], [0]])
def test_packed_bounds_must_cover_the_row(bounds):
    with pytest.raises(ValueError, match="must rise from 0 to the row's length"):
        rows = (x[:, :1] for x in (STUDENT, TEACHER, MASK))
        tsdkd_loss(*rows, ObjectiveConfig(), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize(
    "bounds", [[0, 8], torch.tensor([]), torch.tensor([0.0, 8.0]), torch.tensor([[0, 8]])], ids=str
)
def test_packed_bounds_are_a_tensor_of_integers(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens = .*: must be a tensor of integers \[sequences \+ 1\]"):
        rows = (x[:, :1] for x in (STUDENT, TEACHER, MASK))
        tsdkd_loss(*rows, ObjectiveConfig(), cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_of_zeros_and_ones_is_the_boolean_one(dtype):
    mask = torch.arange(16).view(8, 2) % 3 == 0
    losses = [tsdkd_loss(STUDENT, TEACHER + LIFT, m, ObjectiveConfig()).loss for m in (mask, mask.to(dtype))]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("preset", ["gkd", "forward_kl", "reverse_kl"])
def test_a_preset_without_candidates_has_no_least_vocabulary(preset):
    loss = tsdkd_loss(STUDENT, TEACHER + LIFT, MASK, ObjectiveConfig(preset=preset, top_k=10), vocab_size=3).loss
    assert loss > 0


def test_the_reference_preset_has_no_packed_form():
    with pytest.raises(ValueError, match=r"objective.preset = 'reference' with packed rows"):
        rows = (x[:, :1] for x in (STUDENT, TEACHER, MASK))
        tsdkd_loss(*rows, ObjectiveConfig(preset="reference"), cu_seqlens=torch.tensor([0, 8]))


def test_a_resolved_objective_is_checked_once_for_all_calls(monkeypatch):
    config = ObjectiveConfig(preset="reference", top_k=4)
    resolved, expected = resolve_objective(config), tsdkd_loss(STUDENT, TEACHER, MASK, config)
    with pytest.raises(ValueError, match=r"objective.top_k = 4: must not exceed the vocabulary \(3 tokens\)"):
        tsdkd_loss(STUDENT, TEACHER, MASK, resolved, vocab_size=3)  # the vocabulary is the call's, not the objective's
    monkeypatch.setattr(ObjectiveConfig, "validate", lambda self: pytest.fail("checked again"))
    assert tsdkd_loss(STUDENT, TEACHER, MASK, resolved).metrics == expected.metrics


def test_the_fused_head_asks_for_what_a_rule_looks_at():
    for config, message in (
        (ObjectiveConfig(gate_rule="importance_weight"), "labels = None: a rule"),
        (ObjectiveConfig(gate_rule="random_share"), "sequence_keys = None: a rule"),
    ):
        with pytest.raises(ValueError, match=message):
            tsdkd_loss_from_hidden(HIDDEN, WEIGHT, HIDDEN, WEIGHT, MASK, config)


def test_the_fused_head_checks_hidden_states_and_weights():
    config = ObjectiveConfig()
    with pytest.raises(ValueError, match=r"teacher_weight has shape \(12, 4\): must be \[V_local, 5\]"):
        tsdkd_loss_from_hidden(HIDDEN, WEIGHT, torch.zeros(8, 2, 5), WEIGHT, MASK, config)
    with pytest.raises(ValueError, match=r"student_hidden has shape \(4, 2, 4\): must be \[8, 2, size\]"):
        tsdkd_loss_from_hidden(HIDDEN[:4], WEIGHT, HIDDEN, WEIGHT, MASK, config)
    for model in ("student", "teacher"):
        weights = {"student_weight": WEIGHT, "teacher_weight": WEIGHT} | {f"{model}_weight": WEIGHT.bfloat16()}
        fields = {"student_hidden": HIDDEN, "teacher_hidden": HIDDEN, "response_mask": MASK, "config": config}
        with pytest.raises(
            ValueError, match=rf"{model}_weight has dtype torch.bfloat16: must be that of {model}_hidden"
        ):
            tsdkd_loss_from_hidden(**fields, **weights)
