# ruff: noqa: F401  the names are the module
"""`transformer_engine_torch`: written from the call sites of Transformer Engine's Python and the C++ signatures."""

from typing import Any

from te_stand_in import modelled
from te_stand_in.extension.attention import (
    fused_attn_bwd,
    fused_attn_fwd,
    fused_rope_backward,
    fused_rope_forward,
    get_fused_attn_backend,
    scaled_aligned_causal_masked_softmax_backward,
    scaled_aligned_causal_masked_softmax_forward,
    scaled_masked_softmax_backward,
    scaled_masked_softmax_forward,
    scaled_softmax_backward,
    scaled_softmax_forward,
    scaled_upper_triang_masked_softmax_backward,
    scaled_upper_triang_masked_softmax_forward,
)
from te_stand_in.extension.gemm import generic_gemm, te_general_grouped_gemm
from te_stand_in.extension.norms import layernorm_bwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_fwd
from te_stand_in.extension.optimizer import (
    multi_tensor_adam,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_unscale_l2norm,
)
from te_stand_in.extension.quantization import bgrad_quantize, compute_amax, dequantize, fp8_transpose, quantize
from te_stand_in.extension.types import (
    CommOverlap,
    CommOverlapAlgo,
    CommOverlapCore,
    CommOverlapHelper,
    CommOverlapP2P,
    CommOverlapType,
    DType,
    Float8BlockScaleTensorFormat,
    FP8BwdTensors,
    FP8FwdTensors,
    FP8TensorMeta,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)

# Versions that FP8 with blocks and attention need: CUDA 12.9's cuBLAS, cuDNN 9.15.1.


def get_cublasLt_version() -> int:
    return 120900


def get_cudnn_version() -> int:
    return 91501


def get_num_cublas_streams() -> int:
    return 1


def device_supports_multicast(device_id: int = -1) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def get_stream_priority_range(device_id: int = -1) -> tuple[int, int]:
    return 0, 0


def swap_first_dims(tensor: Any, out: Any = None) -> Any:
    modelled(out is None, "a swap into an output")
    return tensor.transpose(0, 1).contiguous()


def _absent(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        modelled(False, f"{name}()")

    refuse.__name__ = name
    return refuse


# What no model here calls: Transformer Engine's modules look the names up while they are imported.
_ABSENT = """
gelu geglu qgelu qgeglu relu reglu srelu sreglu silu swiglu clamped_swiglu dgelu dgeglu dqgelu dqgeglu drelu dreglu
dsrelu dsreglu dsilu dswiglu clamped_dswiglu dbias_dgelu dbias_drelu dbias_dqgelu dbias_dsrelu dbias_dsilu
split_quantize rmsnorm_bwd_add multi_tensor_sgd multi_tensor_adam_fp8
multi_tensor_adam_capturable multi_tensor_adam_capturable_master multi_tensor_adam_param_remainder
multi_tensor_compute_scale_and_scale_inv multi_tensor_compute_scale_inv_e8m0
fused_amax_and_scale_update_after_reduction fp8_block_scaling_compute_partial_amax fp8_block_scaling_partial_cast
mxfp8_scaling_compute_partial_amax mxfp8_scaling_partial_cast fused_multi_row_padding fused_multi_row_unpadding
fa_prepare_fwd fa_prepare_bwd copy_to_kv_cache convert_thd_to_bshd convert_bshd_to_thd fused_qkv_rope_forward
fused_qkv_rope_backward thd_read_half_tensor thd_second_half_lse_correction thd_read_second_half_lse
thd_out_correction thd_grad_correction thd_get_partitioned_indices bulk_overlap_ag_with_external_gemm moe_permute_fwd
moe_permute_bwd moe_unpermute_fwd moe_unpermute_bwd fused_topk_with_score_function_fwd
fused_topk_with_score_function_bwd fused_score_for_moe_aux_loss_fwd fused_score_for_moe_aux_loss_bwd
fused_moe_aux_loss_fwd fused_moe_aux_loss_bwd dropout_fwd dropout_bwd
""".split()
globals().update({name: _absent(name) for name in _ABSENT})
__all__ = [name for name in globals() if not name.startswith("_") and name not in ("Any", "modelled")]
