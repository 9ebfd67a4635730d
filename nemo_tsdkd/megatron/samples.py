"""Samples of training steps and validations: gathered from the ranks that hold them, written on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch.distributed as dist

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.data.tokenizer import load_tokenizer
from nemo_tsdkd.reporting.samples import SamplesWriter
from nemo_tsdkd.rollout.schedule import Response

if TYPE_CHECKING:
    from nemo_tsdkd.megatron.model import TSDKDModel


def samples_due(config: TrainConfig, step: int) -> bool:
    """Whether the training step number `step` (from 1) leaves samples."""
    settings = config.samples
    return settings.count > 0 and settings.every_n_steps > 0 and step % settings.every_n_steps == 0


def take_samples(
    model: TSDKDModel, samples: Sequence[Sample], responses: Sequence[Response], step: int
) -> list[dict[str, Any]]:
    """The first `samples.count` sequences of the global batch, with what the objective saw of them, on rank 0.
    Collective.

    Args:
        samples, responses: of this data-parallel rank.
        step: optimizer steps before this one.
    """
    config = model.train_config
    written = {s.index: (s, r) for s, r in zip(samples, responses, strict=True)}
    mine = []
    for index, tokens in model.take_seen():
        if index % config.global_batch_size < config.samples.count:
            made = {"kind": "train", "on_policy": model.is_on_policy(step), "verdict": None}
            mine.append(as_sample(step + 1, *written[index], tokens) | made)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts if dist.get_rank() == 0 else None, group=model.long_timeout_group)
    return sorted((s for part in parts for s in part or ()), key=lambda s: s["index"])


def as_sample(step: int, sample: Sample, response: Response, tokens: dict[str, list[Any]]) -> dict[str, Any]:
    """What `SamplesWriter` makes a line of: `step` optimizer steps are done with it."""
    return {
        "step": step,
        "index": sample.index,
        "prompt_ids": sample.prompt_ids,
        "response_ids": response.token_ids,
        "truncated": response.truncated,
        "tokens": tokens,
    }


class WriteSamples(pl.Callback):
    """Writes what `strategy.samples` holds after each step, on rank 0."""

    def __init__(self, run_dir: Path, student: str) -> None:
        self.run_dir = run_dir
        self.student = student  # whose tokenizer turns tokens into text
        self._writer: SamplesWriter | None = None

    def on_train_start(self, trainer: pl.Trainer, model: Any) -> None:
        if trainer.is_global_zero:
            self._writer = SamplesWriter(self.run_dir, load_tokenizer(self.student), trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self._writer:
            for sample in trainer.strategy.samples:
                self._writer.write(sample)
