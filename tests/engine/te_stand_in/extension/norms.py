"""RMSNorm and LayerNorm, forward and backward, in fp32 inside.

Source of the signatures: pytorch/csrc/extensions/normalization.cpp. As there, a quantized output is that of the
16-bit one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_stand_in.extension.quantization import quantize
from te_stand_in.extension.types import TORCH, DType


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: DType, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:  # fmt: skip
    """(output, no mean, 1 / rms of each row)"""
    with torch.no_grad():
        x = _rows(input)
        rsigma = (x.square().mean(-1) + eps).rsqrt()
        out = x * rsigma[:, None] * _gain(weight, zero_centered_gamma)
        return _output(out, ln_out, quantizer, otype, input.shape), None, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight."""
    with torch.no_grad():
        normed = _rows(x) * rsigma[:, None]
        scaled = _rows(dz) * _gain(gamma, zero_centered_gamma)
        dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rsigma[:, None]
        return dx.to(x.dtype).view(x.shape), (_rows(dz) * normed).sum(0).to(gamma.dtype)


def layernorm_fwd(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: DType,
    sm_margin: int, zero_centered_gamma: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    """(output, mean of each row, 1 / standard deviation)"""
    with torch.no_grad():
        x = _rows(input)
        mu = x.mean(-1)
        rsigma = (x.var(-1, unbiased=False) + eps).rsqrt()
        out = (x - mu[:, None]) * rsigma[:, None] * _gain(weight, zero_centered_gamma) + bias.detach().float()
        return _output(out, ln_out, quantizer, otype, input.shape), mu, rsigma


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, of the weight and of the bias."""
    with torch.no_grad():
        g, normed = _rows(dz), (_rows(x) - mu[:, None]) * rsigma[:, None]
        scaled = g * _gain(gamma, zero_centered_gamma)
        centered = scaled - scaled.mean(-1, keepdim=True)
        dx = (centered - normed * (scaled * normed).mean(-1, keepdim=True)) * rsigma[:, None]
        return dx.to(x.dtype).view(x.shape), (g * normed).sum(0).to(gamma.dtype), g.sum(0).to(gamma.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()


def _gain(weight: Tensor, zero_centered_gamma: bool) -> Tensor:
    return weight.detach().float() + (1 if zero_centered_gamma else 0)


def _output(out: Tensor, ln_out: Any, quantizer: Any, otype: DType, shape: torch.Size) -> Any:
    out = out.to(TORCH[otype]).view(shape)
    if quantizer is not None:
        return quantize(out, quantizer, ln_out)
    return out if ln_out is None else ln_out.copy_(out)
