"""This rank's shard of the teacher in the teacher's own parallel state, and its forward-only pipeline pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nemo_tsdkd.config.schema import TeacherConfig, TeacherLayoutConfig
from nemo_tsdkd.data.batch import MicroBatch
from nemo_tsdkd.megatron.checkpoints.load import frozen_model
from nemo_tsdkd.megatron.expert_load import ExpertLoad
from nemo_tsdkd.megatron.gpt import context_parallel_slice, head_weight, hidden_states_only, sequence_shard
from nemo_tsdkd.megatron.parallel_states import ModelParallelState


class TeacherPass:
    """The teacher's module with its own parallel state.

    Args:
        gpt_config: NeMo GPT config of the teacher, its parallel sizes and dtypes set.
        checkpoint: NeMo checkpoint to read the weights from.
        teacher_config: the `teacher` section of the run's configuration.
        parallel: its layout; None: the student's, whose groups it shares.
        keep_head: the loss takes the head's weight from here.

    Attributes:
        expert_load: of a mixture of experts, the tokens that each expert got in the last pass; else None.
    """

    def __init__(
        self,
        gpt_config: Any,
        checkpoint: Path,
        teacher_config: TeacherConfig,
        parallel: TeacherLayoutConfig | None,
        *,
        keep_head: bool,
    ) -> None:
        self.teacher_config = teacher_config
        self.parallel_state = ModelParallelState(parallel)
        with self.parallel_state.active():
            self.module = frozen_model(gpt_config, checkpoint)
            self.module.set_is_first_microbatch()  # FP8: quantize these weights instead of using cached ones
            if not keep_head and self.module.post_process and not self.module.share_embeddings_and_output_weights:
                self.module.output_layer = None  # the loss has its own copy of the head: free this one
            self.expert_load = ExpertLoad(self.module) if self.module.config.num_moe_experts else None
            head = head_weight(self.module) if keep_head and self.module.post_process else None
        self._offloaded = OffloadedWeights(self.module, keep=head) if teacher_config.offload_weights else None

    @property
    def head_weight(self) -> Tensor:
        """The teacher's output weight `[V/TP, H]`, on its last stage only."""
        return head_weight(self.module)

    @torch.no_grad()
    def forward(self, micro_batches: list[MicroBatch], rows: int) -> Tensor:
        """Final hidden states `[rows, H]` of the response positions that this rank holds, in the order (micro-batch,
        row, position); on the device or, with `offload_hidden_states`, on the host.

        Collective over the ranks that share this replica of the teacher, and over those that share its experts.

        Args:
            micro_batches: this data-parallel rank's, whole rows; equally many on all ranks that share experts.
            rows: their number; 0 on all stages but the last.
        """
        if self._offloaded:
            self._offloaded.restore()
        kept = self._buffer(rows)
        with self.parallel_state.active(), hidden_states_only(self.module):
            parts = [context_parallel_slice(batch) for batch in micro_batches]
            free = [kept]  # the rows that are not filled yet
            load, sequence_parallel = self.expert_load, self.module.config.sequence_parallel
            if load:
                load.counts.zero_()

            def forward_step(parts: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
                part = next(parts)
                if load:
                    load.begin(sequence_shard(part["token_mask"].t(), sequence_parallel))
                output = model(part["tokens"], part["position_ids"], None)  # no mask: attention is causal

                def keep(output: Tensor, non_loss_data: bool = True) -> None:
                    """Megatron calls this on the last stage."""
                    mask = sequence_shard(part["response_mask"].t(), sequence_parallel)
                    found = output.transpose(0, 1)[mask.t()]  # [B, S] order
                    free[0][: len(found)].copy_(found, non_blocking=True)
                    free[0] = free[0][len(found) :]

                return output, keep

            if parts:
                get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=iter(parts),
                    model=self.module,
                    num_microbatches=len(parts),
                    seq_length=parts[0]["tokens"].shape[1],  # of the first part: the pipeline exchanges each shape
                    micro_batch_size=parts[0]["tokens"].shape[0],
                    forward_only=True,
                    collect_non_loss_data=True,
                )
            assert len(free[0]) == 0, "the plan and the masks count the same positions"
        if self._offloaded:
            self._offloaded.release()
        if self.teacher_config.offload_hidden_states:
            torch.cuda.synchronize()  # the copies to the host have arrived
        return kept

    def _buffer(self, rows: int) -> Tensor:
        """Memory for hidden states `[rows, H]`."""
        hidden, dtype, host = (
            self.module.config.hidden_size,
            self.module.config.params_dtype,
            self.teacher_config.offload_hidden_states,
        )
        device = "cpu" if host else torch.cuda.current_device()
        return torch.empty(rows, hidden, dtype=dtype, device=device, pin_memory=host)


class OffloadedWeights:
    """Keeps a frozen module's weights on the host between passes, all but `keep`, which the loss needs."""

    def __init__(self, module: MCoreGPTModel, keep: Tensor | None) -> None:
        self._module = module
        self._parameters = [p for p in module.parameters() if p is not keep]
        self._host = [p.data.to("cpu").pin_memory() for p in self._parameters]
        self.release()

    def release(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host  # frees the device copy
        for part in self._module.modules():
            getattr(part, "_fp8_workspaces", {}).clear()  # Transformer Engine's; created again in the first micro-batch

    def restore(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(torch.cuda.current_device(), non_blocking=True)
