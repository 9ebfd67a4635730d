"""Pearson's test of drawn counts against expected ones."""

from __future__ import annotations

import torch


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chance of counts at least this far from the expected; a cell that expects none must hold none."""
    assert (observed[expected == 0] == 0).all()
    cells = expected > 0
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = torch.tensor((cells.sum().item() - 1) / 2.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic.double() / 2).item()
