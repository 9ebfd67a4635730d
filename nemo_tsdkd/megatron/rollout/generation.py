"""Generate responses with a Megatron GPTModel under tensor and pipeline parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tsdkd.config.schema import RolloutConfig
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.distributed.counters import sample_keys
from nemo_tsdkd.distributed.vocab_parallel import group_size
from nemo_tsdkd.megatron.gpt import vocab_parallel_logits
from nemo_tsdkd.megatron.rollout.decoding import KVCache, check_model, decoding, used_bucket
from nemo_tsdkd.megatron.rollout.graphs import Regions, new_capture
from nemo_tsdkd.rollout.rows import Rows
from nemo_tsdkd.rollout.sampling import NO_TOKEN, sample
from nemo_tsdkd.rollout.schedule import NOTHING, Prefill, Response, Schedule, row_bucket


def generate(
    model: GPTModel,
    prompts: list[list[int]],
    *,
    rollout_config: RolloutConfig,
    sample_ids: list[int],
    seed: int,
    step: int,
    vocabulary: Vocabulary,
    max_length: int,
    tp_group: ProcessGroup | None,
    pp_group: ProcessGroup | None,
) -> list[Response]:
    """Generate a response to every prompt. Call it on all ranks of a TP x PP block; each gets all responses.

    A response depends on its prompt, the weights and (seed, step, sample id) only; layout, batch and order can show
    through rounding alone, where two tokens nearly tie.

    Args:
        model: this rank's unwrapped pipeline stage; its settings (mode, sequence parallelism, FP8) are restored.
        prompts: token ids, ragged.
        sample_ids: one non-negative id per prompt, its index in the data set; seeds its noise.
        vocabulary: the tokens that may be drawn, and which of them end a response.
        max_length: limit of prompt + response in tokens.
        tp_group, pp_group: this rank's groups; None means not parallel.

    Raises:
        UserError: the model is not supported, or a prompt is empty or fills `max_length`.
        FloatingPointError: the student's logits are NaN or infinite, so that no token can be drawn.
    """
    groups = {"tp_group": tp_group, "pp_group": pp_group}
    with Decoder(model, rollout_config=rollout_config, vocabulary=vocabulary, **groups) as decoder:
        return decoder.generate(prompts, sample_ids=sample_ids, seed=seed, step=step, max_length=max_length)


class Decoder:
    """`generate` for several calls with one model: holds the KV cache and the CUDA graphs between them.

    The graphs read the weights at their addresses of the capture. An optimizer step changes weights in place and keeps
    the graphs; if any weight has moved, the next call drops them. All memory is free again after `release()`,
    or at the end of a `with` block.
    """

    def __init__(
        self,
        model: GPTModel,
        *,
        rollout_config: RolloutConfig,
        vocabulary: Vocabulary,
        tp_group: ProcessGroup | None,
        pp_group: ProcessGroup | None,
    ) -> None:
        check_model(model)
        self.model, self.rollout_config, self.vocabulary = model, rollout_config, vocabulary
        self.tp_group, self.pp_group = tp_group, pp_group
        self.cache: KVCache | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def release(self) -> None:
        """Free the KV cache, the graphs and their pool; the next call builds them again."""
        captured = self.cache is not None and self.regions.captured
        self.cache = None
        for name in ("regions", "rows", "received", "sent"):
            vars(self).pop(name, None)
        if captured:
            torch.cuda.empty_cache()  # a graph's pool stays reserved until then

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], *, sample_ids: list[int], seed: int, step: int, max_length: int
    ) -> list[Response]:
        """As `generate`, with this decoder's model, configuration, vocabulary and groups."""
        schedule = Schedule(
            prompts,
            batch_size=self.rollout_config.batch_size,
            max_new_tokens=self.rollout_config.max_new_tokens,
            max_length=max_length,
            eos_ids=self.vocabulary.eos_ids,
        )
        if schedule.finished:
            return []
        self._reserve(min(self.rollout_config.batch_size, len(prompts)), schedule.cache_length)
        keys = sample_keys(seed, step, torch.tensor(sample_ids))
        with decoding(self.model, self.cache):
            while not schedule.finished:
                prefills = schedule.admit()
                self.rows.load(schedule.rows(), keys)
                for prefill in prefills:
                    self._prefill(prefill)
                rows, window = len(schedule.live), schedule.window(self.rollout_config.sync_every)
                for used in window:
                    self._step(row_bucket(rows, self.cache.rows), used_bucket(used))
                history = self.rows.read(rows, len(window))  # equal on all ranks of the block: they stop together
                self._check_drawn(schedule, history, sample_ids)
                for source, target in schedule.record(history):
                    self.cache.copy_row(source, target)
        return schedule.responses()

    def _check_drawn(self, schedule: Schedule, history: list[list[int]], sample_ids: list[int]) -> None:
        for row, sequence in enumerate(schedule.live):
            tokens = [drawn[row] for drawn in history if drawn[row] != NOTHING]
            if NO_TOKEN in tokens:
                raise FloatingPointError(
                    f"response token {len(schedule.written[sequence]) + tokens.index(NO_TOKEN)} of sample "
                    f"{sample_ids[sequence]}: the student's logits are NaN, +inf or nothing but -inf, so no token can "
                    "be drawn."
                )

    def _reserve(self, rows: int, length: int) -> None:
        """Allocate the cache for as many rows and positions, and drop graphs that read moved weights."""
        weights = [parameter.data_ptr() for parameter in self.model.parameters()]
        cache = self.cache
        if cache is not None and rows <= cache.rows and length <= cache.length:
            if weights != self.weights:
                self.regions.clear()
                self.weights = weights
            return
        if cache is not None:
            rows, length = max(rows, cache.rows), max(length, cache.length)
        self.release()
        self.weights = weights
        self.cache = KVCache(self.model, rows, length)
        device, config = self.cache.device, self.model.config
        self.regions = Regions(new_capture(self.rollout_config.cuda_graphs, device, self.tp_group))
        self.rows = Rows(rows, self.rollout_config.sync_every, self.vocabulary.eos_ids, device)
        if group_size(self.pp_group) > 1:
            # Between stages: [1, rows, H]. The graphs of one stage write what is sent and read what is received.
            self.received, self.sent = torch.zeros(
                2, 1, rows, config.hidden_size, dtype=config.pipeline_dtype, device=device
            )

    def _step(self, n: int, used: int) -> None:
        """One decode step of the first `n` rows over `used` positions: one region, or, where stages exchange hidden
        states and tokens in between, two."""
        rows = slice(n)
        if group_size(self.pp_group) == 1:
            self.regions.run((n, used), lambda: (self._forward(rows, used), self.rows.advance(rows)))
            return
        if not self.model.pre_process:
            dist.recv(self.received[:, rows], group=self.pp_group, group_src=self.pp_group.rank() - 1)
        self.regions.run((n, used), partial(self._forward, rows, used))
        if not self.model.post_process:
            dist.send(self.sent[:, rows], group=self.pp_group, group_dst=self.pp_group.rank() + 1)
        self._share_tokens(rows)
        self.regions.run(n, partial(self.rows.advance, rows))

    def _forward(self, rows: slice, used: int) -> None:
        """This stage's part of a step, from and to fixed tensors."""
        state = self.rows
        state.next_pass()
        self.cache.begin_step(state.positions[rows], used)
        if self.model.pre_process:
            hidden = self.model.embedding(state.tokens[rows, None], position_ids=None)  # [1, n, H]
        else:
            hidden = None
            self.model.set_input_tensor(self.received[:, rows])
        hidden = self.model.decoder(hidden_states=hidden, attention_mask=None)  # the cache's attention masks
        if self.model.post_process:
            self._draw(hidden, rows)
        else:
            self.sent[:, rows] = hidden

    def _prefill(self, prefill: Prefill) -> None:
        """Run prompts through the pipeline and draw the first token of each response. Never captured: shapes
        differ."""
        n, length = len(prefill.prompts), len(prefill.prompts[0])
        rows = slice(prefill.first_row, prefill.first_row + n)
        self.cache.begin_prefill(rows, length)
        device, config = self.cache.device, self.model.config
        if self.model.pre_process:
            padded = [ids + [0] * (length - len(ids)) for ids in prefill.prompts]
            hidden = self.model.embedding(torch.tensor(padded, device=device), position_ids=None)  # [S, n, H]
        else:
            hidden = torch.empty(length, n, config.hidden_size, dtype=config.pipeline_dtype, device=device)
            dist.recv(hidden, group=self.pp_group, group_src=self.pp_group.rank() - 1)
            self.model.set_input_tensor(hidden)
        hidden = self.model.decoder(hidden_states=hidden, attention_mask=None)
        if self.model.post_process:
            self._draw(hidden[self.rows.positions[rows], torch.arange(n, device=device)].unsqueeze(0), rows)
        else:
            dist.send(hidden, group=self.pp_group, group_dst=self.pp_group.rank() + 1)
        self._share_tokens(rows)
        self.rows.advance(rows)

    def _draw(self, hidden: Tensor, rows: slice) -> None:
        """Draw each row's next token from its final hidden state, [1, n, H]."""
        self.rows.tokens[rows] = sample(
            vocab_parallel_logits(self.model, hidden)[0],
            self.rows.noise(rows),
            temperature=self.rollout_config.temperature,
            top_k=self.rollout_config.top_k,
            top_p=self.rollout_config.top_p,
            vocab_size=self.vocabulary.size,
            tp_group=self.tp_group,
            check=False,  # a wait for the device; `_check_drawn` looks at each window's end
        )

    def _share_tokens(self, rows: slice) -> None:
        """Broadcast tokens from the last stage, which draws them, to all."""
        if group_size(self.pp_group) > 1:
            dist.broadcast(self.rows.tokens[rows], group=self.pp_group, group_src=group_size(self.pp_group) - 1)
