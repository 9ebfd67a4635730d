"""A configuration made ready to compute: fields checked, preset applied, arithmetic chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.extra_terms import TERMS
from nemo_tsdkd.objective.rules import RULE_FIELDS, RULES, needs
from nemo_tsdkd.objective.terms import DIVERGENCES
from nemo_tsdkd.objective.tokens import Tokens
from nemo_tsdkd.objective.weights import TokenWeights, paper_weights, reference_weights


@dataclass(frozen=True)
class Arithmetic:
    """What the paper and its authors' public trainer compute differently (docs/math.md)."""

    token_weights: Callable[[Tokens, ObjectiveConfig], TokenWeights]
    trains_padding: bool  # the entropy term covers positions outside the responses too
    reverses_ranking: bool  # the indirect term takes the likelihood of the teacher's order from last to first
    has_packed_form: bool


PAPER = Arithmetic(paper_weights, trains_padding=False, reverses_ranking=False, has_packed_form=True)
REFERENCE = Arithmetic(reference_weights, trains_padding=True, reverses_ranking=True, has_packed_form=False)


@dataclass(frozen=True)
class ResolvedObjective:
    """An objective that `tsdkd_loss` need not check again. Made by `resolve_objective`.

    `needs` says what its rules look at besides entropies: keys of `tokens.ASKED`.
    """

    config: ObjectiveConfig
    arithmetic: Arithmetic
    needs: frozenset[str]


def check_registered(config: ObjectiveConfig) -> None:
    """Raise UserError when the config names a selection rule, divergence or term that is not registered."""
    for field in RULE_FIELDS:
        RULES.require(f"objective.{field}", getattr(config, field))
    DIVERGENCES.require("objective.divergence", config.divergence)
    for name in config.extra_terms:
        TERMS.require("objective.extra_terms", name)


def resolve_objective(config: ObjectiveConfig) -> ResolvedObjective:
    """Check every field and rule name, apply the preset and choose its arithmetic.

    Raises:
        UserError: a field of another type, out of its range or against its preset, or an unknown preset, selection
            rule, divergence or term.
    """
    config.validate()
    config.validate_preset()
    check_registered(config)
    resolved = config.resolved()
    return ResolvedObjective(resolved, REFERENCE if config.preset == "reference" else PAPER, needs(resolved))
