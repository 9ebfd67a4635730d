"""Weights that follow from a tensor's name alone, in integer arithmetic: the same on every machine and version."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np


def hashed(name: str, count: int) -> np.ndarray:
    """`count` 64-bit integers (splitmix64 of a counter that starts at the name's CRC)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """fp32 tensors by Hugging Face's names: norms about one, small biases, matrices that keep a vector's length."""
    tensors = {}
    for name, shape in shapes.items():
        values = (hashed(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32).reshape(shape)
        values = values * np.float32(2**-24) - np.float32(0.5)
        if "norm" in name:
            values = values * np.float32(0.5) + np.float32(1)
        elif len(shape) == 2:
            values = values * np.float32(3 if "embed_tokens" in name else (12 / shape[1]) ** 0.5)
        assert values.dtype == np.float32
        tensors[name] = values
    return tensors


def hashed_tokens(count: int, vocab_size: int) -> np.ndarray:
    """Token ids `[count]`, int64."""
    return (hashed("tokens", count) % np.uint64(vocab_size)).astype(np.int64)
