"""Random numbers as a function of counters (seed, step, sample, position, ...) and not of a generator's state.

Every rank that knows the counters knows the numbers, so neither the layout nor the other sequences of a batch change
what is drawn, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), written as the signed integers torch computes with: products wrap around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_ROOT = 0x6A09E667F3BCC908  # key of the empty counter


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits, in place, with a logical shift: torch's own repeats the sign."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def fold(key: Tensor, counter: Tensor | int) -> Tensor:
    """64 hashed bits of (key, counter), broadcast over both: a key for the next counter, or noise. All int64."""
    x = key + (torch.as_tensor(counter, dtype=torch.int64, device=key.device) + 1) * _GAMMA
    x = _xor_shift(x, 30).mul_(_MIX_1)
    x = _xor_shift(x, 27).mul_(_MIX_2)
    return _xor_shift(x, 31)


def step_key(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The key (int64 scalar) below which all noise of one step lies."""
    root = torch.tensor(_ROOT, dtype=torch.int64, device=device)
    return fold(fold(root, seed), step)


def sample_keys(seed: int, step: int, samples: Tensor) -> Tensor:
    """The keys, int64 as `samples`, below which all noise of these samples at one step lies."""
    return fold(step_key(seed, step, samples.device), samples)


def uniform(bits: Tensor) -> Tensor:
    """fp32 in (0, 1), fine-grained (2^-63) near 0, where the winners of Gumbel-max are decided."""
    return (bits & (2**63 - 1)).float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
