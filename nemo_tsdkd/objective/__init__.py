"""The token-selective dual distillation objective: torch only, groups are arguments."""

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.loss import tsdkd_loss, tsdkd_loss_from_hidden
from nemo_tsdkd.objective.output import ALWAYS_REPORTED, Metrics, ObjectiveOutput, reported, weighted
from nemo_tsdkd.objective.resolve import ResolvedObjective, check_registered, resolve_objective

__all__ = [
    "ALWAYS_REPORTED",
    "Metrics",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "ResolvedObjective",
    "check_registered",
    "reported",
    "resolve_objective",
    "tsdkd_loss",
    "tsdkd_loss_from_hidden",
    "weighted",
]
