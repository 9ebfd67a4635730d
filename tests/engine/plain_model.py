"""A model of Megatron's own layers with the weights of one of Transformer Engine's, in one process."""

from __future__ import annotations

import copy

from torch import nn

# Transformer Engine keeps a norm's weight in the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def plain_name(name: str) -> str:
    """The plain model's name of a parameter of Transformer Engine's model."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def plain_twin(model: nn.Module) -> nn.Module:
    """This rank's shard of the same model without a line of Transformer Engine and without fusions."""
    config = copy.copy(model.config)
    config.transformer_layer_spec = _plain_spec
    config.apply_rope_fusion = config.bias_activation_fusion = config.gradient_accumulation_fusion = False
    twin = config.configure_model(tokenizer=None)
    engine = {type(m).__module__ for m in twin.modules()}
    assert not any("transformer_engine" in module for module in engine), engine
    weights = {plain_name(n): w for n, w in model.state_dict().items() if not n.endswith("_extra_state")}
    absent, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and all(n.endswith("_extra_state") for n in absent), (absent, unexpected)
    return twin


def _plain_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    # The whole block: Megatron would take Transformer Engine's norm for its end wherever that imports.
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), WrappedTorchNorm)
