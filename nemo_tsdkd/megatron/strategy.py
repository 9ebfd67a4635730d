"""The training step: NeMo's MegatronStrategy with rollout and teacher's pass before its forward-backward."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo import lightning as nl
from nemo.lightning._strategy_lib import init_model_parallel
from torch import Tensor

from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.megatron.checkpoints.unpickling import checkpoint_errors
from nemo_tsdkd.megatron.samples import samples_due, take_samples
from nemo_tsdkd.objective import reported, weighted
from nemo_tsdkd.rollout.schedule import Response

if TYPE_CHECKING:
    from nemo_tsdkd.megatron.model import DistillationBatch


class TSDKDStrategy(nl.MegatronStrategy):
    """Runs the step's three phases and stores its metrics, equal on every rank, in `step_metrics`."""

    step_metrics: dict[str, float]
    validation_metrics: Mapping[str, float] = {}  # of the validation after this step, if there was one
    samples: Sequence[dict[str, Any]] = ()  # of this step and its validation, to be written down by rank 0
    save_s = 0.0  # seconds of the saves since the last reported step
    ended_early = False  # by validation.patience
    not_finite: str | None = None  # the first micro-batch of this rank, if any, whose loss was not finite

    def setup_distributed(self) -> None:
        met_before = dist.is_initialized()
        super().setup_distributed()
        if met_before:  # to import checkpoints together: NeMo then returns before it builds Megatron's groups
            init_model_parallel(self.model)

    def init_model_parallel(self) -> None:
        """NeMo moves the weights into DDP's buffers on a stream that nothing else waits for: the optimizer's master
        weights would be copied from what may not have arrived yet."""
        torch.cuda.synchronize()
        super().init_model_parallel()
        torch.cuda.synchronize()

    def teardown(self) -> None:
        """Without Lightning's copy of weights and optimizer to the host, for which a preempted job has no time."""
        self.optimizers, module, self._lightning_module = [], self._lightning_module, None
        super().teardown()
        self._lightning_module = module

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """Every parameter's optimizer state under its own key and range, so that a run resumes on any layout.

        What NeMo's `ckpt_optim_fully_reshardable` asks for strips the padding between gradient buckets but not from the
        offsets it then reads at: Megatron 0.15 so shifts Adam's state of tied embeddings under pipeline parallelism.
        """
        metadata = super().sharded_state_dict_metadata
        return metadata | {"distrib_optim_sharding_type": "fully_sharded_model_space"}

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        """NeMo also looks for ModelOpt's state, a pickle: our checkpoints have none.

        Raises:
            UserError: the checkpoint is damaged or could run code.
        """
        require_safe(Path(checkpoint_path))
        with checkpoint_errors(Path(checkpoint_path)):
            return super().load_checkpoint(checkpoint_path, selective_restore)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any], selective_restore: bool = False) -> None:
        """Adam's moments come from the checkpoint, its settings and the schedule from the configuration: so a run goes
        on with more steps or another learning rate, where Lightning would bring the old ones back without a word."""
        optimizer = self.optimizers[0]
        settings = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        for group, ours in zip(optimizer.param_groups, settings, strict=True):
            group.update(ours)
        for config, state in zip(self.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            scheduler = config.scheduler
            scheduler.last_epoch, scheduler._step_count = state["last_epoch"] - 1, state["_step_count"] - 1
            scheduler.step()  # sets the learning rate of the next step
        checkpoint["lr_schedulers"] = []

    def training_step(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Tensor:
        """One global batch: responses, the teacher's pass, the student's forward and backward; the loss (scalar).

        Raises:
            UserError: no sequence of the batch has a response token.
        """
        model, step = self.lightning_module, self.trainer.global_step
        self.validation_metrics = {}
        self.step_metrics = {
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "rollout_age": step % model.train_config.rollout.reuse,  # optimizer steps since these responses were made
        }
        samples = [sample for _ in range(get_num_microbatches()) for sample in next(dataloader_iter)[0]]
        with self._timed("rollout_s"):
            responses = model.respond(samples, step)
        with self._timed("teacher_s"):
            batches = model.teacher_pass(samples, responses)
        self.step_metrics["teacher_bytes_sent"] = model.teacher.bytes_sent
        if model.teacher.expert_load is not None:
            self.step_metrics["teacher_expert_load"] = model.teacher.expert_load
        self.data_sampler.num_micro_batches = len(batches)
        model.sees = samples_due(model.train_config, step + 1)
        with self._timed("student_s"):
            reports = super().training_step(iter(batches), *args, **kwargs)
        model.training_loss_reduction.batch = None  # NeMo's: it would keep the hidden states through the next rollout
        self.samples = take_samples(model, samples, responses, step) if model.sees else ()
        model.sees = False
        self.step_metrics |= self._response_lengths(responses) | self._reduce(reports)
        self.not_finite = self._not_finite(reports, batches)
        return torch.tensor(self.step_metrics["loss"])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.step_metrics[name] = time.perf_counter() - start

    def _reduce(self, reports: Any) -> dict[str, float]:
        """Means over the global batch. Only last stages have reports; context-parallel ranks have equal ones."""
        objective = self.lightning_module.train_config.objective.resolved()
        names = ("loss", "count", *reported(objective))
        sums = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
        if parallel_state.is_pipeline_last_stage():
            sums += torch.stack([reports[name].double().sum() for name in names])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        total = dict(zip(names, sums.tolist(), strict=True))
        count = total.pop("count")
        means = {name: value / count for name, value in total.items()}
        means |= weighted(objective, means)
        return means | {"response_tokens": int(total["response_tokens"])}

    def _not_finite(self, reports: Any, batches: list[DistillationBatch]) -> str | None:
        """In words, the first micro-batch of this rank whose loss is not finite, and a token there that makes it so."""
        if math.isfinite(self.step_metrics["loss"]) or not parallel_state.is_pipeline_last_stage():
            return None
        group = parallel_state.get_context_parallel_group()
        places: list[Any] = [None] * group.size()  # each rank's, of its own tokens; -1 where it has none
        dist.all_gather_object(places, reports["broken"].tolist(), group=group)
        for batch, loss, broken in zip(batches, reports["loss"].tolist(), zip(*places, strict=True), strict=True):
            if not math.isfinite(loss):
                samples = batch.micro_batch["sample_index"].tolist()
                where = f"loss {loss} in the micro-batch of samples {samples}"
                row, position = min((place for place in broken if place[0] >= 0), default=(-1, -1))
                if row < 0:
                    return where
                why = "; infinite: one model excludes a token that the other needs" if math.isinf(loss) else ""
                return f"{where}: sample {samples[row]}, token {position}{why}"
        return None

    def _response_lengths(self, responses: list[Response]) -> dict[str, float]:
        """Length statistics over the global batch; every data-parallel rank holds as many responses."""
        mine = torch.tensor([[len(r.token_ids), r.truncated] for r in responses], dtype=torch.float64)
        mine = mine.to(torch.cuda.current_device())
        group = parallel_state.get_data_parallel_group()
        gathered = mine.new_empty(group.size() * len(mine), 2)
        dist.all_gather_into_tensor(gathered, mine, group=group)
        lengths, truncated = gathered.unbind(1)
        return {
            "response_length_mean": lengths.mean().item(),
            "response_length_p95": lengths.quantile(0.95).item(),
            "truncated_fraction": truncated.mean().item(),
        }
