"""What Transformer Engine quantizes: import it in a rank, where the stand-in's quantization is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

from torch import nn


@dataclass(frozen=True)
class Quantized:
    """One call: what tensor (a weight's name, or none), into which type, with scales of which shape."""

    weight: str | None
    dtype: str  # kFloat8E4M3, kFloat8E5M2
    scaling: str  # whole, 1D, 2D


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that FP8 multiplies: those of the layers' linear modules."""
    return {n: p for n, p in model.named_parameters() if ".layers." in n and n.endswith("weight") and p.dim() == 2}


@contextmanager
def quantizations(**models: nn.Module) -> Iterator[list[Quantized]]:
    """Every quantization while the context lasts; weights are named `model:parameter`."""
    calls: list[Quantized] = []
    names = {p.data_ptr(): f"{which}:{name}" for which, m in models.items() for name, p in linear_weights(m).items()}
    module = import_module("te_stand_in.extension.quantization")

    def watched(original):
        def quantize(tensor, quantizer, output):
            scaling = f"{quantizer.block_scaling_dim}D" if hasattr(quantizer, "block_scaling_dim") else "whole"
            weight = names.get(tensor.data_ptr()) if tensor.dim() == 2 else None
            calls.append(Quantized(weight, quantizer.dtype.name, scaling))
            return original(tensor, quantizer, output)

        return quantize

    functions = ("quantize_whole", "quantize_blocks")
    with mock.patch.multiple(module, **{name: watched(getattr(module, name)) for name in functions}):
        yield calls


def cached_bytes(model: nn.Module) -> int:
    """Bytes of the quantized weights that Transformer Engine's modules keep, without their scales."""
    fields = ("_data", "_transpose", "_rowwise_data", "_columnwise_data")
    kept = (w for part in model.modules() for w in getattr(part, "_fp8_workspaces", {}).values())
    copies = [getattr(weight, name, None) for weight in kept for name in fields]
    return sum(copy.numel() for copy in copies if copy is not None)
