"""A Hugging Face Qwen2 model and the same weights in a Megatron GPTModel stage, for tests that compare the two.

Import inside a rank only: it brings in the whole stack.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen2Config, Qwen2ForCausalLM


def qwen2(seed: int = 0, spread: float = 3.0, **overrides: int) -> Qwen2ForCausalLM:
    """A random model; `spread` widens its weights so that greedy choices are clear."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 119,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def initialize_layout(tp: int, pp: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Set up Megatron's groups in a world of TP x PP ranks and return this rank's two."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(1)
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()


def megatron_stage(hf: Qwen2ForCausalLM, padded_vocab_size: int, **config: object) -> GPTModel:
    """This rank's shard and stage of `hf`, on Megatron's current layout."""
    tp, pp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    c = hf.config
    settings = TransformerConfig(
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads,
        ffn_hidden_size=c.intermediate_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=True,
        layernorm_epsilon=c.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **config,
    )
    model = GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size,
        max_sequence_length=c.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=int(c.rope_theta),
        share_embeddings_and_output_weights=c.tie_word_embeddings,
    )
    _load(model, hf.state_dict(), c, padded_vocab_size)
    return model


def _load(model: GPTModel, source: dict[str, torch.Tensor], c: Qwen2Config, padded_vocab_size: int) -> None:
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    head_dim, groups = c.hidden_size // c.num_attention_heads, c.num_key_value_heads

    def shard(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(tp, dim)[rank]

    def vocabulary(x: torch.Tensor) -> torch.Tensor:  # padding rows that would win if they were ever drawn
        padding = 100 * x.abs().max() * torch.ones(padded_vocab_size - len(x), x.shape[1])
        return shard(torch.cat((x, padding)), 0)

    def qkv(name: str) -> torch.Tensor:  # [group: its queries, its key, its value]
        q, k, v = (source[name.format(p)].unflatten(0, (groups, -1, head_dim)) for p in "qkv")
        return shard(torch.cat((q, k, v), 1).flatten(0, 2), 0)

    target = {}
    if model.pre_process:
        target["embedding.word_embeddings.weight"] = vocabulary(source["model.embed_tokens.weight"])
    if model.post_process:
        target["decoder.final_layernorm.weight"] = source["model.norm.weight"]
        target["output_layer.weight"] = vocabulary(source["lm_head.weight"])
    for i, layer in enumerate(model.decoder.layers):
        here, there = f"decoder.layers.{i}.", f"model.layers.{layer.layer_number - 1}."
        gate, up = (shard(source[f"{there}mlp.{p}_proj.weight"], 0) for p in ("gate", "up"))
        target |= {
            f"{here}input_layernorm.weight": source[f"{there}input_layernorm.weight"],
            f"{here}pre_mlp_layernorm.weight": source[f"{there}post_attention_layernorm.weight"],
            f"{here}self_attention.linear_qkv.weight": qkv(there + "self_attn.{}_proj.weight"),
            f"{here}self_attention.linear_qkv.bias": qkv(there + "self_attn.{}_proj.bias"),
            f"{here}self_attention.linear_proj.weight": shard(source[f"{there}self_attn.o_proj.weight"], 1),
            f"{here}mlp.linear_fc1.weight": torch.cat((gate, up)),
            f"{here}mlp.linear_fc2.weight": shard(source[f"{there}mlp.down_proj.weight"], 1),
        }
    if model.pre_process and model.post_process and c.tie_word_embeddings:
        del target["output_layer.weight"]
    missing, unexpected = model.load_state_dict(target, strict=False)
    assert not unexpected and not [name for name in missing if "_extra_state" not in name], (missing, unexpected)
