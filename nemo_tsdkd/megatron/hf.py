"""Hugging Face <-> NeMo, for Llama, Qwen2 and Qwen3.

NeMo's functions regroup q, k, v and NeMo's trainer saves; names and configs are ours, because NeMo's importers know no
tied head for Qwen2, no head_dim for Qwen3, and only Transformer Engine's fused layer norms (without it they leave
every norm at one).
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer as NemoTokenizer
from nemo.collections.llm.gpt.model.base import HAVE_TE
from nemo.lightning import io
from nemo.lightning.io.state import TransformFns
from nemo.lightning.pytorch.utils import dtype_from_hf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_tsdkd.folders import HF_ASSETS, copy_assets, read_json
from nemo_tsdkd.megatron.gpt import attention_mask

logger = logging.getLogger(__name__)

_MODELS = {
    "qwen2": (llm.Qwen2Model, llm.Qwen2Config),
    "qwen3": (llm.Qwen3Model, llm.Qwen3Config),
    "llama": (llm.LlamaModel, llm.LlamaConfig),
}

_NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.layers.*.self_attn.o_proj.weight": "decoder.layers.*.self_attention.linear_proj.weight",
    "model.layers.*.mlp.down_proj.weight": "decoder.layers.*.mlp.linear_fc2.weight",
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

# Every kind of token a text can hold matters less than that all layers see ordinary activations.
_SAMPLE = "Ann has 3 boxes with 12 eggs each and sells 7 eggs. How many are left? 3 * 12 = 36 and 36 - 7 = 29."
_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of the logits' norm; Transformer Engine multiplies fp32 in TF32


def config_from_hf(folder: Path) -> llm.GPTConfig:
    """NeMo's GPT config for a Hugging Face folder; reads its JSON files only."""
    hf = AutoConfig.from_pretrained(folder)
    dtype = dtype_from_hf(hf)
    _, config_class = _MODELS[hf.model_type]
    fields: dict[str, Any] = {}
    if (scaling := hf.rope_scaling) and scaling["rope_type"] == "llama3":
        config_class = llm.Llama31Config
        fields = {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
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
        rotary_base=hf.rope_theta,
        seq_length=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        generation_config=GenerationConfig.from_pretrained(folder),
        apply_rope_fusion=HAVE_TE,  # its kernel comes with Transformer Engine
        **fields,
    )


def import_hf(source: Path, output: Path) -> None:
    """Write the NeMo checkpoint of a Hugging Face folder into `output`, and prove it by comparing logits.

    Builds its own trainer and world of one rank: run it in a process of its own.

    Raises:
        RuntimeError: the two models' logits differ.
    """
    with TemporaryDirectory() as staging:
        assets = Path(staging, HF_ASSETS.name)
        copy_assets(source, assets)
        if not (assets / "generation_config.json").is_file():  # NeMo's importers require one
            GenerationConfig.from_model_config(AutoConfig.from_pretrained(source)).save_pretrained(assets)
        model, trainer = _plain_model(assets)
        dtype = model.config.params_dtype
        hf_model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
        tokens = _sample_tokens(source, model.config.vocab_size)
        hf_logits = _hf_logits(hf_model, tokens)
        _to_megatron(hf_model, model.module)
        del hf_model  # room for the fp32 copy of the other
        io.ModelConnector().nemo_save(output, trainer)
    _require_equal(hf_logits, _megatron_logits(model.module, tokens), source)


def _plain_model(assets: Path) -> tuple[llm.GPTModel, Any]:
    """NeMo's model of a Hugging Face folder, unloaded, in a world of one, with the trainer that can save it."""
    config = config_from_hf(assets)
    model = _model_class(assets)(config, tokenizer=NemoTokenizer(str(assets), trust_remote_code=False))
    return model, io.ModelConnector().nemo_setup(model)


def _model_class(folder: Path) -> type[llm.GPTModel]:
    return _MODELS[read_json(folder / "config.json")["model_type"]][0]


def _to_megatron(hf_model: nn.Module, gpt: MCoreGPTModel) -> None:
    projections = [f"model.layers.*.self_attn.{name}_proj" for name in "qkv"]
    transforms = [
        io.state_transform(tuple(f"{p}.weight" for p in projections), f"{_QKV}.weight", TransformFns.merge_qkv),
        io.state_transform(_GATE_UP, _FC1, TransformFns.merge_fc1),
    ]
    if gpt.config.add_qkv_bias:
        biases = tuple(f"{p}.bias" for p in projections)
        transforms.append(io.state_transform(biases, f"{_QKV}.bias", TransformFns.merge_qkv_bias))
    io.apply_transforms(hf_model, gpt, _names(gpt), transforms, cast_dtype=gpt.config.params_dtype)


def _names(gpt: MCoreGPTModel) -> dict[str, str]:
    """Hugging Face's and Megatron's names of the tensors that both hold in the same form."""
    names = _NAMES | (_PLAIN_NORMS if "decoder.layers.0.input_layernorm.weight" in gpt.state_dict() else _FUSED_NORMS)
    if gpt.config.qk_layernorm:
        names |= _QK_NORMS
    if gpt.share_embeddings_and_output_weights:
        del names["lm_head.weight"]
    return names


def _sample_tokens(folder: Path, vocab_size: int) -> Tensor:
    """Token ids `[1, S]` of a short text."""
    tokens = AutoTokenizer.from_pretrained(folder)(_SAMPLE, return_tensors="pt").input_ids
    return tokens % vocab_size  # a tokenizer may know more tokens than the model has rows


@torch.no_grad()
def _hf_logits(hf_model: Any, tokens: Tensor) -> Tensor:
    dtype = hf_model.dtype
    logits = hf_model.eval().float()(tokens).logits
    hf_model.to(dtype)  # exact: the weights came from it
    return logits


@torch.no_grad()
def _megatron_logits(gpt: MCoreGPTModel, tokens: Tensor) -> Tensor:
    """Logits `[1, S, V]` in fp32 arithmetic, on the GPU where there is one (Transformer Engine's layers need it)."""
    gpt.cuda().float().eval()
    gpt.config.params_dtype = torch.float32
    tokens = tokens.cuda()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return gpt(tokens, positions, attention_mask(tokens)).cpu()


def _require_equal(hf_logits: Tensor, logits: Tensor, source: Path) -> None:
    error = ((logits - hf_logits).norm() / hf_logits.norm()).item()
    tolerance = _TOLERANCE["cuda" if torch.cuda.is_available() else "cpu"]
    if not error <= tolerance:  # NaN too
        raise RuntimeError(f"{source}: logits in NeMo and Hugging Face differ by {error:.1e} of their norm.")
    logger.info("%s: logits in NeMo and Hugging Face differ by %.1e of their norm.", source, error)
