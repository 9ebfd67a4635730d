"""Supervised fine-tuning for the comparison: the trainer, its batches and optimizer, with Megatron's cross-entropy."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_tsdkd.megatron.gpt import unwrap, vocab_parallel_logits
from nemo_tsdkd.megatron.model import DistillationBatch, TSDKDModel
from nemo_tsdkd.objective import ObjectiveOutput


class SupervisedModel(TSDKDModel):
    """Trains the mean over sequences of each response's mean cross-entropy. What it reports stays the objective's: how
    far teacher and student differ. For one process: no rank of a vocabulary or a context has another share."""

    def loss(self, batch: DistillationBatch, hidden: Tensor) -> ObjectiveOutput:
        reported = super().loss(batch, hidden.detach())
        logits = vocab_parallel_logits(unwrap(self.module), hidden).float()
        logits[..., self.vocabulary.size :] = float("-inf")
        mask = batch.micro_batch["response_mask"].t()
        nats = vocab_parallel_cross_entropy(logits, batch.micro_batch["labels"].t().contiguous()) * mask
        loss_sum = (nats.sum(0) / mask.sum(0).clamp(min=1)).sum()
        return replace(reported, loss=loss_sum / reported.count.clamp(min=1), loss_sum=loss_sum)
