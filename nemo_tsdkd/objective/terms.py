"""The formulas of docs/math.md, each once: its value, then its gradient with respect to the logits.

Shapes: n tokens, V columns (a tile of a rank's vocabulary columns); z logits after the temperature, log_s and log_t
log-probabilities of student and teacher. Everything is plain tensor algebra on one rank; sums over columns are
partial sums that the caller adds over tiles and tensor-parallel ranks. Tiles are large: functions ending in `_`
overwrite the tiles they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_tsdkd.config.registry import Registry
from nemo_tsdkd.config.schema import ObjectiveConfig

# Replaces -inf, so that a column without probability gives 0 * finite instead of NaN.
FLOOR = -1e30


class SoftmaxSums(NamedTuple):
    """What softmax and entropy (eq. 2) need of a row's columns; [n] each, or stacked."""

    peak: Tensor  # max_v z_v
    mass: Tensor  # sum_v exp(z_v - peak)
    moment: Tensor  # sum_v exp(z_v - peak) (z_v - peak)

    @classmethod
    def empty(cls, like: Tensor) -> SoftmaxSums:
        return cls(torch.full_like(like, FLOOR), torch.zeros_like(like), torch.zeros_like(like))

    @classmethod
    def of_(cls, z: Tensor) -> SoftmaxSums:
        """Those of a tile's columns z [n, V], which is overwritten."""
        peak = z.amax(-1)
        mass = z.sub_(peak.unsqueeze(-1)).exp()
        return cls(peak, mass.sum(-1), z.mul_(mass).sum(-1))

    def at(self, *index: int | slice | Tensor) -> SoftmaxSums:
        return SoftmaxSums(*(x[index] for x in self))

    def seen_from(self, peak: Tensor) -> SoftmaxSums:
        """The same sums relative to a larger peak."""
        shift = self.peak - peak
        scale = shift.exp()
        return SoftmaxSums(peak, scale * self.mass, scale * (self.moment + shift * self.mass))

    def merge(self, other: SoftmaxSums) -> SoftmaxSums:
        """The sums over both sets of columns."""
        peak = torch.maximum(self.peak, other.peak)
        a, b = self.seen_from(peak), other.seen_from(peak)
        return SoftmaxSums(peak, a.mass + b.mass, a.moment + b.moment)

    def log_probabilities_(self, z: Tensor) -> Tensor:
        """z [n, V] to log p = (z - peak) - log mass: in this order a large logit costs a likely token no digits.

        NaN where a row has no column above -inf, so that a dead row cannot pass as a uniform one.
        """
        log_mass = torch.where(self.peak <= FLOOR, torch.nan, self.mass.log())
        return z.sub_(self.peak.unsqueeze(-1)).sub_(log_mass.unsqueeze(-1))

    def entropy(self) -> Tensor:
        """H = -sum_v p_v log p_v in nats; both summands are non-negative, so nothing cancels."""
        return self.mass.log() - self.moment / self.mass


def add_entropy_grad_(grad: Tensor, log_s: Tensor, s: Tensor, entropy: Tensor, weight: Tensor) -> Tensor:
    """grad += weight * dH/dz with dH/dz_v = -s_v (log s_v + H)."""
    return grad.sub_(log_s.add_(entropy).mul_(s).mul_(weight))


class Divergence(Protocol):
    """A divergence between teacher t and student s as sums over columns. To add one: CONTRIBUTING.md."""

    def sums_(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Partial sums [2, n] over the columns of a tile."""

    def value(self, sums: Tensor) -> Tensor:
        """Divergence [n] from the complete sums."""

    def grad_(self, log_s: Tensor, log_t: Tensor, s: Tensor, sums: Tensor) -> Tensor:
        """d value / d z [n, V]; overwrites log_t, keeps log_s and s."""


def _kl_sums_(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log q_v) and sum_v (q_v - p_v), [2, n]; their sum is KL(p||q).

    The second is zero but for rounding: it takes back what an error in either normaliser adds to the first. The first
    is infinite where p has a token, however unlikely, that q excludes.
    """
    p = log_p.exp()
    excluded = (p * (log_q < FLOOR / 2)).sum(-1)
    rest = log_q.exp().sub_(p).sum(-1)
    return torch.stack([p.mul_(log_p.sub_(log_q)).sum(-1).masked_fill_(excluded > 0, math.inf), rest])


class ForwardKL:
    """KL(t||s) = sum_v t_v (log t_v - log s_v); d/dz_v = s_v - t_v. The limit beta = 0."""

    def sums_(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return _kl_sums_(log_t, log_s)

    def value(self, sums: Tensor) -> Tensor:
        return sums[0] + sums[1]

    def grad_(self, log_s: Tensor, log_t: Tensor, s: Tensor, sums: Tensor) -> Tensor:
        return torch.sub(s, log_t.exp_(), out=log_t)


class ReverseKL:
    """KL(s||t) = sum_v s_v (log s_v - log t_v); d/dz_v = s_v (log s_v - log t_v - KL). The limit beta = 1."""

    def sums_(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return _kl_sums_(log_s, log_t)

    def value(self, sums: Tensor) -> Tensor:
        return sums[0] + sums[1]

    def grad_(self, log_s: Tensor, log_t: Tensor, s: Tensor, sums: Tensor) -> Tensor:
        # sums[0] alone: it has the normalisers' error that the logarithms here have, and the two cancel.
        return torch.sub(log_s, log_t, out=log_t).sub_(sums[0].unsqueeze(-1)).mul_(s)


class JensenShannon:
    """beta KL(t||m) + (1 - beta) KL(s||m) with m = beta t + (1 - beta) s (eq. 4), for 0 < beta < 1.

    d/dz_v = (1 - beta) s_v (log(s_v / m_v) - KL(s||m)).

    With d = log t - log s both ratios come from one quantity that neither cancels at d = 0 nor overflows:
    c = log1p(w expm1(-|d|)), w = 1 - beta where d > 0, else beta; log(t/m) = min(d, 0) - c, log(s/m) = -max(d, 0) - c.
    """

    def __init__(self, beta: float):
        self.beta = beta

    def _common_(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """(c, d); d takes log_t's place."""
        d = torch.sub(log_t, log_s, out=log_t)
        common = d.abs().neg_().expm1_()
        # w by arithmetic: a select is the slowest of these operations on a CPU. At d = 0 it multiplies zero.
        common.mul_(d.sign().mul_(0.5 - self.beta).add_(0.5))
        return common.log1p_(), d

    def sums_(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        t = log_t.exp()
        common, d = self._common_(log_s, log_t)
        teacher = t.mul_(torch.clamp(d, max=0).sub_(common)).sum(-1)
        student = log_s.exp_().mul_(common.add_(d.clamp_(min=0))).sum(-1)
        return torch.stack([teacher, -student])

    def value(self, sums: Tensor) -> Tensor:
        return self.beta * sums[0] + (1 - self.beta) * sums[1]

    def grad_(self, log_s: Tensor, log_t: Tensor, s: Tensor, sums: Tensor) -> Tensor:
        common, d = self._common_(log_s, log_t)
        return common.add_(d.clamp_(min=0)).add_(sums[1].unsqueeze(-1)).mul_(s).mul_(self.beta - 1)


DIVERGENCES: Registry[Callable[[ObjectiveConfig], Divergence]] = Registry("divergence")


@DIVERGENCES.register("jsd")
def jsd(config: ObjectiveConfig) -> Divergence:
    """The generalised Jensen-Shannon divergence (eq. 4) and, at its ends, the KL limits."""
    if config.beta == 0:
        return ForwardKL()
    return ReverseKL() if config.beta == 1 else JensenShannon(config.beta)


def divergence(config: ObjectiveConfig) -> Divergence:
    return DIVERGENCES[config.divergence](config)


def plackett_luce(z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [n] of the ranking z [n, k], best candidate first (eq. 3), and its gradient [n, k].

    value = sum_j (lse_j - z_j), lse_j = logsumexp_{i >= j} z_i; d/dz_i = -1 + sum_{j <= i} exp(z_i - lse_j).
    Candidates that are not `valid` take no part.
    """
    z = z.masked_fill(~valid, -math.inf)
    lse = z.flip(-1).logcumsumexp(-1).flip(-1)
    value = torch.where(valid, lse - z, 0).sum(-1)
    share = (z + torch.where(valid, -lse, -math.inf).logcumsumexp(-1)).exp()
    return value, torch.where(valid, share - 1, 0)


def rank_agreement(place: Tensor) -> Tensor:
    """Share [n] of pairs that place [n, k] keeps in order: 1 for the identity, 0 for the reverse, 1 where k = 1."""
    k, pairs = place.shape[-1], place.shape[-1] * (place.shape[-1] - 1) // 2
    kept = sum(((place[:, d:] > place[:, :-d]).sum(-1) for d in range(1, k)), start=place.new_zeros(len(place)))
    return kept.double() / pairs if pairs else torch.ones_like(kept, dtype=torch.float64)
