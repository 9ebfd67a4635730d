"""The training step on one screen: NeMo's MegatronStrategy with two acts before its forward-backward."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo import lightning as nl

from nemo_tsdkd.data import Sample
from nemo_tsdkd.rollout import Response

# What the objective reports as sums over sequences (docs/math.md), in the order of the reduced vector.
PER_SEQUENCE = (
    "loss",
    "direct",
    "indirect",
    "entropy",
    "student_entropy",
    "teacher_entropy",
    "gate_mean",
    "opener_fraction",
    "rank_agreement",
)
COUNTS = ("num_sequences", "response_tokens")


class TSDKDStrategy(nl.MegatronStrategy):
    """Runs the three acts and leaves the step's metrics, equal on every rank, in `step_metrics`."""

    step_metrics: dict[str, float]

    def training_step(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        model, step = self.lightning_module, self.trainer.global_step
        self.step_metrics = {"lr": self.optimizers[0].param_groups[0]["lr"]}
        samples = [sample for _ in range(get_num_microbatches()) for sample in next(dataloader_iter)[0]]
        with self._timed("rollout_s"):
            responses = model.respond(samples, step)
        with self._timed("teacher_s"):
            micro_batches = model.read(samples, responses)
        with self._timed("student_s"):
            reports = super().training_step(iter(micro_batches), *args, **kwargs)
        self.step_metrics |= self._reduce(reports) | self._response_lengths(responses)
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
        names = PER_SEQUENCE + COUNTS
        sums = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
        if parallel_state.is_pipeline_last_stage():
            sums += torch.stack([reports[name].double() for name in names])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        total = dict(zip(names, sums.tolist(), strict=True))
        return {name: total[name] / total["num_sequences"] for name in PER_SEQUENCE} | {
            "response_tokens": int(total["response_tokens"])
        }

    def _response_lengths(self, responses: list[Response]) -> dict[str, float]:
        """Length statistics over the global batch; every data-parallel rank holds as many responses."""
        mine = torch.tensor([[len(r.token_ids), r.truncated] for r in responses], dtype=torch.float64)
        mine = mine.to(torch.cuda.current_device())
        group = parallel_state.get_data_parallel_group()
        everyone = mine.new_empty(group.size() * len(mine), 2)
        dist.all_gather_into_tensor(everyone, mine, group=group)
        lengths, truncated = everyone.unbind(1)
        return {
            "response_length_mean": lengths.mean().item(),
            "response_length_p95": lengths.quantile(0.95).item(),
            "truncated_fraction": truncated.mean().item(),
        }
