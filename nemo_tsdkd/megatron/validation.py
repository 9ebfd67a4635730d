"""Validation in the loop: the student answers held-out prompts, verifiers judge, all ranks share the work.

Nothing that training reads is changed: responses are keyed by (seed, step, prompt) and greedy by default, no generator
is drawn from, and the KV cache and CUDA graphs of the decoding are free again before the next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.checkpoints.best import Scores
from nemo_tsdkd.checkpoints.run_record import content_digest
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.data.held_out import Problem, held_out_digest
from nemo_tsdkd.data.tokenizer import load_tokenizer
from nemo_tsdkd.megatron.gpt import context_parallel_slice, hidden_states_only, unwrap
from nemo_tsdkd.megatron.model import DistillationBatch, TSDKDModel
from nemo_tsdkd.megatron.samples import as_sample
from nemo_tsdkd.reporting.accuracy import ACCURACY, DIVERGENCE, validation_metrics
from nemo_tsdkd.rollout.schedule import Response, interleave
from nemo_tsdkd.verifiers import NONE, Verdict
from nemo_tsdkd.verifiers.judge import judge_all

logger = logging.getLogger(__name__)
_NOISE_STEP = 2**40  # key of the noise, where temperature is above 0: no training step has it


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run."""

    problems: list[Problem]


class Validate(pl.Callback):
    """Validates before the first step and after each step that is due; leaves the metrics in
    `strategy.validation_metrics`, samples in `strategy.samples` and the scores of all validations in `scores`."""

    def __init__(self, config: TrainConfig, held_out: HeldOut) -> None:
        self.config, self.held_out = config, held_out
        self._tokenizer: PreTrainedTokenizerBase | None = None
        settings, judged = config.validation, config.validation.verifier != NONE
        depends_on = {
            "problems": held_out_digest(held_out.problems),
            "verifier": settings.verifier,
            "limits": [_max_new_tokens(config), config.data.seq_length],
            "temperature": settings.temperature,
        }
        self.scores = Scores(ACCURACY if judged else DIVERGENCE, content_digest(depends_on), higher_is_better=judged)

    def on_train_start(self, trainer: pl.Trainer, model: TSDKDModel) -> None:
        self._tokenizer = load_tokenizer(self.config.student.path)
        before = Scores.read(Path(trainer.ckpt_path)) if trainer.ckpt_path else None
        if before and before.compares(self.scores):
            self.scores.scores = before.scores
        elif before:
            logger.info(
                "validation: its prompts or settings have changed: earlier scores do not compare with new ones."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, model: TSDKDModel, batch: Any, batch_idx: int) -> None:
        """The validation at the start comes here, since a stop signal is only noted from `on_train_start` on."""
        if trainer.global_step == 0 and self.config.validation.at_start:
            self._validate(trainer, model, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.config.validation.every_n_steps == 0 or step == trainer.max_steps:
            self._validate(trainer, model, step)

    def _validate(self, trainer: pl.Trainer, model: TSDKDModel, step: int) -> None:
        start = time.perf_counter()
        problems, config = self.held_out.problems, self.config
        assert self._tokenizer is not None
        responses, verdicts = answer(model, problems, self._tokenizer, f"the validation after step {step}")
        metrics = validation_metrics(responses, verdicts)
        shown = range(min(config.samples.count, len(problems)))
        looked_at = shown if verdicts is not None else range(len(problems))
        asked = [problem.sample for problem in problems]
        seen, divergence = look(model, [asked[i] for i in looked_at], [responses[i] for i in looked_at], shown)
        if verdicts is None:
            metrics[DIVERGENCE] = divergence
        self.scores.scores.append((step, metrics[self.scores.metric]))
        trainer.strategy.validation_metrics = metrics | {"validation_s": time.perf_counter() - start}
        made = {"kind": "validation", "on_policy": True}
        trainer.strategy.samples = [
            *trainer.strategy.samples,
            *(
                as_sample(step, asked[i], responses[i], seen[asked[i].index])
                | made
                | {"verdict": asdict(verdicts[i]) if verdicts is not None else None}
                for i in shown
            ),
        ]


def _max_new_tokens(config: TrainConfig) -> int:
    return config.validation.max_new_tokens or config.rollout.max_new_tokens


def answer(
    model: TSDKDModel, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, what: str
) -> tuple[list[Response], list[Verdict] | None]:
    """The student's response to each problem and the verdict on it; no verdicts with the verifier `none`. Collective;
    every TP x PP block generates and judges a share, every rank gets all.

    Args:
        what: this validation, for messages.

    Raises:
        FloatingPointError: on every rank, where the student has broken logits.
        RuntimeError: on every rank, where a verifier's process does not start.
    """
    config, verifier = model.train_config, model.train_config.validation.verifier
    rollout = replace(
        config.rollout,
        max_new_tokens=_max_new_tokens(config),
        temperature=config.validation.temperature,
        top_k=0,
        top_p=1.0,
    )
    block = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    blocks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    mine = problems[block::blocks]
    responses = model.generate([problem.sample for problem in mine], rollout, _NOISE_STEP, what)
    part: Any = None
    if parallel_state.get_model_parallel_group().rank() == 0:  # one rank of the block speaks for it
        texts = [tokenizer.decode(response.token_ids, skip_special_tokens=True) for response in responses]
        part = block, responses, _judge(verifier, texts, [problem.reference for problem in mine])
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part, group=model.long_timeout_group)
    shares = sorted((share for share in parts if share is not None), key=lambda share: share[0])
    if failure := next((judged for _, _, judged in shares if isinstance(judged, str)), None):
        raise RuntimeError(failure)
    all_responses = interleave([share[1] for share in shares])
    if verifier == NONE:
        return all_responses, None
    return all_responses, interleave([share[2] for share in shares])


def _judge(verifier: str, responses: Sequence[str], references: Sequence[Any]) -> list[Verdict] | str | None:
    """The verdicts, or why there are none."""
    if verifier == NONE:
        return None
    try:
        return judge_all(verifier, responses, references)
    except (RuntimeError, OSError) as error:
        return f"validation: {error}"


def look(
    model: TSDKDModel, samples: Sequence[Sample], responses: Sequence[Response], shown: Sequence[int]
) -> tuple[dict[int, dict[str, list[Any]]], float]:
    """What the objective sees of some held-out sequences (by `sample.index`, for those at the places `shown`), and the
    mean over sequences of their mean divergence, in nats a response token. Both models read; nothing is trained.
    Collective; every rank gets all.
    """
    config = model.train_config
    share = config.global_batch_size // config.data_parallel_size
    first = parallel_state.get_data_parallel_rank() * share
    nothing = Sample(-1, [model.vocabulary.pad_id], []), Response([], truncated=False)
    wanted = {samples[i].index for i in shown}
    found: list[Any] = []
    for begin in range(0, len(samples), config.global_batch_size):
        rows = slice(begin + first, begin + first + share)
        pairs = list(zip(samples[rows], responses[rows], strict=True))
        _read(model, *zip(*pairs, *[nothing] * (share - len(pairs)), strict=True))
        for index, tokens in model.take_seen():
            if index >= 0:
                mean = sum(tokens["divergence"]) / max(1, len(tokens["divergence"]))
                found.append((index, mean, tokens if index in wanted else None))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found, group=model.long_timeout_group)
    all_found = sorted((row for part in parts for row in part), key=lambda row: row[0])
    means = [mean for _, mean, _ in all_found]
    seen = {index: tokens for index, _, tokens in all_found if tokens is not None}
    return seen, sum(means) / len(means) if means else 0.0


@torch.no_grad()
def _read(model: TSDKDModel, samples: Sequence[Sample], responses: Sequence[Response]) -> None:
    """Both models read a global batch, and the model keeps what the objective sees."""
    micro_batches, hidden = model.read(samples, responses)
    batches = [
        DistillationBatch(context_parallel_slice(batch), share, loss_weight=0.0)
        for batch, share in zip(micro_batches, hidden, strict=True)
    ]
    gpt = unwrap(model.module)

    def forward_step(batches: Iterator[DistillationBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        with hidden_states_only(chunk):
            output = chunk(batch.micro_batch["tokens"], batch.micro_batch["position_ids"], None)

        def keep(output: torch.Tensor, non_loss_data: bool = True) -> None:
            """Megatron calls this on the last stage."""
            model.loss(batch, output)

        return output, keep

    training, model.sees = gpt.training, True
    gpt.eval()
    try:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=gpt,
            num_microbatches=len(batches),
            seq_length=batches[0].micro_batch["tokens"].shape[1],  # the pipeline exchanges each micro-batch's shape
            micro_batch_size=batches[0].micro_batch["tokens"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        gpt.train(training)
        model.sees = False
