"""Selection rules on hand-made entropies, and their registry."""

import pytest
import torch

from nemo_tsdkd.objective import ObjectiveConfig, check_registered, extra_terms, tsdkd_loss
from nemo_tsdkd.objective.rules import RULES, rule
from nemo_tsdkd.objective.tokens import Tokens


def tokens(*sequences: list[float], teacher: float = 1.0) -> Tokens:
    """Whole-response sequences with these student entropies."""
    flat = torch.tensor([h for sequence in sequences for h in sequence], dtype=torch.float64)
    ids = torch.tensor([i for i, sequence in enumerate(sequences) for _ in sequence])
    position = torch.tensor([p for sequence in sequences for p in range(len(sequence))])
    return Tokens(flat, torch.full_like(flat, teacher), ids, position, torch.ones_like(ids, dtype=torch.bool))


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
