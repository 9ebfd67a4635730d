"""Decodes with a Megatron GPTModel under tensor and pipeline parallelism: the student writes its own data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tsdkd.config.schema import RolloutConfig
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.distributed.vocab_parallel import group_size
from nemo_tsdkd.megatron.gpt import vocab_parallel_logits
from nemo_tsdkd.megatron.rollout.decoding import KVCache, check_model, decoding
from nemo_tsdkd.rollout.sampling import NO_TOKEN, fold, sample, step_key
from nemo_tsdkd.rollout.schedule import Pass, Response, Schedule


@torch.no_grad()
def generate(
    model: GPTModel,
    prompts: list[list[int]],
    *,
    config: RolloutConfig,
    sample_ids: list[int],
    seed: int,
    step: int,
    vocabulary: Vocabulary,
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
        vocabulary: the tokens that may be drawn, and which of them end a response.
        max_length: limit of prompt + response in tokens.
        tp_group, pp_group: this rank's groups; None means not parallel.

    Raises:
        UserError: the model is not one this decodes, or a prompt is empty or fills `max_length`.
        FloatingPointError: the student's logits are broken, so that no token can be drawn.
    """
    check_model(model)
    schedule = Schedule(
        prompts,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        max_length=max_length,
        eos_ids=vocabulary.eos_ids,
    )
    cache = KVCache(model, min(config.batch_size, len(prompts)), schedule.cache_length)
    device = cache.device
    sample_keys = fold(step_key(seed, step, device), torch.tensor(sample_ids, device=device))
    positions = torch.arange(max(schedule.limits, default=0), device=device)
    keys = fold(sample_keys[:, None], positions)  # [prompts, response positions]
    with decoding(model, cache):
        while not schedule.finished:
            batch = schedule.next_pass()
            # Before the forward pass is launched: the indices' way to the device would wait for its end.
            if model.post_process:
                noise = keys[batch.sequences, [len(schedule.written[i]) for i in batch.sequences]]
            logits = _forward(model, cache, batch, pp_group)
            if logits is not None:
                tokens = sample(
                    logits,
                    noise,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    vocab_size=vocabulary.size,
                    tp_group=tp_group,
                    check=False,
                )
            else:
                tokens = torch.empty(len(batch.sequences), dtype=torch.int64, device=device)
            if group_size(pp_group) > 1:
                dist.broadcast(tokens, group=pp_group, group_src=group_size(pp_group) - 1)
            drawn = tokens.tolist()  # of the last stage, so that all ranks of the block stop together
            if NO_TOKEN in drawn:
                i = batch.sequences[drawn.index(NO_TOKEN)]
                raise FloatingPointError(
                    f"response token {len(schedule.written[i])} of sample {sample_ids[i]}: the student's logits are "
                    "NaN, +inf or nothing but -inf, so no token can be drawn."
                )
            for source, target in schedule.record(batch, drawn):
                cache.copy_row(source, target)
    return schedule.responses()


def _forward(model: GPTModel, cache: KVCache, batch: Pass, pp_group: ProcessGroup | None) -> Tensor | None:
    """Run one pass through the pipeline; the last stage returns the logits [n, V_local] after each last token."""
    cache.begin(batch)
    device = cache.device
    n, length = len(batch.sequences), len(batch.token_ids[0])  # longest first: the others are padded to it
    if model.pre_process:
        tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in batch.token_ids], device=device)
        hidden = model.embedding(tokens, position_ids=None)  # [S, n, H]
    else:
        hidden = torch.empty(length, n, model.config.hidden_size, dtype=model.config.pipeline_dtype, device=device)
        dist.recv(hidden, group=pp_group, group_src=pp_group.rank() - 1)
        model.set_input_tensor(hidden)
    hidden = model.decoder(hidden_states=hidden, attention_mask=None)  # the cache's attention rotates and masks
    if not model.post_process:
        dist.send(hidden, group=pp_group, group_dst=pp_group.rank() + 1)
        return None
    if batch.prefill:
        last = torch.tensor(batch.positions, device=device)
        hidden = hidden[last, torch.arange(n, device=device)].unsqueeze(0)
    return vocab_parallel_logits(model, hidden)[0]
