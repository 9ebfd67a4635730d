"""The frozen teacher: a forward-only pipeline pass over the responses that keeps what the loss needs.

It stores final hidden states of response positions (10 KB a token at 14B) where logits would take 304 KB; the loss
multiplies them by the teacher's vocabulary-sharded head. So the teacher is no part of the student's pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nemo_tsdkd.config.schema import TeacherConfig
from nemo_tsdkd.data.batch import MicroBatch
from nemo_tsdkd.megatron.checkpoints.load import frozen_model
from nemo_tsdkd.megatron.gpt import head_weight, hidden_states_only, sequence_shard


class Teacher:
    """This rank's shard of the teacher, on the student's TP x PP x CP layout.

    A plain object, not a module: whatever walks the student's module tree (DDP, the optimizer, checkpoints,
    parameter counts) does not find it.

    Args:
        gpt_config: NeMo GPT config of the teacher, its parallel sizes and dtypes set.
        checkpoint: NeMo checkpoint to read the weights from; each rank reads its own shard only.
        teacher_config: the `teacher` section of the run's configuration.
    """

    def __init__(self, gpt_config: Any, checkpoint: Path, teacher_config: TeacherConfig) -> None:
        self.teacher_config = teacher_config
        self.module = frozen_model(gpt_config, checkpoint)
        self.module.set_is_first_microbatch()  # FP8: quantize these weights, not what a cache remembers
        self.is_last_stage = self.module.post_process
        self._offloaded = OffloadedWeights(self.module) if teacher_config.offload_weights else None

    @property
    def head_weight(self) -> Tensor:
        """The teacher's output weight `[V/TP, H]`, on the last stage only."""
        return head_weight(self.module)

    @property
    def bytes_per_token(self) -> float:
        """Memory of one response token's hidden state on one rank of the last stage."""
        gpt = self.module.config
        shards = gpt.context_parallel_size * (gpt.tensor_model_parallel_size if gpt.sequence_parallel else 1)
        return gpt.hidden_size * gpt.params_dtype.itemsize / shards

    @torch.no_grad()
    def forward(self, micro_batches: list[MicroBatch]) -> list[list[Tensor]] | None:
        """Final hidden states of the response positions, on the last stage; None on the others.

        Returns for each micro-batch the packed rows `[N, H]` of its parts (`_split`), on the device or, with
        `offload_hidden_states`, on the host. `dense` restores one micro-batch's `[S, B, H]` from them.
        """
        if self._offloaded:
            self._offloaded.restore()
        parts = [part for batch in micro_batches for part in self._split(batch)]
        with hidden_states_only(self.module):
            kept = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(parts),
                model=self.module,
                num_microbatches=len(parts),
                seq_length=parts[0]["tokens"].shape[1],  # of the first part: the pipeline exchanges each shape
                micro_batch_size=parts[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        if self._offloaded:
            self._offloaded.release()
        if not self.is_last_stage:
            return None
        rows = iter(kept)
        return [[next(rows) for _ in self._split(batch)] for batch in micro_batches]

    def dense(self, batch: MicroBatch, parts: list[Tensor]) -> Tensor:
        """Hidden states `[S (/TP), B, H]` of one micro-batch; positions outside the responses are zero."""
        columns = []
        for part, rows in zip(self._split(batch), parts, strict=True):
            mask = self._positions(part)
            rows = rows.to(mask.device, non_blocking=True)
            columns.append(rows.new_zeros(*mask.shape, rows.shape[-1]).masked_scatter_(mask[..., None], rows))
        return torch.cat(columns, dim=1)

    def _split(self, batch: MicroBatch) -> Iterator[MicroBatch]:
        """Cut a student's micro-batch into as many rows as the teacher may hold. Its padded length stays, so that
        both models' sequence shards hold the same positions."""
        rows = self.teacher_config.micro_batch_size
        for start in range(0, len(batch["tokens"]), rows):
            yield {key: value[start : start + rows] for key, value in batch.items()}

    def _positions(self, part: MicroBatch) -> Tensor:
        return sequence_shard(part["response_mask"].t(), self.module.config.sequence_parallel)

    def _forward_step(self, parts: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        part = next(parts)
        hidden = model(part["tokens"], part["position_ids"], None)  # no mask: attention is causal

        def keep(output: Tensor, non_loss_data: bool = True) -> Tensor:
            """Megatron calls this on the last stage and collects what it returns."""
            rows = output[self._positions(part)]
            return rows.to("cpu", non_blocking=True) if self.teacher_config.offload_hidden_states else rows

        return hidden, keep


class OffloadedWeights:
    """Keeps a frozen module's weights on the host between passes, all but the head, which the loss needs."""

    def __init__(self, module: MCoreGPTModel) -> None:
        head = head_weight(module) if module.post_process else None
        self._module = module
        self._parameters = [p for p in module.parameters() if p is not head]
        self._host = [p.data.to("cpu").pin_memory() for p in self._parameters]
        self.release()

    def release(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host  # frees the device copy
        for part in self._module.modules():
            getattr(part, "_fp8_workspaces", {}).clear()  # FP8 copies, which the next pass makes again

    def restore(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(torch.cuda.current_device(), non_blocking=True)
