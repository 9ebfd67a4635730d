"""How many tokens a response may have at a step: a schedule over steps. No torch."""

from __future__ import annotations

import math

from nemo_tsdkd.config.schema import RolloutConfig


def horizon(rollout: RolloutConfig, step: int, max_steps: int) -> int:
    """The most tokens of a response that is generated at `step`, the number of optimizer steps before it.

    A function of the step alone, so that a resumed run goes on where it stopped. The first of `horizon_steps` steps has
    `horizon_from` tokens, the last one and all later ones `horizon_to`; between them the horizon goes along a straight
    line or a half cosine wave, rounded to the nearest token (a half up). Published as progressive on-policy
    distillation (POPD; Zhang et al., arXiv 2605.31490), which adds a fixed number of tokens every so many steps; the
    truncated one (TOPD) is a constant horizon, a `max_new_tokens` that cuts most responses.
    """
    longest = rollout.max_new_tokens
    if rollout.horizon == "constant":
        return longest
    first, last = rollout.horizon_from or longest, rollout.horizon_to or longest
    steps = (rollout.horizon_steps or max_steps) - 1
    if step >= steps:
        return last
    if rollout.horizon == "linear":
        return first + (2 * (last - first) * step + steps) // (2 * steps)
    grown = (last - first) * (1 - math.cos(math.pi * step / steps)) / 2
    return first + math.floor(round(grown, 6) + 0.5)  # the last digits, in which libraries differ, decide nothing
