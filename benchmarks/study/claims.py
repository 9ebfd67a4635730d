"""What the study asks: each claim as one arm against another. The verdicts are computed, in analysis.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

AGAINST = ("gkd", "tsdkd")  # what every arm is compared with
PRECISE = "precision_bf16"  # what the arms of a teacher's precision are compared with


def is_precision(arm: str) -> bool:
    """Whether an arm is about the teacher's precision: its student is in bf16, unlike the others'."""
    return arm.startswith("precision_")


class Question(NamedTuple):
    """Whether `arm` is better than `against`.

    Attributes:
        family: on the problems of this family alone; empty: on all.
        at: equal "steps" or equal response "tokens".
    """

    claim: str
    arm: str
    against: str
    family: str = ""
    at: str = "steps"


PAPER = (
    Question("TSD-KD is better than GKD", "tsdkd", "gkd"),
    Question("TSD-KD is better than off-policy distillation", "tsdkd", "off_policy_kd"),
    Question("TSD-KD is better than supervised training on the teacher's responses", "tsdkd", "sft"),
    Question("The indirect term helps", "tsdkd", "no_indirect"),
    Question("The gate helps", "tsdkd", "no_gate"),
    Question("The entropy term helps", "tsdkd", "no_entropy"),
    Question("The indirect and the entropy term together help", "tsdkd", "direct_only"),
    Question("An opener chosen by entropy is better than random tokens", "tsdkd", "random_opener"),
    Question("On-policy reverse KL is better than off-policy distillation", "reverse_kl", "off_policy_kd"),
    Question("On-policy GKD is better than off-policy distillation", "gkd", "off_policy_kd"),
)
EXCEEDS = "The student exceeds its teacher"  # a question for each family
SELECTIONS = {
    "entropy_top": "The most uncertain half is better than all tokens",
    "tip": "TIP's half is better than all tokens",
    "importance_weight": "Importance weights are better than equal ones",
    "prefix": "The first tokens are better than all",
    "random_share": "A random half is better than all tokens",
    "horizon": "Rollouts that grow are better than full ones",
}


def rule_questions() -> list[Question]:
    """Every selection against all tokens, at equal steps and at equal response tokens."""
    return [
        Question(claim, arm, "reverse_kl", at=at) for arm, claim in SELECTIONS.items() for at in ("steps", "tokens")
    ]


def paper_questions(families: Iterable[str]) -> list[Question]:
    return [*PAPER, *(Question(EXCEEDS, "tsdkd", "teacher", family) for family in families)]
