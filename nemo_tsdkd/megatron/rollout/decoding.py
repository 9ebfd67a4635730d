"""Decoding with a Megatron GPTModel: its attention uses a KV cache, and operations for training only are skipped.

The model's own layers compute. While it decodes, core attention reads a cache in which every row has its own length. So
prompts may have different lengths, a new sequence can take the row of a finished one, and the same code runs with and
without Transformer Engine. Tokens have their true positions, as in training on the response.

Megatron-core 0.15's own engines are not used: they gather the vocabulary on every rank and draw from a generator, so
that a response would depend on its batch and layout; and batches of different lengths need the flash-attn package.
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
from megatron.core.transformer.mlp import MLP
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

# Not cuDNN, torch's first choice on an H100: it makes a plan for each new shape, and every pass of decoding has one.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# The cache's used length grows in such steps: few shapes, so few graphs; and memory-efficient attention wants 16.
USED_MULTIPLE = 64


def check_model(model: GPTModel) -> None:
    """Raise UserError for a model that this code would decode wrongly."""
    config = model.config
    rules = {
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "num_moe_experts": (config.num_moe_experts, None),
        "multi_latent_attention": (config.multi_latent_attention, False),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "window_size": (config.window_size, None),
        "softmax_type": (config.softmax_type, "vanilla"),
        "normalization": (config.normalization, "RMSNorm"),
        "layernorm_zero_centered_gamma": (config.layernorm_zero_centered_gamma, False),
        "gated_linear_unit": (config.gated_linear_unit, True),
        "activation_func": (config.activation_func, functional.silu),
        "activation_func_clamp_value": (config.activation_func_clamp_value, None),
        "glu_linear_offset": (config.glu_linear_offset, 0.0),
        "virtual_pipeline_model_parallel_size": (config.virtual_pipeline_model_parallel_size, None),
    }
    for name, (value, supported) in rules.items():
        if value != supported:
            raise UserError(
                f"{name} = {value!r}: rollouts decode models with {supported!r} only. Write the responses "
                "elsewhere and train on the file with rollout.lmbda = 0, or change the model or its layout."
            )


class KVCache:
    """Rotated keys and values of every layer of this stage, and the positions that the current pass reads and writes.

    Args:
        rows: sequences it holds.
        length: positions of each; rounded up to a multiple of USED_MULTIPLE.
    """

    def __init__(self, model: GPTModel, rows: int, length: int) -> None:
        self.rows, self.length = rows, used_bucket(length)
        parameter = next(model.parameters())
        self.device = parameter.device
        attention = [layer.self_attention for layer in model.decoder.layers]
        groups, head_dim = attention[0].num_query_groups_per_partition, attention[0].hidden_size_per_attention_head
        # Zeros, not uninitialized memory: a NaN in a masked position would spoil the sum.
        shape = (len(attention), 2, rows, groups, self.length, head_dim)
        self._memory = torch.zeros(shape, dtype=parameter.dtype, device=self.device)
        self._layers = {a.layer_number: memory for a, memory in zip(attention, self._memory, strict=True)}
        # Where a row's and group's positions begin in a layer's keys or values, seen as [rows * groups * length, D].
        self._starts = torch.arange(rows * groups, device=self.device).view(rows, groups) * self.length
        # packed_seq=True: every position, also under context parallelism, whose ranks all decode the same.
        angles = model.rotary_pos_emb(self.length, packed_seq=True).squeeze(2)  # [length, 1, D]
        self._rotations = torch.stack((angles.cos(), angles.sin())).to(parameter.dtype)
        self._slots = torch.arange(self.length, device=self.device)

    def begin_prefill(self, rows: slice, length: int) -> None:
        """Set the layers to write the first `length` positions of `rows`."""
        self._prefill = rows
        self._cos, self._sin = self._rotations[:, :length].unsqueeze(3)  # [S, 1, 1, D]

    def begin_step(self, positions: Tensor, used: int) -> None:
        """Set the layers to write one position of each of the first rows, [n], and to attend to `used` positions;
        compute what all layers share. Device work only, so that a graph can capture it."""
        n = len(positions)
        self._prefill = None
        self._cos, self._sin = self._rotations[:, positions].transpose(1, 2).unsqueeze(3)  # [1, n, 1, D]
        self._places = (self._starts[:n] + positions[:, None]).flatten()  # [n * groups]
        self._used = (slice(n), slice(None), slice(used))
        later = self._slots[:used] > positions[:, None]
        mask = self._rotations.new_zeros(n, used).masked_fill_(later, -torch.inf)
        self._mask = mask[:, None, None]  # [n, 1, 1, used], added to the scores

    def copy_row(self, source: int, target: int) -> None:
        self._memory[:, :, target] = self._memory[:, :, source]

    def attend(self, layer: SelfAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Core attention of `layer`: query [S, n, heads, D], key and value [S, n, groups, D] -> [S, n, heads * D].

        Padding after a prompt leaves keys that no position of the prompt attends to; the response's tokens overwrite
        them.
        """
        length, n, heads, head_dim = query.shape
        groups = key.shape[2]
        query, key = self._rotate(torch.cat((query, key), dim=2)).split((heads, groups), dim=2)
        keys, values = self._layers[layer.layer_number]
        scale = layer.config.softmax_scale
        if self._prefill is not None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            keys[self._prefill, :, :length], values[self._prefill, :, :length] = key, value
            context = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            return context.permute(2, 0, 1, 3).reshape(length, n, heads * head_dim)
        for memory, new in ((keys, key), (values, value)):
            memory.view(-1, head_dim).index_copy_(0, self._places, new.reshape(-1, head_dim))
        # The heads of a query group read the same keys: as that group's "queries" they need no copies of them.
        query = query.reshape(n, groups, heads // groups, head_dim)
        context = functional.scaled_dot_product_attention(
            query, keys[self._used], values[self._used], attn_mask=self._mask, scale=scale
        )
        return context.reshape(1, n, heads * head_dim)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin


def used_bucket(length: int) -> int:
    """How many positions a step attends to so that `length` are among them."""
    return round_up(length, USED_MULTIPLE)


# The forward functions below replace Megatron's while decoding: the same products and sums, without autograd functions,
# dropout, recomputation and cross attention, whose host time dominates for a small batch of tokens.


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


def _mlp(module: MLP, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    gate_and_up, bias = module.linear_fc1(hidden_states)
    gate, up = (gate_and_up if bias is None else gate_and_up + bias).chunk(2, dim=-1)
    return module.linear_fc2(functional.silu(gate).mul_(up))


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
    own = vars(module)  # getattr of a missing attribute on a module is slow, and this runs in each layer
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
    """Make `model` decode with `cache` in the block; restore it afterwards, also after an error."""
    replacements = {
        TransformerBlock: _block,
        TransformerLayer: _layer,
        SelfAttention: partial(_attention, cache),
        MLP: _mlp,
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
        if type(module) in replacements:
            forwards[module] = partial(replacements[type(module)], module)
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
