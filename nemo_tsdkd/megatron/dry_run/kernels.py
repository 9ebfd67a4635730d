"""Stand-ins for the GPU's fused kernels: their shapes, what they keep for the backward pass and their FLOPs.

Their values mean nothing; they are finite.

Megatron's own modules, which run where Transformer Engine does not import, keep more than its kernels do: attention
scores, fp32 copies in a norm. Each stand-in below names the tensors that Transformer Engine 2's module saves;
tests/engine/test_kept_activations.py measures those on its real Python code.
"""

from __future__ import annotations

import math
from typing import Any

import megatron.core.fusions.fused_bias_swiglu as swiglu
import megatron.core.optimizer.clip_grads as clip_grads
import megatron.core.transformer.attention as attention
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

import nemo_tsdkd.objective.function as function
import nemo_tsdkd.objective.heads as heads
import nemo_tsdkd.objective.observe as observe
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.ledger import Ledger
from nemo_tsdkd.megatron.rollout import decoding
from nemo_tsdkd.objective.passes import Passes
from nemo_tsdkd.objective.terms import SoftmaxSums


class _Norm(torch.autograd.Function):
    """RMS norm. Saves the input, the weight and an fp32 number a token, as TE's RMSNorm and LayerNormLinear do (the
    latter's product saves the output, too)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_zeros(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x).copy_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


class _Attention(torch.autograd.Function):
    """Causal flash attention on [S, B, heads, D]. Saves q, k, v, the output and an fp32 number a head and token."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, ledger: Ledger, positions: int) -> Tensor:
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_zeros(query.shape[:-1], dtype=torch.float32))
        ctx.ledger, ctx.flops = ledger, 2 * query.numel() * positions  # two products over half the pairs
        ledger.work(ctx.flops, (query, key, value, out))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, _ = ctx.saved_tensors
        ctx.ledger.work(5 * ctx.flops // 2, (query, key, value, out, grad))  # five products
        return *(torch.zeros_like(x) for x in (query, key, value)), None, None


class _Rope(torch.autograd.Function):
    """Rotary embedding. Saves the angles, which all layers share."""

    @staticmethod
    def forward(ctx, x: Tensor, angles: Tensor) -> Tensor:
        ctx.angles = angles
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(grad, memory_format=torch.contiguous_format), None


class NormColumnParallelLinear(ColumnParallelLinear):
    """The product with the norm before it inside, as TE has it: Megatron's recomputation of an MLP then repeats the
    norm, too."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        config = kwargs["config"]
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(_Norm.apply(x, self.layer_norm_weight), *args, **kwargs)


class CoreAttention(MegatronModule):
    """Core attention [S, B, heads, D] -> [S, B, heads * D] of any context-parallel size.

    Under context parallelism, TE's ring passes keys and values of `size - 1` other ranks forward, and they and their
    gradients backward: these messages are counted, not sent.
    """

    ledger: Ledger

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        length, rows, heads_, head_dim = query.shape
        value = value.contiguous()  # the kernel saves a copy without q and k
        size = self.config.context_parallel_size
        messages = (size - 1) * (3 if torch.is_grad_enabled() and query.requires_grad else 1)
        for _ in range(messages):
            self.ledger.exchange("cp", "ring", key.numel() * key.element_size() + value.numel() * value.element_size())
        out = _Attention.apply(query, key, value, self.ledger, length * size)
        return out.reshape(length, rows, heads_ * head_dim)


class BalancedExperts(MegatronModule):
    """A layer of experts in a pass without gradient, [S, B, H] -> [S, B, H], as if the router spread the tokens evenly.

    Holds what Megatron's does with the all-to-all dispatcher: for each expert of a token a copy as it is sent, as it
    arrives and sorted by expert, all until the layer's end; and the router's weights and choices until its next pass.
    """

    ledger: Ledger

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.group = parallel_state.get_expert_model_parallel_group()
        experts, hidden, ffn = config.num_moe_experts, config.hidden_size, config.moe_ffn_hidden_size
        local = experts // self.group.size()
        for name, shape in {
            "router": (experts, hidden),
            "linear_fc1": (local, 2 * ffn, hidden),
            "linear_fc2": (local, hidden, ffn),
        }.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        tokens = hidden.flatten(0, 1)
        self.weights = tokens.new_zeros(len(tokens), len(self.router), dtype=torch.float32)
        self.chosen = self.weights > 0
        copies = tokens.new_zeros(len(tokens) * self.config.moe_router_topk, tokens.shape[1])
        arrived = self._exchange(copies)
        sorted_copies = torch.zeros_like(arrived)
        output = self._product(self._swiglu(self._product(sorted_copies, self.linear_fc1)), self.linear_fc2)
        output = torch.zeros_like(output)  # in the order in which they arrived
        output = self._exchange(output)
        return torch.zeros_like(hidden), None

    def _exchange(self, copies: Tensor) -> Tensor:
        if self.group.size() == 1:
            return copies
        out = torch.empty_like(copies)
        torch.distributed.all_to_all_single(out, copies, group=self.group)
        return out

    def _product(self, x: Tensor, weights: Tensor) -> Tensor:
        """A grouped product: each row with the weight of its expert."""
        out = x.new_zeros(len(x), weights.shape[1])
        self.ledger.work(2 * x.numel() * weights.shape[1], (x, weights, out))
        return out

    def _swiglu(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), x.shape[1] // 2)


def layer_spec(config: Any) -> ModuleSpec:
    """Megatron's layer with these kernels in the places where Transformer Engine's layer has its own."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = NormColumnParallelLinear
    layer.self_attention.submodules.core_attention = CoreAttention
    if config.num_moe_experts:
        layer.mlp = ModuleSpec(module=BalancedExperts)
    else:
        layer.pre_mlp_layernorm = IdentityOp
        layer.mlp.submodules.linear_fc1 = NormColumnParallelLinear
    return spec


class FusedAdam(torch.optim.AdamW):
    """Two moments of each parameter's size, made in the first step; a step keeps nothing else. As TE's and Apex's."""

    ledger: Ledger

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    moments = torch.zeros_like(p), torch.zeros_like(p)
                    self.state[p].update(step=torch.tensor(0.0), exp_avg=moments[0], exp_avg_sq=moments[1])
                self.ledger.work(0, (p, p, p.grad, *[self.state[p][name] for name in ("exp_avg", "exp_avg_sq")] * 2))


def install(ledger: Ledger, config: TrainConfig) -> None:
    """Put the stand-ins in place of what runs without a GPU, for this process."""
    CoreAttention.ledger = BalancedExperts.ledger = FusedAdam.ledger = ledger
    attention.apply_rotary_pos_emb = lambda x, angles, *args, **kwargs: _Rope.apply(x, angles)
    swiglu.swiglu = ledger.kernel(lambda y: torch.zeros_like(y.chunk(2, -1)[0], memory_format=torch.contiguous_format))
    swiglu.swiglu_back = ledger.kernel(lambda grad, y: torch.zeros_like(y))
    _install_norm()
    torch.optim.AdamW = FusedAdam  # by this name Megatron takes it where neither TE nor Apex imports
    for name in ("l2_norm_impl", "multi_tensor_l2norm"):  # Apex's; without it each gradient is a few operators
        if hasattr(clip_grads, name):
            setattr(clip_grads, name, ledger.kernel(lambda chunk, overflow, tensors, *args: (torch.ones(1), None)))
    _install_decoding(ledger)
    heads._product = ledger.kernel(_product, flops=lambda hidden, weight, dtype: 2 * hidden.numel() * len(weight))
    if config.objective.compile != "off":
        compiled = _compiled(ledger)
        function.passes = observe.passes = lambda config, device: compiled


def _install_norm() -> None:
    """Megatron's norm without TE, of queries, keys and the last layer's output, is torch's: it computes in fp32."""
    original = WrappedTorchNorm.__new__

    class FusedNorm(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return _Norm.apply(x, self.weight)

    def new(cls: type, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm = original(cls, *args, **kwargs)
        norm.__class__ = FusedNorm
        return norm

    WrappedTorchNorm.__new__ = new


def _install_decoding(ledger: Ledger) -> None:
    """Decoding calls torch's functions, each of them one kernel on a GPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros_like(query)

    def flops(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **kwargs: Any) -> int:
        return 4 * query.numel() * key.shape[-2] // (2 if is_causal else 1)

    functional = torch.nn.functional
    functional.scaled_dot_product_attention = ledger.kernel(attend, flops)
    functional.rms_norm = ledger.kernel(lambda x, *args, **kwargs: x.clone())
    decoding._ENGINE[NormColumnParallelLinear] = decoding._norm_column_parallel


def _product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fused head's product: 16-bit inputs, stored in fp32 without copies of them in fp32."""
    return hidden.new_zeros(len(hidden), len(weight), dtype=dtype)


def _compiled(ledger: Ledger) -> Passes:
    """The objective's passes as one kernel each, which `torch.compile` makes of them on CUDA."""

    def softmax(logits: Tensor, temperature: float) -> SoftmaxSums:
        zeros, mass = (logits.new_full((len(logits),), value, dtype=torch.float32) for value in (0.0, math.e))
        return SoftmaxSums(zeros, mass, zeros.clone())  # an entropy of 1 nat, so no weight is zero

    def divergence(rule: Any, logits: tuple[Tensor, ...], *args: Any) -> Tensor:
        return logits[0].new_ones((2, len(logits[0])), dtype=torch.float32)

    def gradient(rule: Any, logits: tuple[Tensor, ...], *args: Any) -> Tensor:
        return torch.zeros_like(logits[0], dtype=torch.float32, memory_format=torch.contiguous_format)

    return Passes(*map(ledger.kernel, (softmax, divergence, gradient)), 1.0)
