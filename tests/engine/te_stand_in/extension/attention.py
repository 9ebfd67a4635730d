"""Core attention, rotary embedding and softmax of 16-bit types, computed in fp32.

Sources: common/fused_attn/fused_attn.cpp (`nvte_get_fused_attn_backend`: what cuDNN serves),
pytorch/csrc/extensions/attention.cpp, common/fused_rope/fused_rope.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_stand_in import modelled, require
from te_stand_in.extension.types import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)

_MASKS = (
    NVTE_Mask_Type.NVTE_NO_MASK,
    NVTE_Mask_Type.NVTE_CAUSAL_MASK,
    NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK,
)


def get_fused_attn_backend(
    is_training, q_dtype, kv_dtype, qkv_layout, bias_type, mask_type, softmax_type, dropout, heads, groups,
    seqlen_q, seqlen_kv, head_dim_qk, head_dim_v, window_left, window_right, return_max_logit, cuda_graph,
) -> Any:  # fmt: skip
    """cuDNN's flash attention where it serves the call and the stand-in models it; no backend for fp32."""
    served = (
        q_dtype in (DType.kFloat16, DType.kBFloat16)
        and "THD" not in NVTE_QKV_Layout(qkv_layout).name
        and bias_type == NVTE_Bias_Type.NVTE_NO_BIAS
        and softmax_type == NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
        and mask_type in _MASKS
        and head_dim_qk % 8 == head_dim_v % 8 == 0
        and max(head_dim_qk, head_dim_v) <= 256
        and dropout == 0
        and window_left == -1
    )
    backends = NVTE_Fused_Attn_Backend
    return backends.NVTE_F16_arbitrary_seqlen if served else backends.NVTE_No_Backend


def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, set_zero, qkv_layout, bias_type, mask_type,
    softmax_type, window_size, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype, cu_seqlens_q_padded,
    cu_seqlens_kv_padded, page_table_k, page_table_v, s_quantizer, o_quantizer, bias, softmax_offset, rng_gen,
    rng_elts_per_thread, return_max_logit, cuda_graph,
) -> list[Tensor]:  # fmt: skip
    """[output, logarithm of each row's sum [B, heads, S, 1], state of the random generator]"""
    modelled(s_quantizer is None and o_quantizer is None, "FP8 attention")
    modelled(bias is None and not return_max_logit and page_table_k is None, "biases, largest logits, paged keys")
    with torch.no_grad():
        order, kv_order = _orders(qkv_layout)
        queries, keys, values = _heads_first(q, order), _heads_first(k, kv_order), _heads_first(v, kv_order)
        keys, values = _for_each_head(queries, keys, values)
        scores = _scores(queries, keys, attn_scale, mask_type)
        lse = scores.logsumexp(-1, keepdim=True)
        out = _heads_back((scores - lse).exp() @ values, order, q.dtype)
        return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, attn_scale, dropout, set_zero, qkv_layout, bias_type, mask_type, softmax_type,
    window_size, deterministic, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, dqkv_dtype,
    aux_ctx_tensors, cu_seqlens_q_padded, cu_seqlens_kv_padded, s_quantizer, dp_quantizer, dqkv_quantizer,
    cuda_graph,
) -> list[Tensor | None]:  # fmt: skip
    """[dq, dk, dv, of the bias, of the softmax's offset], from the logarithms that it is given: a context-parallel rank
    gives those of the whole row."""
    modelled(s_quantizer is None and dp_quantizer is None and dqkv_quantizer is None, "FP8 attention")
    with torch.no_grad():
        order, kv_order = _orders(qkv_layout)
        queries, keys, values = _heads_first(q, order), _heads_first(k, kv_order), _heads_first(v, kv_order)
        out, grad = _heads_first(o, order), _heads_first(d_o, order)
        groups = keys.shape[1]
        keys, values = _for_each_head(queries, keys, values)
        p = (_scores(queries, keys, attn_scale, mask_type) - aux_ctx_tensors[0].float()).exp()
        dv = p.transpose(-1, -2) @ grad
        ds = p * (grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * attn_scale
        dq, dk = ds @ keys, ds.transpose(-1, -2) @ queries
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
        grads = ((dq, order), (dk, kv_order), (dv, kv_order))
        return [*(_heads_back(x, its_order, fake_dtype) for x, its_order in grads), None, None]


def _orders(layout: int) -> tuple[str, str]:
    """Order of the dimensions of the queries (and outputs), and of keys and values."""
    parts = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_").lower().replace("2", "").replace("3", "").split("_")
    modelled(parts[0] in ("sbhd", "bshd") and parts[-1] in ("sbhd", "bshd"), f"attention of {parts}")
    return parts[0], parts[-1]


def _heads_first(x: Tensor, order: str) -> Tensor:
    """To fp32 [B, heads, S, D]."""
    return x.detach().float().permute(*((1, 2, 0, 3) if order == "sbhd" else (0, 2, 1, 3)))


def _heads_back(x: Tensor, order: str, dtype: torch.dtype) -> Tensor:
    return x.permute(*((2, 0, 1, 3) if order == "sbhd" else (0, 2, 1, 3))).contiguous().to(dtype)


def _for_each_head(queries: Tensor, *groups: Tensor) -> tuple[Tensor, ...]:
    copies = queries.shape[1] // groups[0].shape[1]
    return tuple(x.repeat_interleave(copies, 1) for x in groups)


def _scores(q: Tensor, k: Tensor, scale: float, mask_type: int) -> Tensor:
    modelled(mask_type in _MASKS, f"attention with {NVTE_Mask_Type(mask_type).name}")
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask_type == NVTE_Mask_Type.NVTE_NO_MASK:
        return scores
    rows, columns = scores.shape[-2:]
    shift = columns - rows if mask_type == NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK else 0
    return scores.masked_fill(_above_diagonal(rows, columns, shift), -torch.inf)


def _above_diagonal(rows: int, columns: int, shift: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(1 + shift)


def fused_rope_forward(*args: Any) -> Tensor:
    return _rope(*args, forward=True)


def fused_rope_backward(*args: Any) -> Tensor:
    return _rope(*args, forward=False)


def _rope(t, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, *, forward) -> Tensor:
    """`t` [S, B, heads, D] rotated by the angles `freqs` [S, 1, 1, d]; backward is the transposed rotation."""
    modelled(
        qkv_format == NVTE_QKV_Format.NVTE_SBHD and cu_seqlens is None, "rotary embedding but for [S, B, heads, D]"
    )
    modelled(cp_size == 1 and not interleaved and start_positions is None, "interleaved or shifted rotary embedding")
    require(freqs.dtype == torch.float32, "rotary angles must be fp32")
    with torch.no_grad():
        dim = freqs.shape[-1]
        angles = freqs[: t.shape[0]].view(t.shape[0], 1, 1, dim)
        x, rest = t.detach().float().split((dim, t.shape[-1] - dim), dim=-1)
        if forward:
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1) * angles.sin()
        else:  # the sine of a position belongs to its partner's gradient
            first, second = (x * angles.sin()).chunk(2, dim=-1)
            turned = torch.cat((second, -first), dim=-1)
        return torch.cat((x * angles.cos() + turned, rest), dim=-1).to(t.dtype)


def scaled_softmax_forward(inputs: Tensor, scale: float) -> Tensor:
    return _softmax(inputs.float() * float(scale), inputs.dtype)


def scaled_upper_triang_masked_softmax_forward(inputs: Tensor, scale: float) -> Tensor:
    """Causal, also where there are more keys than queries."""
    rows, columns = inputs.shape[-2:]
    hidden = _above_diagonal(rows, columns, columns - rows)
    return _softmax((inputs.float() * float(scale)).masked_fill(hidden, -torch.inf), inputs.dtype)


def scaled_masked_softmax_forward(inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
    return _softmax((inputs.float() * float(scale)).masked_fill(mask.bool(), -10000.0), inputs.dtype)


def scaled_softmax_backward(grads: Tensor, softmax: Tensor, scale: float) -> Tensor:
    p, g = softmax.float(), grads.float()
    return ((g - (g * p).sum(-1, keepdim=True)) * p * float(scale)).to(grads.dtype)


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return scores.softmax(-1).to(dtype)


scaled_aligned_causal_masked_softmax_forward = scaled_upper_triang_masked_softmax_forward
scaled_masked_softmax_backward = scaled_softmax_backward
scaled_upper_triang_masked_softmax_backward = scaled_softmax_backward
scaled_aligned_causal_masked_softmax_backward = scaled_softmax_backward
