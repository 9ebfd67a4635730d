"""Selection rules on hand-made entropies, and their registry."""

import pytest
import torch
from chi_square import p_value

from nemo_tsdkd.objective import ObjectiveConfig, check_registered, extra_terms, tsdkd_loss
from nemo_tsdkd.objective.rules import RULES, needs, rule
from nemo_tsdkd.objective.tokens import Tokens


def tokens(*sequences: list[float], teacher: float = 1.0, **asked: list) -> Tokens:
    """Whole-response sequences with these student entropies, and what rules asked for, flat."""
    flat = torch.tensor([h for sequence in sequences for h in sequence], dtype=torch.float64)
    ids = torch.tensor([i for i, sequence in enumerate(sequences) for _ in sequence])
    position = torch.tensor([p for sequence in sequences for p in range(len(sequence))])
    response = torch.ones_like(ids, dtype=torch.bool)
    kinds = {"key": torch.int64}
    known = {name: torch.tensor(value, dtype=kinds.get(name, flat.dtype)) for name, value in asked.items()}
    return Tokens(flat, torch.full_like(flat, teacher), ids, position, response, known)


def choose(name: str, *sequences: list[float], **fields) -> list[int]:
    return RULES[name](tokens(*sequences), ObjectiveConfig(**fields)).int().tolist()


@pytest.mark.parametrize(
    ("threshold", "chosen"),
    [(0.0, [1, 0, 0, 0]), (0.1, [1, 0, 0, 0]), (0.11, [1, 1, 0, 0]), (0.3, [1, 1, 0, 0]), (1.0, [1, 1, 1, 1])],
)
def test_the_opener_holds_the_position_that_reaches_the_share(threshold, chosen):
    assert choose("cumulative_entropy", [1.0, 2.0, 3.0, 4.0], threshold=threshold) == chosen


@pytest.mark.parametrize("percent", [7, 14, 28, 56])
def test_an_exact_share_of_equal_entropies_is_no_token_longer(percent):
    """0.07 * 100 > 7 in floats, and so for the others."""
    assert percent / 100 * 100 > percent
    assert sum(choose("cumulative_entropy", [3.7] * 100, threshold=percent / 100)) == percent


def test_each_sequence_has_its_own_opener_also_without_entropy():
    assert choose("cumulative_entropy", [1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 5.0], threshold=0.5) == [1, 0, 1, 0, 0, 1, 1]


def test_the_uncertain_tokens_are_the_largest_of_each_sequence_and_ties_go_to_the_earlier():
    assert choose("top_fraction", [1.0, 3.0, 3.0, 3.0, 2.0], [0.5], entropy_fraction=0.25) == [0, 1, 1, 0, 0, 1]
    assert choose("top_fraction", [1.0, 2.0], entropy_fraction=0.0) == [0, 0]
    assert choose("top_fraction", [1.0, 2.0], entropy_fraction=1.0) == [1, 1]
    assert sum(choose("top_fraction", [1.0] * 100, entropy_fraction=0.07)) == 7  # 0.07 * 100 > 7 in floats


def test_the_gate_rises_with_the_students_doubt():
    gate = RULES["confidence"](tokens([0.0, 1.0, 2.0]), ObjectiveConfig(gate_temperature=0.5))
    torch.testing.assert_close(gate, torch.sigmoid(torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)))


def test_the_identity_chooses_every_token():
    assert choose("identity", [1.0], [2.0, 3.0]) == [1, 1, 1]


def test_tip_takes_the_uncertain_and_the_sure_but_wrong():
    """Scores 0.5, 0.05, 1 (sure and wrong), 1 (most uncertain), 0; a second response has extremes of its own."""
    entropy, divergence = [1.0, 0.1, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.6, 0.0]
    chosen = {}
    for share in (0.2, 0.4, 0.6, 0.8):
        seen = tokens(entropy, [10.0, 20.0], divergence=[*divergence, 7.0, 7.0])
        chosen[share] = RULES["tip"](seen, ObjectiveConfig(tip_fraction=share)).int().tolist()
    assert chosen[0.2] == [0, 0, 1, 0, 0, 0, 1]  # of two scores of 1 the earlier
    assert chosen[0.4] == [0, 0, 1, 1, 0, 0, 1]
    assert chosen[0.6] == [1, 0, 1, 1, 0, 1, 1]
    assert chosen[0.8] == [1, 1, 1, 1, 0, 1, 1]


def test_tip_counts_entropies_above_their_98th_percentile_alike():
    """Of 100 entropies the two largest count as the third largest; so the divergence decides among these three."""
    entropy = [1.0] * 97 + [50.0, 2.0, 60.0]
    seen = tokens(entropy, divergence=[0.0] * 98 + [0.5, 1.0])
    assert RULES["tip"](seen, ObjectiveConfig(tip_fraction=0.01)).nonzero().tolist() == [[97]]  # all three have 1


def test_tip_without_spread_takes_the_first_and_of_infinite_divergences_these():
    config, flat = ObjectiveConfig(tip_fraction=0.5), [1.0] * 4
    assert RULES["tip"](tokens(flat, divergence=[0.3] * 4), config).int().tolist() == [1, 1, 0, 0]
    seen = tokens(flat, divergence=[0.3, 0.1, float("inf"), 0.2])
    assert RULES["tip"](seen, config).int().tolist() == [1, 0, 1, 0]  # beside an infinite one the others are equal


def test_importance_weights_fall_from_first_to_last_by_what_the_models_have_disagreed_on():
    """d = 1, 0, -3, 0 | 0, 0 | an excluded token, 5: the definition's numbers."""
    student = [-2.0, -1.0, -1.0, -1.0, -1.0, -2.0, -1e30, -1.0]
    teacher = [-1.0, -1.0, -4.0, -1.0, -1.0, -2.0, -1.0, -6.0]
    seen = tokens([1.0] * 4, [1.0] * 2, [1.0] * 2, student_log_probability=student, teacher_log_probability=teacher)
    weights = RULES["importance_weight"](seen, ObjectiveConfig(iw_gamma=0.5)).tolist()
    assert weights[:6] == pytest.approx([1.5, 1.375, 1.375, 1.0, 1.5, 1.5], abs=1e-9)
    assert weights[6:] == pytest.approx([1.5, 1 + 0.5 * 5 / 10_005], abs=1e-9)
    assert RULES["importance_weight"](seen, ObjectiveConfig(iw_gamma=0.0)).tolist() == [1.0] * 8


def test_the_prefix_counts_response_tokens():
    assert choose("prefix", [1.0] * 4, [1.0], [1.0] * 2, prefix_tokens=2) == [1, 1, 0, 0, 1, 1, 1]


def test_the_random_share_depends_on_the_key_and_the_place_alone():
    def drawn(*lengths_and_keys, share=0.25):
        keys = [key for length, key in lengths_and_keys for _ in range(length)]
        seen = tokens(*([1.0] * length for length, _ in lengths_and_keys), key=keys)
        return RULES["random_share"](seen, ObjectiveConfig(random_fraction=share)).int().tolist()

    both, alone = drawn((40, 5), (30, -7)), drawn((30, -7))
    assert sum(both[:40]) == 10 and sum(alone) == 8 and both[40:] == alone
    assert drawn((40, 6)) != both[:40]
    assert sum(drawn((40, 5), share=0.0)) == 0 and sum(drawn((40, 5), share=1.0)) == 40
    counts = torch.tensor([drawn((40, key)) for key in range(400)]).sum(0)
    assert p_value(counts.double(), torch.full((40,), 100.0, dtype=torch.float64)) > 1e-3


def test_of_a_response_that_is_cut_the_opener_is_a_part_of_the_whole_ones_and_the_share_is_of_what_is_left():
    """What docs/math.md says of rollout.horizon."""
    g = torch.Generator().manual_seed(3)
    whole = (3 * torch.rand(50, generator=g, dtype=torch.float64)).tolist()
    openers = [sum(choose("cumulative_entropy", whole[:length], threshold=0.2)) for length in range(1, 51)]
    assert openers == sorted(openers) and openers[0] == 1 < openers[-1]
    counts = [sum(choose("top_fraction", whole[:length], entropy_fraction=0.1)) for length in range(1, 51)]
    assert counts == [-(-length // 10) for length in range(1, 51)]


def test_a_rule_gets_what_it_declares_and_an_error_for_what_it_does_not():
    seen = tokens([1.0, 2.0])
    message = r"reads teacher_log_probability and does not declare it: .*needs=\['sampled'\]"
    with pytest.raises(RuntimeError, match=message):
        RULES["importance_weight"](seen, ObjectiveConfig())
    with pytest.raises(RuntimeError, match=r"reads divergence and does not declare it"):
        RULES["tip"](seen, ObjectiveConfig())
    message = r"selection rule 'greedy' needs \['logits'\]: must be of divergence, sampled, key"
    with pytest.raises(ValueError, match=message):
        rule("greedy", needs=["logits"])
    assert needs(ObjectiveConfig()) == set()
    assert needs(ObjectiveConfig(opener_rule="random_share", gate_rule="tip")) == {"key", "divergence"}
    assert seen.place.tolist() == [0, 1] and seen.length.tolist() == [2, 2]


def test_an_excluded_token_takes_part_in_the_choice_and_not_in_a_loss_that_does_not_train_it():
    """A reverse KL is infinite there: TIP puts it first. Chosen for the opener alone it leaves the loss finite."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 1, 9, generator=g, dtype=torch.float64) for _ in range(2))
    teacher[3, 0, 2] = -torch.inf
    config = ObjectiveConfig(
        beta=1.0, gate_rule="prefix", prefix_tokens=3, opener_rule="tip", tip_fraction=0.3, top_k=4
    )
    out = tsdkd_loss(student.requires_grad_(), teacher, torch.ones(6, 1), config, return_seen=True)
    (3 * out.loss).backward()
    assert out.seen.opener[3] and out.seen.opener.sum() == 2  # beside it the most uncertain one
    assert out.loss.isfinite() and student.grad.isfinite().all() and student.grad[3].any()
    labels = torch.full((6, 1), 2)
    config = ObjectiveConfig(gate_rule="importance_weight", top_k=4)
    out = tsdkd_loss(student, teacher, torch.ones(6, 1), config, labels=labels, return_seen=True)
    assert out.seen.gate[3] > 1.49 and out.seen.gate[4] < 1.01  # nearly all of the disagreement lies there


def test_an_unknown_rule_is_one_clear_error():
    with pytest.raises(ValueError, match=r"objective.gate_rule = 'sharp': must be one of .*confidence.*identity"):
        check_registered(ObjectiveConfig(gate_rule="sharp"))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'identity' is registered twice"):
        rule("identity")(lambda tokens, config: tokens.response)


def test_the_reference_preset_counts_columns_from_where_a_response_begins():
    """The public trainer sees responses alone; here prompts of different lengths stand before them."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(8, 2, 11, generator=g, dtype=torch.float64) for _ in range(2))
    config = ObjectiveConfig(preset="reference", threshold=0.5, top_k=4)
    lengths = torch.tensor([5, 8])  # the shorter response's padding is trained, as there
    alone = tsdkd_loss(student, teacher, torch.arange(8)[:, None] < lengths, config)
    prompts, rows = (3, 6), {}
    for name, logits in (("student", student), ("teacher", teacher)):
        rows[name] = torch.randn(14, 2, 11, generator=g, dtype=torch.float64)
        for b, start in enumerate(prompts):
            rows[name][start : start + 8, b] = logits[:, b]
    place = torch.arange(14)[:, None] - torch.tensor(prompts)
    whole = tsdkd_loss(rows["student"], rows["teacher"], (place >= 0) & (place < lengths), config)
    for term in ("direct", "indirect", "entropy"):
        torch.testing.assert_close(getattr(whole, term), getattr(alone, term), rtol=1e-12, atol=0)


def test_registered_names_are_asked_for_by_their_field():
    with pytest.raises(ValueError, match=r"objective.divergence = 'l2': must be one of .*jsd"):
        check_registered(ObjectiveConfig(divergence="l2"))
    with pytest.raises(ValueError, match=r"objective.extra_terms = 'gap': must be one of"):
        check_registered(ObjectiveConfig(extra_terms={"gap": 1.0}))
    with pytest.raises(ValueError, match=r"term 'direct': a metric has this name"):
        extra_terms.term("direct")
    with pytest.raises(ValueError, match=r"objective.extra_terms = .*: objective.preset = gkd has no terms of others"):
        ObjectiveConfig(preset="gkd", extra_terms={"entropy_gap": 1.0}).validate()
