"""Helpers for a Megatron GPT chunk of either model: its bare module, its final hidden states, its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn


def unwrap(module: nn.Module) -> MCoreGPTModel:
    """The GPT model inside NeMo's, DDP's and the mixed-precision wrappers."""
    while not isinstance(module, MCoreGPTModel):
        module = module.module
    return module


@contextmanager
def hidden_states_only(module: nn.Module) -> Iterator[None]:
    """Let the last pipeline stage return its final hidden states `[S, B, H]` (sequence-sharded under sequence
    parallelism) instead of logits: Megatron does so when `post_process` is off.

    Megatron's own forward would transpose and copy `[B, S, V/TP]` logits, 0.3 MB a token at 152k columns.
    """
    gpt = unwrap(module)
    post_process, gpt.post_process = gpt.post_process, False
    try:
        yield
    finally:
        gpt.post_process = post_process


def sequence_shard(x: Tensor, sequence_parallel: bool) -> Tensor:
    """This tensor-parallel rank's rows of `[S, ...]` under sequence parallelism; all of them without."""
    if not sequence_parallel:
        return x
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    return x.chunk(size, dim=0)[rank]


def head_weight(gpt: MCoreGPTModel) -> Tensor:
    """Output weight `[V/TP, H]` of the last stage: the embedding's where the two are tied."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def vocab_parallel_logits(gpt: MCoreGPTModel, hidden: Tensor) -> Tensor:
    """Logits `[S, B, V/TP]` of final hidden states `[S (/TP), B, H]` through the model's own output layer."""
    weight = head_weight(gpt)
    # The mixed-precision wrapper returns fp32: the cast back is exact, and the head runs in its own dtype.
    logits, _ = gpt.output_layer(hidden.to(weight.dtype), weight=weight)
    return logits


def context_parallel_slice(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's two chunks of every `[B, S]` tensor, in Megatron's zig-zag order."""
    rows = {name: value for name, value in batch.items() if value.dim() == 2}
    return {**batch, **get_batch_on_this_cp_rank(rows)}
