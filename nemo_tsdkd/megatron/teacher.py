"""The frozen teacher: a forward-only pass over the responses that keeps what the student's loss needs.

It keeps final hidden states of response positions (10 KB a token at 14B), not logits (304 KB); the loss multiplies them
by the teacher's head in the student's vocabulary shards. So the teacher is no part of the student's pipeline. It runs
on the student's ranks, in the student's layout or its own (`teacher.parallel`), or on its own nodes
(`teacher.nodes`). Rows of the global batch are sent to it, hidden states are sent back
(`distributed/hidden_exchange.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional

from nemo_tsdkd.checks.precision import pad_to_multiple, teacher_pad_to_multiple
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.batch import MicroBatch, empty_micro_batch
from nemo_tsdkd.data.global_batch import GlobalBatch, slices_of
from nemo_tsdkd.distributed.hidden_exchange import HiddenExchange, share_size
from nemo_tsdkd.distributed.job import Job
from nemo_tsdkd.distributed.layout import BatchSplit, hidden_state_shards, student_layout, teacher_layout
from nemo_tsdkd.distributed.vocab_parallel import all_gather
from nemo_tsdkd.megatron.checkpoints.load import load_head
from nemo_tsdkd.megatron.expert_load import largest_over_mean
from nemo_tsdkd.megatron.gpt import sequence_shard
from nemo_tsdkd.megatron.teacher_pass import TeacherPass

_STEP, _STOP = 1, 0  # what rank 0 sends to the teacher's nodes before a batch


class Teacher:
    """One rank's part of the teacher, on the student's ranks and on the teacher's.

    A plain object, not a module, so that DDP, the optimizer, checkpoints and parameter counts of the student leave it
    out.

    Args:
        gpt_config: NeMo GPT config of the teacher, its parallel sizes and dtypes set.
        checkpoint: NeMo checkpoint to read the weights from; each rank reads its own shard only.
        train_config: the whole configuration of the run.
        job: all ranks.
        pad_id: token id of padding.

    Attributes:
        bytes_sent: hidden states that changed ranks in the last step, over the whole job.
        expert_load: of a mixture of experts, `largest_over_mean` in the last step, over the whole job; else None.
    """

    def __init__(self, gpt_config: Any, checkpoint: Path, *, train_config: TrainConfig, job: Job, pad_id: int) -> None:
        self.train_config, self.job, self.pad_id = train_config, job, pad_id
        self.layout, self.student = teacher_layout(train_config), student_layout(train_config)
        self.bytes_sent, self.expert_load = 0, None
        self._layers, self._experts = gpt_config.num_layers, gpt_config.num_moe_experts or 0
        self._row = (gpt_config.hidden_size, gpt_config.params_dtype)
        loaded_head = None if train_config.one_layout else self._load_head(gpt_config, checkpoint)
        self._pass = None
        if job.rank in self.layout.ranks:
            # Experts need groups that the student's parallel state has not, also where the layout is the same.
            shared = train_config.one_layout and not self._experts
            parallel = None if shared else train_config.teacher_parallel
            teacher_config, keep_head = train_config.teacher, train_config.one_layout
            self._pass = TeacherPass(gpt_config, checkpoint, teacher_config, parallel, keep_head=keep_head)
        self._loaded_head = loaded_head

    def _load_head(self, gpt_config: Any, checkpoint: Path) -> Tensor | None:
        """The teacher's head in the student's vocabulary shards, on the student's last stage; collective over the
        student's ranks."""
        if self.job.teacher_only:
            return None
        head = load_head(gpt_config, checkpoint, parallel_state.get_tensor_model_parallel_group())
        return head if parallel_state.is_pipeline_last_stage() else head.new_empty(0)

    @property
    def head_weight(self) -> Tensor:
        """The teacher's output weight `[V/TP, H]` by the student's TP, on the student's last stage only."""
        if self._loaded_head is not None:
            return self._loaded_head
        assert self._pass is not None
        return self._pass.head_weight

    @property
    def module(self) -> Any:
        """This rank's shard of the teacher; None on a rank without one."""
        return self._pass.module if self._pass else None

    @property
    def bytes_per_token(self) -> float:
        """Memory of one response token's hidden state on one rank of the student's last stage, on average."""
        hidden, dtype = self._row
        return hidden * dtype.itemsize / hidden_state_shards(self.train_config)

    def forward(self, batch: GlobalBatch) -> list[Tensor]:
        """The teacher's hidden states of the response positions of each of this rank's student micro-batches.

        Call it on all of the student's ranks; the teacher's nodes run `serve`.

        Args:
            batch: of all data-parallel ranks; with all rows' tokens, unless both models lie in one layout.

        Returns:
            This rank's share `[n, H]` of each micro-batch (`dense` lays it out), on the device or, with
            `teacher.offload_hidden_states`, on the host; shares are empty off the last pipeline stage.
        """
        if self.train_config.teacher.nodes:
            self._send_batch(_STEP, batch)
        return self._step(batch)

    def student_split(self, batch: GlobalBatch) -> BatchSplit:
        """How the student's ranks cut `batch` into micro-batches."""
        config = self.train_config
        return batch.student_split(
            self.student.data,
            config.micro_batch_size,
            pad_to_multiple(config, torch.cuda.is_available()),
            micro_batch_tokens=config.micro_batch_tokens,
        )

    def serve(self) -> None:
        """Run the teacher on the batches of the student's ranks until they call `stop_teacher_ranks`. Call it on the
        teacher's nodes."""
        while (batch := self._receive_batch()) is not None:
            self._step(batch)

    def stop_teacher_ranks(self) -> None:
        """End `serve` on the teacher's nodes. Call it on all of the student's ranks."""
        if self.train_config.teacher.nodes:
            self._send_batch(_STOP, None)

    def dense(self, batch: MicroBatch, share: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup) -> Tensor:
        """Hidden states `[S (/TP), B, H]` of one student micro-batch; positions outside the responses are zero.

        Args:
            batch: this context-parallel rank's slice of the micro-batch.
            share: from `forward`.
            sequence_parallel: the student's: the result is then this rank's shard of the sequence.
            tp_group: the student's.
        """
        mask = sequence_shard(batch["response_mask"].t(), sequence_parallel).t()  # [B, S (/TP)], the shares' order
        rows = share.to(mask.device, non_blocking=True)
        if not sequence_parallel and tp_group.size() > 1:
            count = int(mask.sum())
            size = int(share_size(count, tp_group.size()))
            padded = rows.new_zeros(size, rows.shape[1])
            padded[: len(rows)] = rows
            rows = all_gather(padded, tp_group).flatten(0, 1)[:count]
        hidden = rows.new_zeros(mask.shape[1], mask.shape[0], rows.shape[-1])
        hidden.transpose(0, 1)[mask] = rows
        return hidden

    def logits(self, hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup) -> Tensor:
        """The teacher's logits `[S, B, V/TP]` in the student's vocabulary shards, of what `dense` returned."""
        if sequence_parallel:
            hidden = all_gather(hidden, tp_group).flatten(0, 1)
        return functional.linear(hidden, self.head_weight)

    def _step(self, batch: GlobalBatch) -> list[Tensor]:
        config, student_split = self.train_config, self.student_split(batch)
        if config.one_layout:
            split = slices_of(student_split, config.teacher.micro_batch_size)
        else:
            multiple = teacher_pad_to_multiple(config, torch.cuda.is_available())
            split = batch.balanced_split(self.layout.data, config.teacher.micro_batch_size, multiple)
        plan = HiddenExchange.plan(
            batch.starts,
            batch.response,
            (self.layout, split),
            (self.student, student_split),
            self.job.rank,
            self.job.world_size,
        )
        hidden, dtype = self._row
        self.bytes_sent = plan.rows_moved * hidden * dtype.itemsize
        if self._pass is None:
            held = torch.empty(0, hidden, dtype=dtype, device=torch.cuda.current_device())
        else:
            data_rank = (self.job.rank - self.layout.first_rank) // (self.layout.tensor * self.layout.context)
            micro_batches = batch.micro_batches(
                split, data_rank % self.layout.data, pad_id=self.pad_id, device=torch.cuda.current_device()
            )
            held = self._pass.forward(self._as_many_on_all_ranks(micro_batches, split), plan.rows_held)
        self.expert_load = self._reduce_expert_load()
        shares = []
        for m in range(len(plan.transfers)):
            share = plan.exchange(m, held, self.job.device_group)
            shares.append(share.to("cpu", non_blocking=True) if config.teacher.offload_hidden_states else share)
        return shares

    def _as_many_on_all_ranks(self, micro_batches: list[MicroBatch], split: BatchSplit) -> list[MicroBatch]:
        """With experts, micro-batches without a token after this rank's own: in every layer all ranks that share the
        experts exchange tokens, as often as the rank with the most micro-batches does."""
        if not self._experts:
            return micro_batches
        most = int(split.micro_batches_of_ranks().max())
        return micro_batches + [
            empty_micro_batch(int(split.width.min()), pad_id=self.pad_id, device=torch.cuda.current_device())
            for _ in range(most - len(micro_batches))
        ]

    def _reduce_expert_load(self) -> float | None:
        """The last pass's `expert_load`, on all ranks of the job. Collective, with experts."""
        if not self._experts:
            return None
        counts = torch.zeros(self._layers, self._experts, dtype=torch.int64, device=torch.cuda.current_device())
        if self._pass:
            counts += self._pass.expert_load.counts
        self.job.device_group.allreduce([counts]).wait()
        return largest_over_mean(counts)

    def _send_batch(self, what: int, batch: GlobalBatch | None) -> None:
        """Broadcast the rows of this step from rank 0 to all ranks, or that there are no more."""
        rows = self.train_config.global_batch_size
        header = torch.zeros(2 + 3 * rows, dtype=torch.int64)
        if batch is not None:
            header[1] = batch.tokens.shape[1]
            header[2:] = torch.from_numpy(batch.lengths).flatten()
        header[0] = what
        self.job.broadcast(header)
        if batch is not None:
            self.job.broadcast(batch.tokens)

    def _receive_batch(self) -> GlobalBatch | None:
        rows = self.train_config.global_batch_size
        header = self.job.broadcast(torch.empty(2 + 3 * rows, dtype=torch.int64))
        if header[0] == _STOP:
            return None
        tokens = self.job.broadcast(torch.empty(rows, int(header[1]), dtype=torch.int32))
        return GlobalBatch(header[2:].view(rows, 3).numpy(), tokens)
