"""Selection rules on hand-made entropies, and their registry."""

import pytest
import torch

from nemo_tsdkd.objective import ObjectiveConfig
from nemo_tsdkd.objective.selection import RULES, Tokens, check_rules, rule


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


def test_each_sequence_has_its_own_opener_also_without_entropy():
    assert choose("cumulative_entropy", [1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 5.0], threshold=0.5) == [1, 0, 1, 0, 0, 1, 1]


def test_the_uncertain_tokens_are_the_largest_of_each_sequence_and_ties_go_to_the_earlier():
    assert choose("top_fraction", [1.0, 3.0, 3.0, 3.0, 2.0], [0.5], entropy_fraction=0.25) == [0, 1, 1, 0, 0, 1]
    assert choose("top_fraction", [1.0, 2.0], entropy_fraction=0.0) == [0, 0]
    assert choose("top_fraction", [1.0, 2.0], entropy_fraction=1.0) == [1, 1]


def test_the_gate_rises_with_the_students_doubt():
    gate = RULES["confidence"](tokens([0.0, 1.0, 2.0]), ObjectiveConfig(gate_temperature=0.5))
    torch.testing.assert_close(gate, torch.sigmoid(torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)))


def test_the_identity_chooses_every_token():
    assert choose("identity", [1.0], [2.0, 3.0]) == [1, 1, 1]


def test_an_unknown_rule_is_one_clear_error():
    with pytest.raises(ValueError, match=r"objective.gate_rule = 'sharp': must be one of .*confidence.*identity"):
        check_rules(ObjectiveConfig(gate_rule="sharp"))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'identity' is registered twice"):
        rule("identity")(lambda tokens, config: tokens.response)
