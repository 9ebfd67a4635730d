"""What the objective says it saw of each token, against the definitions; and the text of each token."""

from dataclasses import replace

import objective_cases as cases
import oracle
import pytest
import torch
from objective_cases import Case

from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss, tsdkd_loss_from_hidden

CONFIG = ObjectiveConfig(top_k=5, threshold=0.4, entropy_fraction=0.3, temperature=0.8, gate_temperature=0.5)


def expected(z, t, config) -> dict[str, list]:
    """By the oracle, of one response's logits [L, V]."""
    log_s, log_t = ((x / config.temperature).double().log_softmax(-1) for x in (z, t))
    h_s, h_t = oracle.entropy(log_s), oracle.entropy(log_t)
    opener = oracle.opener_length(h_s.tolist(), config.threshold)
    chosen = oracle.uncertain_positions(h_s.tolist(), config.entropy_fraction)
    return {
        "student_entropy": h_s,
        "teacher_entropy": h_t,
        "gate": torch.sigmoid((h_s - h_t) / config.gate_temperature),
        "opener": [i < opener for i in range(len(z))],
        "uncertain": [i in chosen for i in range(len(z))],
        "divergence": oracle.jsd(log_s, log_t, config.beta),
    }


@pytest.mark.parametrize("dtype", cases.TOLERANCE)
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_each_column_is_the_oracles(reduction, dtype):
    case = Case(replace(CONFIG, reduction=reduction), steps=20, student_padding=2)
    x = case.tensors(dtype)
    out = tsdkd_loss(x["student"], x["teacher"], x["mask"], case.config, return_seen=True)
    compared = 0
    for row in range(case.batch):
        mine = x["mask"][:, row]
        found = out.seen.of_sequence(row)
        if not mine.any():
            assert all(column == [] for column in found.values())
            continue
        for name, column in expected(x["student"][mine, row], x["teacher"][mine, row], case.config).items():
            if name in ("opener", "uncertain"):
                assert found[name] == column and any(column) and not all(column)
            else:
                assert found[name] == pytest.approx(column.tolist(), abs=cases.TOLERANCE[dtype])
        compared += 1
    assert compared == 2
    without = tsdkd_loss(x["student"], x["teacher"], x["mask"], case.config)
    assert without.seen is None and torch.equal(without.loss, out.loss)


def test_the_fused_head_sees_the_same_and_a_term_without_weight_trains_no_token():
    case = Case(replace(CONFIG, indirect_kd_alpha=0.0), steps=20)
    x, mask = case.hidden(torch.float64), case.tensors(torch.float64)["mask"]
    hidden, weights = (
        [x[f"{m}_hidden"] for m in ("student", "teacher")],
        [x[f"{m}_weight"] for m in ("student", "teacher")],
    )
    student, teacher = (h @ w.T for h, w in zip(hidden, weights, strict=True))
    of_logits = tsdkd_loss(student, teacher, mask, case.config, return_seen=True).seen
    fused = tsdkd_loss_from_hidden(
        hidden[0], weights[0], hidden[1], weights[1], mask, case.config, return_seen=True
    ).seen
    for name, column in vars(of_logits).items():
        torch.testing.assert_close(getattr(fused, name), column)
    assert not of_logits.opener.any() and of_logits.uncertain.any()


def test_the_public_trainers_arithmetic_shows_its_own_choice():
    """One column of openers for all rows, and no token outside of the responses."""
    case = Case(ObjectiveConfig(preset="reference", top_k=5), steps=20)
    x = case.tensors(torch.float64)
    seen = tsdkd_loss(x["student"], x["teacher"], x["mask"], case.config, return_seen=True).seen
    assert len(seen.sequence) == x["mask"].sum()
    h = [seen.of_sequence(row)["student_entropy"] for row in range(case.batch)]
    gate = [seen.of_sequence(row)["gate"] for row in range(case.batch)]
    t = [seen.of_sequence(row)["teacher_entropy"] for row in range(case.batch)]
    for row in range(case.batch):
        wanted = torch.sigmoid(torch.tensor(h[row]) - torch.tensor(t[row]))
        assert gate[row] == pytest.approx(wanted.tolist(), abs=1e-6)
