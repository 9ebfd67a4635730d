"""Training runs that are killed and go on: what the tests of resume and `benchmarks/faults.py` share.

Import it only where the ranks' harness is at hand; the training itself is imported inside the ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks
import torch

from nemo_tsdkd.checkpoints import run_lock
from nemo_tsdkd.checkpoints.manifest import has_manifest, step_folder
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.reporting.rows import read_metrics

# Metrics that depend on the machine.
TIMES = ("rollout_s", "teacher_s", "student_s", "save_s", "validation_s", "tokens_per_s", "timestamp", "memory_gib")

# What no logger may write down: keys in the environment, as a job has them.
CANARY = "canary-7f3a91"
SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JOB_SECRET", "MLFLOW_TRACKING_PASSWORD")


@dataclass
class Outcome:
    """What a run leaves: its metrics without times, its last weights, and the samples of each step."""

    metrics: list[dict]
    weights: dict[str, torch.Tensor]
    samples: dict[int, list[int]]


def train(config: TrainConfig, **kill: Any) -> Outcome | None:
    """Start or resume a run on as many ranks as it asks for; None where it was killed (`kill_when`, `victims`)."""
    results = ranks.run_ranks(_train, config.parallel.world_size, config, **kill)
    return results[0] if results else None


def _train(config: TrainConfig) -> Outcome:
    from nemo_tsdkd.megatron.train import train

    run_lock.STALE = 2.0  # a damaged lock costs so many seconds
    os.environ.update({"WANDB_MODE": "offline", **dict.fromkeys(SECRETS, CANARY)})
    _log_samples(Path(config.run_dir))
    train(config)
    torch.distributed.barrier()
    run_dir = Path(config.run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    return Outcome(
        metrics=[{name: value for name, value in row.items() if name not in TIMES} for row in rows],
        weights=saved_weights(step_folder(run_dir, config.max_steps)),
        samples=_read_samples(run_dir),
    )


def refusals(config: TrainConfig) -> list[str]:
    """Start a run that must not start: what each rank is told."""
    return ranks.run_ranks(_refusal, config.parallel.world_size, config)


def _refusal(config: TrainConfig) -> str:
    from nemo_tsdkd.megatron.train import train

    try:
        train(config)
    except UserError as error:
        return str(error)
    return "it started"


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every student tensor of a distributed checkpoint, whatever ranks wrote it; call it in a rank."""
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_plain_tensors(str(checkpoint / "weights"))
    return {k: v for k, v in stored.items() if k.startswith("module.") and isinstance(v, torch.Tensor)}


def _log_samples(run_dir: Path) -> None:
    """Let each data-parallel rank write down which samples it trains on in which step."""
    from megatron.core import parallel_state

    from nemo_tsdkd.megatron.model import TSDKDModel

    respond = TSDKDModel.respond

    def logged(self, samples, step):
        if parallel_state.get_model_parallel_group().rank() == 0:
            path = run_dir / f"samples_{parallel_state.get_data_parallel_rank()}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps([step + 1, [sample.index for sample in samples]]) + "\n")
        return respond(self, samples, step)

    TSDKDModel.respond = logged


def _read_samples(run_dir: Path) -> dict[int, list[int]]:
    """Samples by step. A step that was run again after a kill counts once, as it was run last."""
    steps: dict[int, list[int]] = {}
    for path in run_dir.glob("samples_*.jsonl"):
        last = {step: samples for step, samples in (json.loads(line) for line in path.read_text().splitlines())}
        for step, samples in last.items():
            steps[step] = sorted([*steps.get(step, []), *samples])
    return steps


def steps_done(config: TrainConfig, steps: int) -> Callable[[], bool]:
    """A moment to kill at: the rows of `steps` steps are in metrics.jsonl."""
    path = Path(config.run_dir, "metrics.jsonl")

    def done() -> bool:
        lines = path.read_text().splitlines() if path.is_file() else []
        return sum(not line.startswith('{"step": 0,') for line in lines) >= steps

    return done


def saving(config: TrainConfig, step: int) -> Callable[[], bool]:
    """A moment to kill at: weights of the step's checkpoint are on the disk, its manifest is not."""
    folder = step_folder(Path(config.run_dir), step)
    return lambda: any(folder.glob("weights/*.distcp")) and not has_manifest(folder)


def same(outcome: Outcome, expected: Outcome) -> bool:
    """Bit for bit."""
    return (
        outcome.metrics == expected.metrics
        and outcome.samples == expected.samples
        and outcome.weights.keys() == expected.weights.keys()
        and all(torch.equal(outcome.weights[name], value) for name, value in expected.weights.items())
    )
