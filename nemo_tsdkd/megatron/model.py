"""The NeMo model class: a trainable student and a frozen teacher, and the three phases of a training step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tsdkd.config.schema import RolloutConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.batch import MicroBatch
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.data.global_batch import GlobalBatch
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.distributed.counters import sample_keys
from nemo_tsdkd.distributed.groups import long_timeout_group
from nemo_tsdkd.distributed.job import Job
from nemo_tsdkd.megatron.checkpoints.load import load_weights
from nemo_tsdkd.megatron.gpt import (
    context_parallel_slice,
    head_weight,
    hidden_states_only,
    unwrap,
    vocab_parallel_logits,
)
from nemo_tsdkd.megatron.rollout.generation import generate
from nemo_tsdkd.megatron.teacher import Teacher
from nemo_tsdkd.objective import ObjectiveOutput, resolve_objective, tsdkd_loss, tsdkd_loss_from_hidden
from nemo_tsdkd.objective.tokens import KEY, SeenTokens
from nemo_tsdkd.rollout.horizon import horizon
from nemo_tsdkd.rollout.sampling import on_policy
from nemo_tsdkd.rollout.schedule import Response, interleave

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """NeMo checkpoints of the initial student and of the teacher, and both models' NeMo configurations."""

    student: Path
    teacher: Path
    student_gpt_config: llm.GPTConfig = field(repr=False)
    teacher_gpt_config: llm.GPTConfig = field(repr=False)


class DistillationBatch(NamedTuple):
    """One micro-batch of the student's pass, with what the teacher's pass left for it."""

    micro_batch: MicroBatch
    teacher_hidden: Tensor  # this rank's share, from `Teacher.forward`
    loss_weight: float  # turns the sum over this micro-batch's sequences into Megatron's share of the global mean


class TSDKDModel(llm.GPTModel):
    """Student of a TSD-KD run. Only the student is a submodule; the teacher is a plain attribute (`teacher.Teacher`).

    Args:
        config: NeMo GPT config of the student; the strategy sets its parallel sizes.
        train_config: the whole configuration of the run.
        checkpoints: where both models' weights come from.
        vocabulary: that of the tokenizer, which both models share.
        job: all ranks of the job, the teacher's among them.
        optim: NeMo optimizer module.
        resumes: the student's weights come from a checkpoint of the run, which NeMo's trainer loads.
    """

    def __init__(
        self,
        config: llm.GPTConfig,
        *,
        train_config: TrainConfig,
        checkpoints: Checkpoints,
        vocabulary: Vocabulary,
        job: Job,
        optim: Any = None,
        resumes: bool = False,
    ) -> None:
        super().__init__(config, optim=optim)
        self.train_config = train_config
        self.job = job
        self.checkpoints = checkpoints
        self.vocabulary = vocabulary
        self.resumes = resumes
        self._objective = resolve_objective(train_config.objective)
        self._responses: list[Response] = []
        self.long_timeout_group: ProcessGroup | None = None
        self.sees = False  # whether `loss` is to keep what the objective sees, for `take_seen`
        self._seen: list[tuple[list[int], SeenTokens]] = []
        self._loss_reduction = TSDKDLoss(self.loss)

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's shards of both models and read their weights; called by NeMo once the ranks have met."""
        if hasattr(self, "module"):
            return
        super().configure_model(vp_stage)
        if not self.resumes:
            load_weights(self.module, self.checkpoints.student)
        self.teacher = Teacher(
            self.checkpoints.teacher_gpt_config,
            self.checkpoints.teacher,
            train_config=self.train_config,
            job=self.job,
            pad_id=self.vocabulary.pad_id,
        )
        self.long_timeout_group = long_timeout_group()
        rows = self.train_config.global_batch_size // self.train_config.data_parallel_size
        logger.info(
            "teacher: a step keeps at most %.1f MiB of hidden states on the %s of each last-stage rank.",
            self.teacher.bytes_per_token * rows * self.train_config.data.seq_length / 2**20,
            "host" if self.train_config.teacher.offload_hidden_states else "device",
        )

    # Phase one, the rollout: the student generates responses, or the data set supplies them.
    def respond(self, samples: Sequence[Sample], step: int) -> list[Response]:
        """Responses to this data-parallel rank's share of a global batch, equal on its TP x PP ranks.

        With `rollout.reuse: n`, the responses of step `s` serve the steps up to `s + n - 1`.

        Raises:
            FloatingPointError: on every rank, where one rank's student has broken logits.
        """
        if not self.is_on_policy(step):
            return [Response(s.response_ids, truncated=not self.vocabulary.ends(s.response_ids)) for s in samples]
        if step % self.train_config.rollout.reuse == 0:
            self._responses = self._generate(samples, step)
        return self._responses

    def is_on_policy(self, step: int) -> bool:
        """Whether the student writes the responses of this step, instead of the data."""
        rollout = self.train_config.rollout
        return on_policy(self.train_config.seed, step - step % rollout.reuse, rollout.lmbda)

    def _generate(self, samples: Sequence[Sample], step: int) -> list[Response]:
        """The student's responses. Each context-parallel rank generates a share of them and gathers the others: if
        each generated all, work would be done twice, and near-equal logits could make their responses differ."""
        cp_group = parallel_state.get_context_parallel_group()
        mine = samples[cp_group.rank() :: cp_group.size()]
        rollout = self.train_config.rollout
        rollout = replace(rollout, max_new_tokens=horizon(rollout, step, self.train_config.max_steps))
        generated = self.generate(mine, rollout, step, f"step {step + 1}")
        parts: list[Any] = [None] * cp_group.size()
        dist.all_gather_object(parts, generated, group=cp_group)
        return interleave(parts)

    def generate(
        self, samples: Sequence[Sample], rollout_config: RolloutConfig, step: int, what: str
    ) -> list[Response]:
        """The student's responses to the samples of this TP x PP block. Collective over all of the student's ranks.

        Args:
            step: a key of the noise, as `sample.index` is.
            what: what they are for, for messages.

        Raises:
            FloatingPointError: on every rank, where one rank's student has broken logits.
        """
        generated, failure = [], None
        try:
            generated = generate(
                unwrap(self.module),
                [sample.prompt_ids for sample in samples],
                rollout_config=rollout_config,
                sample_ids=[sample.index for sample in samples],
                seed=self.train_config.seed,
                step=step,
                vocabulary=self.vocabulary,
                max_length=self.train_config.data.seq_length,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                pp_group=parallel_state.get_pipeline_model_parallel_group(),
            )
        except FloatingPointError as error:  # of this rank's block alone: the others learn of it below
            failure = f"{what}: {error}"
        # The longest responses may take another rank far beyond NCCL's timeout.
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self.long_timeout_group)
        if failure := next(filter(None, failures), None):
            raise FloatingPointError(failure)
        return generated

    # Phase two, the teacher's pass.
    def teacher_pass(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[DistillationBatch]:
        """Micro-batches of prompts and responses; on the last stage each comes with the teacher's hidden states.

        Raises:
            UserError: no sequence of the global batch has a response token.
        """
        micro_batches, hidden = self.read(samples, responses)
        weight = len(micro_batches) / self._mean_count(micro_batches)
        micro_batches = [context_parallel_slice(part) for part in micro_batches]
        return [DistillationBatch(part, share, weight) for part, share in zip(micro_batches, hidden, strict=True)]

    def read(self, samples: Sequence[Sample], responses: Sequence[Response]) -> tuple[list[MicroBatch], list[Tensor]]:
        """Micro-batches of whole sequences, and the teacher's hidden states of each. Collective."""
        dp_group, device = parallel_state.get_data_parallel_group(), torch.cuda.current_device()
        batch = GlobalBatch.of(samples, [response.token_ids for response in responses]).gather(
            with_tokens=not self.train_config.one_layout, dp_group=dp_group, device=device
        )
        micro_batches = batch.micro_batches(
            self.teacher.student_split(batch), dp_group.rank(), pad_id=self.vocabulary.pad_id, device=device
        )
        return micro_batches, self.teacher.forward(batch)

    def _mean_count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Sequences with a response (or response tokens, by `objective.reduction`) in the global batch, per
        data-parallel rank: the loss is their mean, while Megatron averages over micro-batches and data-parallel ranks,
        which may hold unequal numbers of them."""
        by_token = self._objective.config.reduction == "token"
        masks = [batch["response_mask"] for batch in micro_batches]
        count = torch.stack([mask.sum() if by_token else mask.any(1).sum() for mask in masks]).sum()
        group = parallel_state.get_data_parallel_group()
        dist.all_reduce(count, group=group)
        if count == 0:
            raise UserError("a global batch holds no response token: nothing to learn from. Look at data.path.")
        return count.item() / group.size()

    # Phase three, the student's pass: Megatron's schedule calls these for each micro-batch.
    def data_step(self, batches: Iterator[DistillationBatch]) -> DistillationBatch:
        return next(batches)

    def forward_step(self, batch: DistillationBatch) -> Tensor:
        """This stage's output; on the last stage the student's final hidden states `[S (/TP), B, H]`."""
        tokens, position_ids = batch.micro_batch["tokens"], batch.micro_batch["position_ids"]
        with hidden_states_only(self.module):
            return self(tokens, position_ids)  # without a mask, attention is causal

    def loss(self, batch: DistillationBatch, hidden: Tensor) -> ObjectiveOutput:
        """The objective on one micro-batch, from the final hidden states of both models and their heads."""
        out = self._objective_output(batch, hidden)
        if out.seen is not None:
            self._seen.append((batch.micro_batch["sample_index"].tolist(), out.seen))
        return out

    def take_seen(self) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """What the objective saw since the last call: each sequence's index and columns of tokens (`SeenTokens`). On
        one rank of those that hold a sequence; nothing on the others."""
        taken, self._seen = self._seen, []
        groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
        if all(group.rank() == 0 for group in groups):
            for rows, seen in taken:
                for row, index in enumerate(rows):
                    yield index, seen.of_sequence(row)

    def _objective_output(self, batch: DistillationBatch, hidden: Tensor) -> ObjectiveOutput:
        student, objective = unwrap(self.module), self._objective
        sequence_parallel, tp_group = self.config.sequence_parallel, parallel_state.get_tensor_model_parallel_group()
        teacher_hidden = self.teacher.dense(batch.micro_batch, batch.teacher_hidden, sequence_parallel, tp_group)
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary.size,
            "tp_group": tp_group,
            "cp_group": parallel_state.get_context_parallel_group(),
            "return_seen": self.sees,
            "labels": batch.micro_batch["labels"].t(),
        }
        if KEY in objective.needs:  # to draw from: the same in every layout and after a resume
            seed, step = self.train_config.seed, self.trainer.global_step
            common["sequence_keys"] = sample_keys(seed, step, batch.micro_batch["sample_index"])
        mask = batch.micro_batch["response_mask"].t()
        if objective.config.head == "fused":
            weight = head_weight(student)
            return tsdkd_loss_from_hidden(
                hidden.to(weight.dtype),
                weight,
                teacher_hidden,
                self.teacher.head_weight,
                mask,
                objective,
                sequence_parallel=sequence_parallel,
                **common,
            )
        teacher_logits = self.teacher.logits(teacher_hidden, sequence_parallel, tp_group)
        student_logits = vocab_parallel_logits(student, hidden)
        # Nothing else reads the logits, and a linear layer's backward needs no output: the gradient may replace them.
        return tsdkd_loss(student_logits, teacher_logits, mask, objective, overwrite_student_logits=True, **common)

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        return self._loss_reduction


class TSDKDLoss(MegatronLossReduction):
    """Hands the objective to Megatron's schedule and adds up what it reports."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._loss = loss

    def forward(self, batch: DistillationBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self._loss(batch, hidden)
        # Cloned: Megatron divides the loss in place.
        report = {"loss": out.loss_sum.detach().clone(), "count": out.count, **out.metrics}
        report["broken"] = out.broken
        return out.loss_sum * batch.loss_weight, report

    def reduce(self, reports: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the objective reports of each of this rank's micro-batches, stacked to `[num_microbatches]`."""
        return {name: torch.stack([report[name] for report in reports]) for name in reports[0]}
