"""Matrix products, FP8 and plain, with the rules of cuBLAS on Hopper.

Sources: common/gemm/cublaslt_gemm.cu (`CanonicalizeGemmInput`: operands, usages, paddings; `cublas_gemm`: scaling
modes), pytorch/csrc/extensions/gemm.cpp (shapes, accumulation, quantized outputs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_stand_in import modelled, require
from te_stand_in.extension.quantization import quantize, value
from te_stand_in.extension.types import TORCH, DType

_BLOCK = 128


class _Operand(NamedTuple):
    """What a product reads: fp32 values [rows, contracted], the operand's own shape, and its scaling."""

    values: Tensor
    shape: list[int]
    scaling: str  # "" for none, else "tensor", "1D" or "2D"


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Tensor | None, quantizer: Any, output_dtype: DType | None,
    bias: Tensor | None, bias_type: DType, gelu: bool, gelu_in: Tensor | None, grad: bool, workspace: Tensor,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None,
    comm_type: Any = None, extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:  # fmt: skip
    """[D, gradient of the bias, GELU's input, extra output] of `D = alpha op(B) op(A) (+ bias) (+ beta D)`.

    As in cuBLAS, whose matrices lie column by column, the operands stand in reverse order.
    """
    modelled(comm_overlap is None and extra_output is None, "communication overlapped with products")
    modelled(not gelu and gelu_in is None, "fused GELU")
    with torch.no_grad():
        a, b = _operand(A, transA, "A"), _operand(B, not transB, "B")
        k = a.values.shape[1]
        require(k == b.values.shape[1], f"GEMM inputs have incompatible dimensions: {a.shape}, {b.shape}")
        m, n = a.values.shape[0], b.values.shape[0]
        _require_hopper(a.scaling, b.scaling, m, n, k)
        shape = [*([b.shape[-1]] if transB else b.shape[:-1]), m]
        dtype = D.dtype if D is not None else TORCH[output_dtype] if output_dtype is not None else _dtype(A)
        out = (alpha * (b.values @ a.values.t())).view(shape)
        bias_grad = None
        if bias is not None and grad:
            modelled(transB, "the gradient of a bias but from the product for the weight's")
            bias_grad = b.values.sum(1).to(dtype)
        elif bias is not None:
            require(not a.scaling or dtype != torch.float32, "an FP8 product adds no bias to an fp32 output")
            out = out + bias.float()
        require(accumulate or not beta, "a beta without accumulation has nothing to be applied to")
        if D is not None:
            require(list(D.shape) == shape, f"GEMM output has invalid dims (expected {shape}, got {list(D.shape)})")
            out = D.copy_(out + (1.0 if beta is None else beta) * D.float() if accumulate else out)
        else:
            modelled(not accumulate, "accumulation without an output")
            out = out.to(dtype)
        return [out if quantizer is None else quantize(out, quantizer), bias_grad, None, None]


def te_general_grouped_gemm(
    A: list[Any], transa: bool, B: list[Any], transb: bool, D: list[Tensor], D_type: DType, m_splits: list[int],
    bias: list[Tensor], bias_type: DType, single_output: bool, pre_gelu_out: list[Tensor], grad: bool,
    workspace: list[Tensor], workspace_size: int, accumulate: bool, use_split_accumulator: bool, math_sm_count: int,
) -> list[Tensor]:  # fmt: skip
    """One product for each of the operands; `single_output`: their rows follow one another in the only output."""
    modelled(not grad and not accumulate, "grouped products of a backward pass")
    modelled(not any(b.numel() for b in bias), "grouped products with a bias")
    outputs = list(D[0].split(m_splits)) if single_output else D
    require(len(A) == len(B) == len(outputs), "as many outputs as products")
    for a, b, out in zip(A, B, outputs, strict=True):
        if b.numel():  # an expert without a token
            generic_gemm(
                *(a, transa, b, transb, out, None, D_type, None, bias_type, False, None, grad),
                *(workspace[0], workspace_size, accumulate, use_split_accumulator),
            )
    return bias


def _dtype(x: Any) -> torch.dtype:
    dtype = getattr(x, "dtype", None)
    modelled(dtype is not None, "a product of quantized storage without an output type")
    return dtype


def _require_hopper(a: str, b: str, m: int, n: int, k: int) -> None:
    """`m` the width of the output, `n` its rows, `k` what is contracted."""
    require(bool(a) == bool(b), "one operand is FP8 and the other is not")
    if not a:
        return
    require((a == "tensor") == (b == "tensor"), f"operands' scaling modes do not go together: {a}, {b}")
    require((a, b) != ("2D", "2D"), "only 1D by 1D, 1D by 2D and 2D by 1D block scaling, got 2D by 2D")
    require(k % 16 == 0, f"FP8 GEMM: leading dimension {k} is no multiple of 16. Caller must pad.")
    # The sources check it for blocks; for one scale cuBLAS itself finds no algorithm (16 bytes of a bf16 output).
    require(m % 8 == 0, f"FP8 GEMM: outer dimension {m} of A is no multiple of 8. Caller must pad.")
    require(b != "1D" or n % 8 == 0, f"FP8 GEMM: outer dimension {n} of B is no multiple of 8. Caller must pad.")


def _operand(x: Any, rowwise: bool, name: str) -> _Operand:
    """Hopper multiplies FP8 rows with FP8 rows only: an operand that is contracted along its rows must bring the
    transposed bytes, its column-wise copy."""
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if isinstance(x, Float8TensorStorage):
        data = x._data if rowwise else None if x._transpose_invalid else x._transpose
        flat, shape = _bytes(data, rowwise, name)
        return _Operand(value(flat, x._fp8_dtype) * x._scale_inv, shape, "tensor")
    if isinstance(x, Float8BlockwiseQTensorStorage):
        flat, shape = _bytes(x._rowwise_data if rowwise else x._columnwise_data, rowwise, name)
        scales = x._rowwise_scale_inv if rowwise else x._columnwise_scale_inv
        rows, k = flat.shape
        scales = scales.repeat_interleave(_BLOCK, 0)[:rows] if x._is_2D_scaled else scales[:, :rows].t()
        scales = scales.repeat_interleave(_BLOCK, 1)[:, :k]
        return _Operand(value(flat, x._fp8_dtype) * scales, shape, "2D" if x._is_2D_scaled else "1D")
    modelled(isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16), f"products of {type(x)}")
    plain = x.detach().reshape(-1, x.shape[-1]).float()
    return _Operand(plain if rowwise else plain.t(), list(x.shape), "")


def _bytes(data: Tensor | None, rowwise: bool, name: str) -> tuple[Tensor, list[int]]:
    """([rows, contracted] bytes, the shape of the tensor they stand for)"""
    require(data is not None, f"Input {name} is missing {'row' if rowwise else 'column'}-wise usage")
    if rowwise:
        return data.reshape(-1, data.shape[-1]), list(data.shape)
    return data.reshape(data.shape[0], -1), [*data.shape[1:], data.shape[0]]
