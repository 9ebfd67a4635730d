"""A training run over Transformer Engine, and what it leaves and quantizes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
import torch
from interruptions import TIMES, saved_weights

from nemo_tsdkd.checkpoints.manifest import step_folder
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.rows import read_metrics

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SP = "sequence_parallel"


@dataclass
class Run:
    metrics: list[dict]  # without times and what tells of the layout
    weights: dict[str, torch.Tensor]  # of the trained model, whole
    began_with: dict[str, torch.Tensor]
    quantized: list  # spy.Quantized, in order; of one rank


def run(config: TrainConfig, fusions: bool = True) -> list[Run]:
    """Train on as many ranks as the layout has; what each of them saw.

    Args:
        fusions: let the models ask for the kernels that Transformer Engine and Apex have on a GPU.
    """
    return ranks.run_ranks(_run, config.parallel.world_size, config, fusions)


def _run(config: TrainConfig, fusions: bool) -> Run:
    import spy

    import nemo_tsdkd.megatron.cpu as cpu
    import nemo_tsdkd.megatron.train as module
    from nemo_tsdkd.megatron.gpt import unwrap

    if not fusions:
        cpu.missing_kernels = cpu._CUDA_KERNELS
    seen = ExitStack()
    calls: list = []

    class Look(module.SaveAndStop):
        def on_train_start(self, trainer, model):
            super().on_train_start(trainer, model)
            assert model.config.apply_rope_fusion == model.config.gradient_accumulation_fusion == fusions
            models = {"student": unwrap(model.module), "teacher": model.teacher.module}
            calls.append(seen.enter_context(spy.quantizations(**models)))

    module.SaveAndStop = Look
    with seen:
        module.train(config)
    run_dir = Path(config.run_dir)
    of_layout = (*TIMES, "teacher_bytes_sent")
    metrics = [{k: v for k, v in row.items() if k not in of_layout} for row in read_metrics(run_dir / "metrics.jsonl")]
    trained = saved_weights(step_folder(run_dir, config.max_steps))
    return Run(metrics, trained, saved_weights(Path(config.student.path)), calls[0])


# What near-ties decide, and a norm of which they are a part: with 16 bits and fewer, rounding tips some.
TIPPING = ("rank_agreement", "opener_fraction", "indirect", "grad_norm")


def compare(outcome: Run, expected: Run, *, metrics: float, tipping: float, updates: float) -> None:
    """Metrics within relative tolerances, and within another what each weight learned; padding rows aside."""
    for row, expected_row in zip(outcome.metrics, expected.metrics, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in row.items():
            tolerance = tipping if name in TIPPING else metrics
            close = pytest.approx(expected_row[name], rel=tolerance, abs=tolerance / 10)
            assert value == close, f"step {row['step']}, {name}: {value}, not {expected_row[name]}"
    assert outcome.weights.keys() == expected.weights.keys() == expected.began_with.keys()
    for name, start in expected.began_with.items():
        ours, theirs = (of.weights[name][: len(start)].float() for of in (outcome, expected))
        error, learned = (ours - theirs).norm().item(), (theirs - start.float()).norm().item()
        assert learned > 0 and error <= updates * learned, f"{name}: {error} off of {learned} learned"
