"""Bad input of the public functions is one ValueError that names what is wrong."""

import pytest
import torch

from nemo_tsdkd.objective import ObjectiveConfig, resolve_objective, tsdkd_loss, tsdkd_loss_from_hidden

STUDENT, TEACHER, MASK = torch.zeros(8, 2, 12), torch.zeros(8, 2, 16), torch.ones(8, 2, dtype=torch.bool)
HIDDEN, WEIGHT = torch.zeros(8, 2, 4), torch.zeros(12, 4)
LOGITS_ERRORS = {
    "mask": ({"response_mask": MASK[:, 0]}, r"response_mask has shape \(8,\): must be \[S, B\]"),
    "teacher": ({"teacher_logits": TEACHER[:7]}, r"teacher_logits has shape \(7, 2, 16\): must be \[8, 2, size\]"),
    "student": ({"student_logits": STUDENT[0]}, r"student_logits has shape \(2, 12\)"),
    "vocab_size": ({"vocab_size": 13}, "vocab_size = 13: the models have 12 columns in common"),
    "top_k": ({"config": ObjectiveConfig(top_k=11), "vocab_size": 10}, r"objective.top_k = 11: must not exceed"),
    "top_k_default": ({"config": ObjectiveConfig(top_k=13)}, r"objective.top_k = 13: must not exceed"),
    "beta": ({"config": ObjectiveConfig(beta=1.5)}, r"objective.beta = 1.5: must lie in \[0, 1\]"),
    "rule": ({"config": ObjectiveConfig(opener_rule="first")}, "objective.opener_rule = 'first'"),
    "packed_batch": ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens with 2 rows: a packed call holds one row"),
}


@pytest.mark.parametrize("name", LOGITS_ERRORS)
def test_tsdkd_loss_refuses(name):
    given, message = LOGITS_ERRORS[name]
    fields = {"student_logits": STUDENT, "teacher_logits": TEACHER, "response_mask": MASK, "config": ObjectiveConfig()}
    with pytest.raises(ValueError, match=message):
        tsdkd_loss(**(fields | given))


@pytest.mark.parametrize("bounds", [[1, 8], [0, 7], [0, 5, 3, 8]])
def test_packed_bounds_must_cover_the_row(bounds):
    with pytest.raises(ValueError, match="must rise from 0 to the row's length"):
        rows = (x[:, :1] for x in (STUDENT, TEACHER, MASK))
        tsdkd_loss(*rows, ObjectiveConfig(), cu_seqlens=torch.tensor(bounds))


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


def test_the_fused_head_checks_hidden_states_and_weights():
    config = ObjectiveConfig()
    with pytest.raises(ValueError, match=r"teacher_weight has shape \(12, 4\): must be \[V_local, 5\]"):
        tsdkd_loss_from_hidden(HIDDEN, WEIGHT, torch.zeros(8, 2, 5), WEIGHT, MASK, config)
    with pytest.raises(ValueError, match=r"student_hidden has shape \(4, 2, 4\): must be \[8, 2, size\]"):
        tsdkd_loss_from_hidden(HIDDEN[:4], WEIGHT, HIDDEN, WEIGHT, MASK, config)
