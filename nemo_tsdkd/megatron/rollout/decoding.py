"""Puts a Megatron GPTModel into decoding shape: a KV cache in its attention, and nothing that serves training only.

The model's own layers do the work. While it decodes, each layer's core attention is one over a cache in which every
row has its own length, so prompts may be ragged, a finished sequence can leave and another take its row, and the same
code runs with and without Transformer Engine. Tokens sit at their true positions: what the model sees here is what it
sees when it is trained on the response.

Megatron-core 0.15's own engines do not serve: they gather the vocabulary on every rank and draw from a generator, so
that a response would depend on its batch and layout; and ragged batching needs the flash-attn package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.collections.llm.gpt.model.base import HAVE_TE  # the same switch picks NeMo's layer spec
from torch import Tensor
from torch.distributed import ReduceOp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_tsdkd.config.integers import round_up
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed.vocab_parallel import all_reduce
from nemo_tsdkd.rollout.schedule import Pass

# Not cuDNN, torch's first choice on an H100: it makes a plan for each new shape, and every pass of decoding has one.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MASK_MULTIPLE = 16  # a mask of another length is copied to such a one by every layer's memory-efficient attention


def check_model(model: GPTModel) -> None:
    """Raise UserError for a model that would decode wrongly rather than fail."""
    config = model.config
    rules = {
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "multi_latent_attention": (config.multi_latent_attention, False),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "window_size": (config.window_size, None),
        "softmax_type": (config.softmax_type, "vanilla"),
        "normalization": (config.normalization, "RMSNorm"),
        "layernorm_zero_centered_gamma": (config.layernorm_zero_centered_gamma, False),
        "virtual_pipeline_model_parallel_size": (config.virtual_pipeline_model_parallel_size, None),
    }
    for name, (value, supported) in rules.items():
        if value != supported:
            raise UserError(
                f"{name} = {value!r}: rollouts decode models with {supported!r} only. Write the responses "
                "elsewhere and train on the file with rollout.lmbda = 0, or change the model or its layout."
            )


class KVCache:
    """Rotated keys and values of every layer of this stage, and where the running pass reads and writes them."""

    def __init__(self, model: GPTModel, rows: int, length: int) -> None:
        length = _round_up(length)
        self.shape = (rows, length)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer number: two of [rows, groups, length, D]
        parameter = next(model.parameters())
        self.device = parameter.device
        # packed_seq=True: every position, also under context parallelism, whose ranks all decode the same.
        angles = model.rotary_pos_emb(length, packed_seq=True).squeeze(2)  # [length, 1, D]
        self.rotations = torch.stack((angles.cos(), angles.sin())).to(parameter.dtype)

    def begin(self, batch: Pass) -> None:
        """Point the layers at the rows and positions of `batch`; compute once what all of them need."""
        n = len(batch.sequences)
        self.prefill = batch.prefill
        if batch.prefill:
            self.rows = slice(batch.first_row, batch.first_row + n)
            self.cos, self.sin = self.rotations[:, : max(batch.positions) + 1].unsqueeze(3)  # [S, 1, 1, D]
        else:
            positions = torch.tensor(batch.positions, device=self.device)
            self.cos, self.sin = self.rotations[:, positions].transpose(1, 2).unsqueeze(3)  # [1, n, 1, D]
            self.target = (torch.arange(n, device=self.device), slice(None), positions)
            used = _round_up(max(batch.positions) + 1)
            self.used = (slice(n), slice(None), slice(used))
            unwritten = torch.arange(used, device=self.device) > positions[:, None]
            mask = self.rotations.new_zeros(n, used).masked_fill_(unwritten, -torch.inf)
            self.mask = mask[:, None, None]  # [n, 1, 1, used], added to the scores

    def copy_row(self, source: int, target: int) -> None:
        for keys, values in self.layers.values():
            keys[target], values[target] = keys[source], values[source]

    def attend(self, layer: SelfAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Core attention of `layer`: query [S, n, heads, D], key and value [S, n, groups, D] -> [S, n, heads * D].

        A prompt's padding behind its last token leaves keys that no position up to there attends to, and that the
        response overwrites token by token.
        """
        length, n, heads, head_dim = query.shape
        groups = key.shape[2]
        query, key = self._rotate(torch.cat((query, key), dim=2)).split((heads, groups), dim=2)
        if layer.layer_number not in self.layers:
            # Zeros, not what the memory last held: a masked slot that holds NaN would still spoil the sum.
            memory = key.new_zeros(2, self.shape[0], groups, self.shape[1], head_dim)
            self.layers[layer.layer_number] = (memory[0], memory[1])
        keys, values = self.layers[layer.layer_number]
        scale = layer.config.softmax_scale
        if self.prefill:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            keys[self.rows, :, :length], values[self.rows, :, :length] = key, value
            context = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            return context.permute(2, 0, 1, 3).reshape(length, n, heads * head_dim)
        keys[self.target], values[self.target] = key[0], value[0]
        # The heads of a query group read the same keys: as that group's "queries" they need no copies of them.
        query = query.reshape(n, groups, heads // groups, head_dim)
        context = functional.scaled_dot_product_attention(
            query, keys[self.used], values[self.used], attn_mask=self.mask, scale=scale
        )
        return context.reshape(1, n, heads * head_dim)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def _round_up(length: int) -> int:
    return round_up(length, _MASK_MULTIPLE)


# The forward functions below stand in for Megatron's while decoding: the same products and sums, without autograd
# functions, dropout, recomputation and cross attention, whose host time is what a small batch of tokens waits for.


def _block(module: TransformerBlock, hidden_states: Tensor | None, **kwargs: Any) -> Tensor:
    hidden_states = hidden_states if module.pre_process else module.input_tensor
    for layer in module.layers:
        hidden_states, _ = layer(hidden_states)
    return hidden_states if module.final_layernorm is None else module.final_layernorm(hidden_states)


def _layer(module: TransformerLayer, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    for norm, block in (
        (module.input_layernorm, module.self_attention),
        (module.pre_mlp_layernorm, module.mlp),
    ):
        out, bias = block(norm(hidden_states))
        hidden_states = hidden_states + (out if bias is None else out + bias)
    return hidden_states, None


def _attention(cache: KVCache, module: SelfAttention, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    query, key, value = module.get_query_key_value_tensors(hidden_states)
    return module.linear_proj(cache.attend(module, query, key, value))


def _column_parallel(module: torch.nn.Module, x: Tensor, weight: Tensor | None = None, **kwargs: Any) -> Any:
    added, left = _bias(module)
    return functional.linear(x, module.weight if weight is None else weight, added), left


def _norm_column_parallel(module: torch.nn.Module, x: Tensor) -> Any:
    """Transformer Engine's layer with the norm before it inside."""
    return _column_parallel(module, functional.rms_norm(x, x.shape[-1:], module.layer_norm_weight, module.eps))


def _row_parallel(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    out = all_reduce(functional.linear(x, module.weight), ReduceOp.SUM, module.tp_group)
    added, left = _bias(module)
    return out if added is None else out + added, left


def _bias(module: torch.nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """(what the layer adds, what it leaves to its caller), by Megatron's names or by Transformer Engine's, whose layers
    keep an empty tensor where there is no bias."""
    own = vars(module)  # a module itself would raise and catch an exception for what it lacks, in each layer's call
    bias = module.bias if own.get("use_bias", True) else None
    leaves_it = own.get("te_return_bias", own.get("skip_bias_add"))
    return (None, bias) if leaves_it else (bias, None)


# Transformer Engine's own Python takes three times as long as the product of a few tokens.
_ENGINE: dict[type, Callable[..., Any]] = {}
if HAVE_TE:
    from megatron.core.extensions import transformer_engine as te

    _ENGINE = {
        te.TELayerNormColumnParallelLinear: _norm_column_parallel,
        te.TEColumnParallelLinear: _column_parallel,
        te.TERowParallelLinear: _row_parallel,
    }

# Set on every module and config that has them. Sequence parallelism: one token cannot be split over ranks.
# FP8: a decoding batch breaks its multiple-of-8 rule. Fused SwiGLU: an autograd function, compiled for each shape.
_SETTINGS = {
    "sequence_parallel": False,
    "scatter_to_sequence_parallel": False,
    "reduce_scatter_embeddings": False,
    "fp8": None,
    "bias_activation_fusion": False,
}


@contextmanager
def decoding(model: GPTModel, cache: KVCache) -> Iterator[None]:
    """Let `model` decode over `cache`; put it back as it was, whatever happens."""
    stand_ins = {
        TransformerBlock: _block,
        TransformerLayer: _layer,
        SelfAttention: partial(_attention, cache),
        ColumnParallelLinear: _column_parallel,
        RowParallelLinear: _row_parallel,
        **_ENGINE,
    }
    owners: dict[int, Any] = {}
    forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
    for module in model.modules():
        owners[id(module)] = module
        if hasattr(module, "config"):
            owners[id(module.config)] = module.config
        if type(module) in stand_ins:
            forwards[module] = partial(stand_ins[type(module)], module)
    changed = [(o, name, getattr(o, name)) for o in owners.values() for name in _SETTINGS if getattr(o, name, None)]
    was_training = model.training
    try:
        model.eval()
        for owner, name, _ in changed:
            setattr(owner, name, _SETTINGS[name])
        for module, forward in forwards.items():
            module.forward = forward
        with sdpa_kernel(_ATTENTION):
            yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
        for owner, name, value in changed:
            setattr(owner, name, value)
        model.train(was_training)
