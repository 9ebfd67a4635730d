"""Hugging Face <-> NeMo, for Llama, Qwen2, Qwen3 and Qwen3-MoE.

NeMo's functions regroup q, k, v and NeMo's trainer saves; names and configs are ours, because NeMo's importers know no
tied head for Qwen2, no head_dim for Qwen3, no norm_topk_prob, and only Transformer Engine's fused layer norms and
grouped experts (without it they leave every norm at one).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import HAVE_TE
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.qwen3 import Qwen3MoEConfig
from nemo.lightning import io
from nemo.lightning.io.state import TransformFns
from nemo.lightning.pytorch.utils import dtype_from_hf
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

import nemo_tsdkd.megatron.cpu as cpu
from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.hf_config import check_config, rope

logger = logging.getLogger(__name__)

CLASSES = {  # NeMo's, by Hugging Face's model_type (hf_config.ARCHITECTURES)
    "qwen2": (llm.Qwen2Config, llm.Qwen2Model),
    "qwen3": (llm.Qwen3Config, llm.Qwen3Model),
    "qwen3_moe": (Qwen3MoEConfig, llm.Qwen3Model),
    "llama": (llm.LlamaConfig, llm.LlamaModel),
}

_NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.layers.*.self_attn.o_proj.weight": "decoder.layers.*.self_attention.linear_proj.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_QK_NORMS = {
    "model.layers.*.self_attn.q_norm.weight": "decoder.layers.*.self_attention.q_layernorm.weight",
    "model.layers.*.self_attn.k_norm.weight": "decoder.layers.*.self_attention.k_layernorm.weight",
}
_FUSED_NORMS = {  # Transformer Engine keeps a norm's weight in the linear layer behind it
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
}
_PLAIN_NORMS = {
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}
_QKV = "decoder.layers.*.self_attention.linear_qkv"
_FC1 = "decoder.layers.*.mlp.linear_fc1.weight"
_GATE_UP = ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight")
_DOWN = "model.layers.*.mlp.down_proj.weight"
_EXPERT = "model.layers.*.mlp.experts.*"
_EXPERT_GATE_UP = (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight")
_MOE_NAMES = {
    "model.layers.*.mlp.gate.weight": "decoder.layers.*.mlp.router.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}
# Of an expert's two linear layers. Transformer Engine multiplies all experts of a rank in one grouped layer.
_GROUPED_EXPERTS = "decoder.layers.*.mlp.experts.{}.weight*"
_LOCAL_EXPERTS = "decoder.layers.*.mlp.experts.local_experts.*.{}.weight"


def config_from_hf(folder: Path) -> llm.GPTConfig:
    """NeMo's GPT config for a Hugging Face folder; reads its JSON files only.

    Raises:
        UserError: its config.json asks for something that NeMo's models do not do.
    """
    path = folder / "config.json"
    check_config(read_json(path), path)
    hf = AutoConfig.from_pretrained(folder)
    dtype = dtype_from_hf(hf)
    config_class, _ = CLASSES[hf.model_type]
    fields: dict[str, Any] = {}
    position = rope(read_json(path), path)
    if position.scaling:
        config_class = Llama31Config
        fields = {
            "scale_factor": position.scaling.factor,
            "low_freq_factor": position.scaling.low_freq_factor,
            "high_freq_factor": position.scaling.high_freq_factor,
            "old_context_len": position.scaling.original_max_position_embeddings,
        }
    if hf.model_type == "qwen3_moe":
        fields = {
            "num_moe_experts": hf.num_experts,
            "moe_router_topk": hf.num_experts_per_tok,
            "moe_ffn_hidden_size": hf.moe_intermediate_size,
            "moe_router_pre_softmax": not hf.norm_topk_prob,  # a softmax over the chosen experts normalizes
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": HAVE_TE,
            "moe_permute_fusion": HAVE_TE and "moe_permute_fusion" not in cpu.missing_kernels,
        }
    return config_class(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        init_method_std=hf.initializer_range,
        layernorm_epsilon=hf.rms_norm_eps,
        rotary_base=position.theta,
        seq_length=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        generation_config=_generation_config(folder, hf),
        apply_rope_fusion=HAVE_TE,  # its kernel comes with Transformer Engine
        bias_activation_fusion=HAVE_TE,  # NeMo's Qwen leaves it off, and keeps five MLP widths a token where three do
        **fields,
    )


def _generation_config(folder: Path, hf: PretrainedConfig) -> GenerationConfig:
    written = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if written else GenerationConfig.from_model_config(hf)


def source_patterns(gpt: MCoreGPTModel) -> dict[str, tuple[str, ...]]:
    """Megatron's name of each parameter, and Hugging Face's names of the tensors in it: one; q, k and v; or the two
    halves of an MLP's first layer. `*` stands for the layer and, behind it, for the expert."""
    gate_up, fc1 = _gate_up(gpt)
    patterns: dict[str, tuple[str, ...]] = {megatron: (hf,) for hf, megatron in _names(gpt).items()}
    return patterns | {fc1: gate_up, **{f"{_QKV}.{kind}": _projections(kind) for kind in ("weight", "bias")}}


def to_hf(gpt: MCoreGPTModel, hf_model: PreTrainedModel) -> None:
    """Set a Hugging Face model's weights from those of a full Megatron model."""
    gate_up, fc1 = _gate_up(gpt)
    transforms = [
        io.state_transform(f"{_QKV}.weight", _projections("weight"), TransformFns.split_qkv),
        io.state_transform(fc1, gate_up, TransformFns.split_fc1),
    ]
    if gpt.config.add_qkv_bias:
        transforms.append(io.state_transform(f"{_QKV}.bias", _projections("bias"), TransformFns.split_qkv_bias))
    names = {megatron: hf for hf, megatron in _names(gpt).items()}
    tied = ["lm_head.weight"] if gpt.share_embeddings_and_output_weights else []
    io.apply_transforms(gpt, hf_model, names, transforms, state_dict_ignored_entries=tied, cast_dtype=hf_model.dtype)
    hf_model.tie_weights()  # the conversion gave the embedding a new tensor


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"model.layers.*.self_attn.{name}_proj.{kind}" for name in "qkv")


def _gate_up(gpt: MCoreGPTModel) -> tuple[tuple[str, str], str]:
    """Hugging Face's and Megatron's names of the MLPs' first layers."""
    if gpt.config.num_moe_experts is None:
        return _GATE_UP, _FC1
    return _EXPERT_GATE_UP, _experts(gpt).format("linear_fc1")


def _experts(gpt: MCoreGPTModel) -> str:
    return _GROUPED_EXPERTS if gpt.config.moe_grouped_gemm else _LOCAL_EXPERTS


def _names(gpt: MCoreGPTModel) -> dict[str, str]:
    """Hugging Face's and Megatron's names of the tensors that both hold in the same form."""
    names = _NAMES | (_PLAIN_NORMS if "decoder.layers.0.input_layernorm.weight" in gpt.state_dict() else _FUSED_NORMS)
    if gpt.config.num_moe_experts is None:
        names[_DOWN] = "decoder.layers.*.mlp.linear_fc2.weight"
    else:
        names |= _MOE_NAMES | {f"{_EXPERT}.down_proj.weight": _experts(gpt).format("linear_fc2")}
    if gpt.config.qk_layernorm:
        names |= _QK_NORMS
    if gpt.share_embeddings_and_output_weights:
        del names["lm_head.weight"]
    return names
