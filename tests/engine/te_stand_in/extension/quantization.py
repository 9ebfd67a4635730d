"""Quantization to FP8: one scale a tensor (current scaling), or one a block of 128 or 128 x 128 (blockwise).

Sources: common/recipe/recipe_common.cuh (scales), pytorch/csrc/quantizer.cpp (tensors and their copies),
common/transpose/quantize_transpose_{square,vector}_blockwise.cu.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from te_stand_in import modelled, require
from te_stand_in.extension.types import TORCH, DType, Float8BlockScaleTensorFormat

_MANTISSA = -0x800000  # 0xFF800000: sign and exponent of an fp32 number


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """The quantizer's tensor of `tensor`; written into `output` where given, which `noop` leaves as it is."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    with torch.no_grad():
        if noop is not None and noop.item() != 0:
            modelled(output is not None, "a skipped quantization without an output")
            return output
        tensor = tensor.detach().contiguous()
        if isinstance(quantizer, Float8BlockQuantizer):
            return quantize_blocks(tensor, quantizer, output)
        modelled(isinstance(quantizer, Float8CurrentScalingQuantizer), type(quantizer).__name__)
        return quantize_whole(tensor, quantizer, output)


def dequantize(input: Any, otype: DType) -> Tensor:
    """Values of a tensor with one scale; blockwise ones are dequantized in Transformer Engine's Python."""
    return (value(input._data, input._fp8_dtype) * input._scale_inv).to(TORCH[otype])


def fp8_transpose(input: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    result = _transposed(input)
    return result if out is None else out.copy_(result)


def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient quantized."""
    return input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype), quantize(input, quantizer)


def compute_amax(input: Tensor, amax: Tensor) -> None:
    amax.copy_(input.abs().max())


def value(data: Tensor, dtype: DType) -> Tensor:
    """FP8 bytes as fp32, not scaled."""
    return data.view(TORCH[dtype]).float()


def scale_of(amax: Tensor, dtype: DType, epsilon: float, power_of_two: bool, at_infinity: float) -> Tensor:
    """What a value is multiplied with before the cast: `compute_scale_from_amax`."""
    amax = amax.float().clamp(min=epsilon)  # NaN stays
    scale = torch.finfo(TORCH[dtype]).max / amax
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, at_infinity), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _MANTISSA).view(torch.float32)
    return torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)


def _cast(scaled: Tensor, dtype: DType) -> Tensor:
    """fp32 to FP8 bytes, rounded to even and saturated as the kernels do (torch's own cast overflows to NaN)."""
    bound = torch.finfo(TORCH[dtype]).max
    return scaled.clamp(-bound, bound).to(TORCH[dtype]).view(torch.uint8)


def _transposed(data: Tensor) -> Tensor:
    """[..., K] to [K, ...]."""
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def quantize_whole(tensor: Tensor, quantizer: Any, output: Any) -> Any:
    """One scale. On Hopper, what is used column-wise is a transposed copy of the bytes."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if not quantizer.use_existing_amax:
        amax = tensor.abs().max().float() if tensor.numel() else torch.zeros(())
        quantizer.amax.copy_(amax.view(1))
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        dist.all_reduce(quantizer.amax, op=dist.ReduceOp.MAX, group=group)
    largest = torch.finfo(torch.float32).max
    quantizer.scale.copy_(
        scale_of(quantizer.amax, quantizer.dtype, quantizer.amax_epsilon, quantizer.force_pow_2_scales, largest)
    )
    data = _cast(tensor.float() * quantizer.scale, quantizer.dtype)
    transpose = _transposed(data) if quantizer.columnwise_usage else None
    data = data if quantizer.rowwise_usage else None
    require(data is not None or transpose is not None, "invalid quantizer usages")
    if output is not None:
        output._data, output._transpose = data, transpose
        output._scale_inv.copy_(1 / quantizer.scale)
        output._transpose_invalid, output._fp8_dtype = transpose is None, quantizer.dtype
        return output
    fields = {
        "data": data,
        "fp8_scale_inv": 1 / quantizer.scale,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": transpose,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**fields)
    return Float8Tensor(shape=list(tensor.shape), dtype=tensor.dtype, **fields)


def quantize_blocks(tensor: Tensor, quantizer: Any, output: Any) -> Any:
    """One scale a block: 128 x 128 (weights), or 128 along the dimension that a product will contract."""
    rowwise: tuple = (None, None)
    columnwise: tuple = (None, None)
    if quantizer.rowwise_usage:
        rowwise = _rowwise_blocks(tensor, quantizer)
    if quantizer.columnwise_usage:
        columnwise = _columnwise_blocks(tensor, quantizer)
    if output is not None:
        output._rowwise_data, output._rowwise_scale_inv = rowwise
        output._columnwise_data, output._columnwise_scale_inv = columnwise
        output._fp8_dtype = quantizer.dtype
        return output
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    formats = Float8BlockScaleTensorFormat
    fields = {
        "rowwise_data": rowwise[0],
        "rowwise_scale_inv": rowwise[1],
        "columnwise_data": columnwise[0],
        "columnwise_scale_inv": columnwise[1],
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": quantizer.block_scaling_dim == 2,
        "data_format": formats.COMPACT if quantizer.all_gather_usage else formats.GEMM_READY,
    }
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**fields)
    return Float8BlockwiseQTensor(shape=list(tensor.shape), dtype=tensor.dtype, **fields)


def _rowwise_blocks(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes in the tensor's shape and inverse scales: [M/128, K/128] of square blocks; of rows [K/128, M], or, before
    an all-gather along M, [M, K/128]."""
    length, square = quantizer.block_len, quantizer.block_scaling_dim == 2
    data, scales = _blocks(_matrix(tensor), quantizer, length if square else 1, length)
    if not square and not quantizer.all_gather_usage:
        scales = scales.t()
    return data.view(tensor.shape), _padded(scales, quantizer.get_scale_shape(list(tensor.shape), False))


def _columnwise_blocks(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes transposed and inverse scales: [K/128, M/128] of square blocks, [M/128, K] of columns; before an all-gather
    the bytes are not transposed."""
    length, square = quantizer.block_len, quantizer.block_scaling_dim == 2
    require(not (square and quantizer.all_gather_usage), "no compact column-wise format for 128 x 128 blocks")
    data, scales = _blocks(_matrix(tensor), quantizer, length, length if square else 1)
    if square:
        scales = scales.t()
    if not quantizer.all_gather_usage:
        data = data.t().contiguous()
    shape = quantizer.get_columnwise_shape(list(tensor.shape))
    return data.view(shape), _padded(scales, quantizer.get_scale_shape(list(tensor.shape), True))


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(x: Tensor, quantizer: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 bytes [M, K] and inverse scales [m, k] of blocks of rows x columns, of which the last may be smaller."""
    m, k = math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns)
    whole = functional.pad(x.float(), (0, k * columns - x.shape[1], 0, m * rows - x.shape[0]))
    blocks = whole.view(m, rows, k, columns)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    largest = torch.finfo(x.dtype).max
    scale = scale_of(amax, quantizer.dtype, quantizer.amax_epsilon, quantizer.force_pow_2_scales, largest)
    data = _cast(blocks * scale, quantizer.dtype).view(m * rows, k * columns)
    return data[: x.shape[0], : x.shape[1]].contiguous(), (1 / scale).view(m, k)


def _padded(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    out = scales.new_zeros(shape)
    out[: scales.shape[0], : scales.shape[1]] = scales
    return out
