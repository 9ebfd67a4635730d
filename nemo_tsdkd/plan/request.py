"""What a dry run of one rank is asked, and what it answers: JSON, because it is another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from nemo_tsdkd.config.train_config import TrainConfig

HIDDEN_STATES = "teacher's hidden states"  # label of the one thing that grows with a step's micro-batches

ACTS = 6  # of a dry run: rollout, teacher's and student's pass of two steps


@dataclass(frozen=True)
class Request:
    """One rank of a job.

    Attributes:
        config: in bf16 or fp32; both models' paths are Hugging Face folders with a config.json.
        rank: among all ranks of the job.
        vocabulary: token ids of the tokenizer.
        layers: instead of a model's own number of layers, by "student" or "teacher".
        opener_share: share of the response tokens that the indirect term ranks.
        flops_per_s, bytes_per_s, kernel_s: a GPU's, for the time of its operators.
    """

    config: TrainConfig
    rank: int
    vocabulary: int
    layers: dict[str, int] = field(default_factory=dict)
    opener_share: float = 1.0
    flops_per_s: float = float("inf")
    bytes_per_s: float = float("inf")
    kernel_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        config = OmegaConf.to_container(OmegaConf.structured(self.config))
        return {**vars(self), "config": config}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        typed = OmegaConf.merge(OmegaConf.structured(TrainConfig), data["config"])
        return cls(**data | {"config": OmegaConf.to_object(typed)})


@dataclass(frozen=True)
class Result:
    """What one rank does in a step of fewer micro-batches than the job's.

    Attributes:
        phases: load, rollout, decode (within the rollout), teacher, student and optimizer: fields of
            `distributed.ledger.Phase`.
        decode_steps: that were run, of a rollout's.
        share: of the job's micro-batches that were run.
        groups: name -> ranks of each process group in the collectives.
    """

    rank: int
    phases: dict[str, dict[str, Any]]
    decode_steps: int
    share: float
    groups: dict[str, list[int]]
