"""Figures of one validation, from the verdicts on its responses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_tsdkd.rollout.schedule import Response
from nemo_tsdkd.verifiers import Verdict

ACCURACY, DIVERGENCE = "validation_accuracy", "validation_divergence"  # the scores that tell the best checkpoint
_Z = 1.959964  # of the normal distribution: 95 % lie within


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `total` (Wilson, 1927): it stays inside 0..1, also near both ends."""
    share, z2 = right / total, _Z**2
    centre = share + z2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, (centre - half) / (1 + z2 / total)), min(1.0, (centre + half) / (1 + z2 / total))


def validation_metrics(responses: Sequence[Response], verdicts: Sequence[Verdict] | None) -> dict[str, float]:
    """Metrics of the responses to all held-out prompts; without `verdicts` (no verifier) lengths only."""
    total = len(responses)
    found: dict[str, float] = {
        "validation_samples": total,
        "validation_length_mean": sum(len(response.token_ids) for response in responses) / total,
        "validation_truncated_fraction": sum(response.truncated for response in responses) / total,
    }
    if verdicts is None:
        return found
    right = sum(verdict.correct for verdict in verdicts)
    low, high = wilson_interval(right, total)
    unanswered = sum(verdict.answer is None and verdict.error is None for verdict in verdicts)
    return found | {
        ACCURACY: right / total,
        "validation_accuracy_low": low,
        "validation_accuracy_high": high,
        "validation_unanswered_fraction": unanswered / total,
        "validation_verifier_errors": sum(verdict.error is not None for verdict in verdicts),
    }
