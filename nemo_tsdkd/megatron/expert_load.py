"""How evenly the router of a mixture of experts spreads the tokens over the experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


class ExpertLoad:
    """Counts the tokens that each expert of this rank's layers is chosen for.

    Args:
        module: this rank's shard of a mixture of experts.

    Attributes:
        counts: int64 `[layers of the model, experts]`, on the device; zero in the layers of other pipeline stages.
    """

    def __init__(self, module: nn.Module) -> None:
        config: Any = module.config
        shape = config.num_layers, config.num_moe_experts
        self.counts = torch.zeros(shape, dtype=torch.int64, device=torch.cuda.current_device())
        self._tokens = torch.empty(0, dtype=torch.bool)
        for part in module.modules():
            if isinstance(part, TopKRouter):
                part.register_forward_hook(partial(self._count, part.layer_number - 1))

    def begin(self, token_mask: Tensor) -> None:
        """Count the next micro-batch.

        Args:
            token_mask: `[S (/TP), B]` bool, this rank's positions that hold a token. Padding, which depends on the
                layout, does not count.
        """
        self._tokens = token_mask.flatten()

    def _count(self, layer: int, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        _, chosen = output  # [S (/TP) x B, experts] bool
        self.counts[layer] += (chosen & self._tokens[:, None]).sum(0)


def largest_over_mean(counts: Tensor) -> float:
    """The share of a layer's busiest expert over the mean share, on average over the layers. 1 is balanced; the number
    of experts over those chosen for a token is the worst. With one expert on a rank, so many times longer a pass of the
    experts takes than a balanced one.

    Args:
        counts: `[layers, experts]`, of all ranks. Tensor-parallel ranks that hold the same tokens may count them each.
    """
    return (counts.amax(1) / counts.double().mean(1)).mean().item()
