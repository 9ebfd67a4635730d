"""Decodes with a Megatron GPTModel under tensor and pipeline parallelism: the student writes its own data.

The model's own layers do the work; only each layer's core attention is replaced, for as long as it decodes, by one
that keeps a KV cache in which every row has its own length. So prompts may be ragged, a finished sequence can leave
and another take its row, and the same code runs with or without Transformer Engine. Tokens sit at their true
positions: what the model sees here is what it sees when it is trained on the response.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tsdkd.config import RolloutConfig
from nemo_tsdkd.rollout import Pass, Response, Schedule
from nemo_tsdkd.sampling import fold, sample, step_key


@torch.no_grad()
def generate(
    model: GPTModel,
    prompts: list[list[int]],
    *,
    config: RolloutConfig,
    sample_ids: list[int],
    seed: int,
    step: int,
    eos_ids: set[int],
    vocab_size: int,
    max_length: int,
    tp_group: ProcessGroup | None,
    pp_group: ProcessGroup | None,
) -> list[Response]:
    """Write a response to every prompt; call on all ranks of a TP x PP block, each of which gets all responses.

    A response depends on its prompt, the weights and (seed, step, sample id) only; layout, batch and order can show
    through rounding alone, where two tokens nearly tie.

    Args:
        model: this rank's unwrapped pipeline stage; left as it was found (mode, sequence parallelism, FP8).
        prompts: token ids, ragged.
        sample_ids: one non-negative id per prompt, its identity in the data set; chooses its noise.
        eos_ids: tokens that end a response.
        vocab_size: true vocabulary size; padding columns beyond it are never drawn.
        max_length: limit of prompt + response in tokens.
        tp_group, pp_group: this rank's groups; None means not parallel.

    Raises:
        ValueError: the model is not one this decodes, or a prompt is empty or fills `max_length`.
    """
    _check_model(model)
    schedule = Schedule(
        prompts,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        max_length=max_length,
        eos_ids=eos_ids,
    )
    device = next(model.parameters()).device
    keys = fold(step_key(seed, step, device), torch.tensor(sample_ids, device=device))
    rows = min(config.batch_size, len(prompts))
    with _decoding(model, KVCache(rows, schedule.cache_length)) as cache:
        while not schedule.finished:
            batch = schedule.next_pass()
            logits = _forward(model, cache, batch, pp_group)
            if logits is not None:
                response_positions = [len(schedule.written[i]) for i in batch.sequences]
                tokens = sample(
                    logits,
                    fold(keys[batch.sequences], torch.tensor(response_positions, device=device)),
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    vocab_size=vocab_size,
                    tp_group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
                )
            else:
                tokens = torch.empty(len(batch.sequences), dtype=torch.int64, device=device)
            if pp_group is not None and pp_group.size() > 1:
                dist.broadcast(tokens, group=pp_group, group_src=pp_group.size() - 1)
            for source, target in schedule.record(batch, tokens.tolist()):
                cache.copy_row(source, target)
    return schedule.responses()


def _check_model(model: GPTModel) -> None:
    """Refuse what would decode wrongly rather than fail."""
    config = model.config
    rules = {
        "position_embedding_type": (model.position_embedding_type, model.position_embedding_type == "rope"),
        "multi_latent_attention": (config.multi_latent_attention, not config.multi_latent_attention),
        "window_size": (config.window_size, config.window_size is None),
        "softmax_type": (config.softmax_type, config.softmax_type == "vanilla"),
        "virtual pipeline stage": (model.vp_stage, model.vp_stage is None),
    }
    for name, (value, supported) in rules.items():
        if not supported:
            raise ValueError(
                f"{name} = {value!r}: rollouts decode rotary, full-attention GPT models without a virtual pipeline. "
                "Generate elsewhere and train on the file with lmbda = 0, or change the model or its layout."
            )


class KVCache:
    """Keys and values of every layer of this stage, [rows, query groups, length, head dim] each.

    `begin` says which rows and positions the next forward pass fills; the layers' attention follows it.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.layers: list[CachedAttention] = []

    def begin(self, batch: Pass, device: torch.device) -> None:
        self.row_slice = slice(batch.first_row, batch.first_row + len(batch.sequences))
        self.positions: Tensor | None = None
        if batch.prefill:
            return
        self.positions = torch.tensor(batch.positions, device=device)
        self.row_index = torch.arange(len(batch.positions), device=device)
        self.used = max(batch.positions) + 1
        slots = torch.arange(self.used, device=device)
        self.mask = (slots <= self.positions[:, None])[:, None, None]  # [n, 1, 1, used]

    def copy_row(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]


class CachedAttention(torch.nn.Module):
    """Core attention of one layer over the cache; no parameters.

    A prompt's padding behind its last token leaves keys that no position up to there attends to, and that the
    response overwrites token by token.
    """

    def __init__(self, cache: KVCache, softmax_scale: float | None) -> None:
        super().__init__()
        self.cache, self.softmax_scale = cache, softmax_scale
        self.keys: Tensor = torch.empty(0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [S, n, heads, D], key and value [S, n, groups, D], rotated -> context [S, n, heads * D]."""
        length, n, heads, head_dim = query.shape
        groups = key.shape[2]
        cache = self.cache
        if not self.keys.numel():
            self.keys = key.new_empty(cache.rows, groups, cache.length, head_dim)
            self.values = torch.empty_like(self.keys)
        if cache.positions is None:
            keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            self.keys[cache.row_slice, :, :length] = keys
            self.values[cache.row_slice, :, :length] = values
            context = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3), keys, values, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            return context.permute(2, 0, 1, 3).reshape(length, n, heads * head_dim)
        self.keys[cache.row_index, :, cache.positions] = key[0]
        self.values[cache.row_index, :, cache.positions] = value[0]
        # The heads of a query group read the same keys: as its "queries", these need not be repeated.
        context = torch.nn.functional.scaled_dot_product_attention(
            query.view(n, groups, heads // groups, head_dim),
            self.keys[:n, :, : cache.used],
            self.values[:n, :, : cache.used],
            attn_mask=cache.mask,
            scale=self.softmax_scale,
        )
        return context.reshape(1, n, heads * head_dim)


@contextmanager
def _decoding(model: GPTModel, cache: KVCache) -> Iterator[KVCache]:
    """Put `model` into decoding shape and, whatever happens, back."""
    settings = {
        "sequence_parallel": False,  # one token cannot be split over ranks
        "scatter_to_sequence_parallel": False,
        "reduce_scatter_embeddings": False,
        "apply_rope_fusion": False,  # the fused kernel knows one position for all rows
        "fp8": None,  # a decoding batch breaks FP8's multiple-of-8 rule
    }
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        if hasattr(module, "config"):
            owners[id(module.config)] = module.config
    changed = [(o, name, getattr(o, name)) for o in owners.values() for name in settings if getattr(o, name, None)]
    attentions = [layer.self_attention for layer in model.decoder.layers]
    originals = [attention.core_attention for attention in attentions]
    was_training = model.training
    try:
        model.eval()
        for owner, name, _ in changed:
            setattr(owner, name, settings[name])
        for attention in attentions:
            attention.core_attention = CachedAttention(cache, model.config.softmax_scale)
            cache.layers.append(attention.core_attention)
        yield cache
    finally:
        for attention, original in zip(attentions, originals, strict=True):
            attention.core_attention = original
        for owner, name, value in changed:
            setattr(owner, name, value)
        model.train(was_training)


def _forward(model: GPTModel, cache: KVCache, batch: Pass, pp_group: ProcessGroup | None) -> Tensor | None:
    """Run one pass through the pipeline; the last stage returns the logits [n, V_local] after each last token."""
    device = next(model.parameters()).device
    cache.begin(batch, device)
    n, length = len(batch.sequences), len(batch.token_ids[0])  # longest first: the others are padded to it
    if model.pre_process:
        tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in batch.token_ids], device=device)
        hidden = model.embedding(tokens, position_ids=None)  # [S, n, H]
    else:
        hidden = torch.empty(length, n, model.config.hidden_size, dtype=model.config.pipeline_dtype, device=device)
        dist.recv(hidden, group=pp_group, group_src=pp_group.rank() - 1)
        model.set_input_tensor(hidden)
    # packed_seq=True: all positions, also under context parallelism, whose ranks decode the same sequences.
    angles = model.rotary_pos_emb(cache.length, packed_seq=True)  # [cache length, 1, 1, D]
    angles = angles[:length] if cache.positions is None else angles[cache.positions].transpose(0, 1)
    hidden = model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)
    if not model.post_process:
        dist.send(hidden, group=pp_group, group_dst=pp_group.rank() + 1)
        return None
    if cache.positions is None:
        last = torch.tensor(batch.positions, device=device)
        hidden = hidden[last, torch.arange(n, device=device)].unsqueeze(0)
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=False)
    return logits[0]
