"""Terms beyond the paper's three, by name in one registry. To add one: CONTRIBUTING.md.

A term is a differentiable function of what the objective already knows of each token. The loss gains its mean over
each response, times its weight in `objective.extra_terms`. Its gradient needs no formula of its own: autograd leads
to the entropy and the divergence of a token, and docs/math.md (eq. 8, 9) leads from these to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_tsdkd.config.registry import Registry
from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.output import Metrics


class TokenStatistics(NamedTuple):
    """What is known of each of n tokens; all [n], equal on all tensor-parallel ranks."""

    student_entropy: Tensor  # nats; a term may be differentiated through it
    divergence: Tensor  # between teacher and student, by `objective.divergence`; likewise
    teacher_entropy: Tensor  # nats


Term = Callable[[TokenStatistics, ObjectiveConfig], Tensor]
TERMS: Registry[Term] = Registry("term")


def term(name: str) -> Callable[[Term], Term]:
    """Register a term. Its value is reported under its name, so raises ValueError where a metric has that name."""
    if name in Metrics._fields:
        raise ValueError(f"term {name!r}: a metric has this name. Choose another name.")
    return TERMS.register(name)


class ExtraTerms(NamedTuple):
    """The terms of `objective.extra_terms`, in its order, and the derivatives of their weighted sum."""

    values: Tensor  # [terms], before their weights
    entropy_grad: Tensor  # [n]
    divergence_grad: Tensor  # [n]


def extra_terms(seen: TokenStatistics, weight: Tensor, config: ObjectiveConfig) -> ExtraTerms:
    """Evaluate the config's terms, whose names are registered.

    Args:
        seen: statistics of n tokens.
        weight: [n], of each token in the mean over its response; a token of weight zero is not looked at.
    """
    n = len(weight)
    values, entropy_grad, divergence_grad = (weight.new_zeros(size) for size in (len(config.extra_terms), n, n))
    trained = weight.nonzero().flatten()
    if not config.extra_terms or not len(trained):
        return ExtraTerms(values, entropy_grad, divergence_grad)
    with torch.enable_grad():
        entropy, divergence, teacher = (x[trained].detach() for x in seen)
        seen = TokenStatistics(entropy.requires_grad_(), divergence.requires_grad_(), teacher)
        each = torch.stack([(weight[trained] * TERMS[name](seen, config)).sum() for name in config.extra_terms])
        total = (each * each.new_tensor(list(config.extra_terms.values()))).sum()
        grads = torch.autograd.grad(total, (entropy, divergence), allow_unused=True, materialize_grads=True)
    entropy_grad[trained], divergence_grad[trained] = grads
    return ExtraTerms(each.detach(), entropy_grad, divergence_grad)
