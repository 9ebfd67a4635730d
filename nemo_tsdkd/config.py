"""Typed configuration: every field a user may set, its default and its rule.

`conf/*.yaml` is composed by Hydra onto these dataclasses (`cli.py`), so an unknown key or a wrong type is an
error that names it. `validate()` holds the rules between fields; it needs neither torch nor a GPU, so a
submission can be checked on the login node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

PRESETS = ("paper", "reference", "gkd", "forward_kl", "reverse_kl")
HEADS = ("logits", "fused")


def _require(ok: bool, name: str, value: Any, rule: str, fix: str) -> None:
    """Raise the one shape of error a user ever sees for a bad field."""
    if not ok:
        raise ValueError(f"{name} = {value!r}: {rule}. {fix}")


def _in(name: str, value: Any, allowed: Sequence[Any]) -> None:
    _require(value in allowed, name, value, f"must be one of {', '.join(map(str, allowed))}", "Choose one of these.")


def _positive(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{prefix}.{name}", value, "must be greater than 0", "Give a positive number.")


def _not_negative(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= 0, f"{prefix}.{name}", value, "must not be negative", "Give 0 or more.")


def _share(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(0.0 <= value <= 1.0, f"{prefix}.{name}", value, "must lie in [0, 1]", "Give a share between 0 and 1.")


@dataclass
class ObjectiveConfig:
    """The TSD-KD objective (docs/math.md). Defaults are the paper's."""

    preset: str = "paper"  # paper | reference | gkd | forward_kl | reverse_kl
    beta: float = 0.9  # JSD mixture weight of the teacher; 0 and 1 are the exact KL limits
    threshold: float = 0.1  # c: share of the response's student entropy that the opener holds
    indirect_kd_alpha: float = 0.1  # weight of the indirect term
    direct_weight: float = 1.0  # weight of the direct term; the paper's is 1
    entropy_weight: float = 1.0  # weight of the entropy term
    top_k: int = 10  # candidates the student proposes at an opener position
    entropy_fraction: float = 0.1  # share of response positions whose entropy is lowered
    gate_temperature: float = 1.0  # tau of the gate
    temperature: float = 1.0  # divides the logits of both models
    opener_rule: str = "cumulative_entropy"  # selection rules by registry name (objective/selection.py)
    entropy_rule: str = "top_fraction"
    gate_rule: str = "confidence"
    head: str = "logits"  # logits | fused: fused never holds a [tokens, V/TP] tensor
    chunk_tokens: int = 256  # tokens whose fp32 logits exist at once

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise ValueError on the first field that breaks its rule. Selection rules are checked by their registry."""
        _in("objective.preset", self.preset, PRESETS)
        _in("objective.head", self.head, HEADS)
        _share(self, "objective", "beta", "threshold", "entropy_fraction")
        _not_negative(self, "objective", "indirect_kd_alpha", "direct_weight", "entropy_weight")
        _positive(self, "objective", "top_k", "gate_temperature", "temperature", "chunk_tokens")
        if vocab_size is not None:
            _require(
                self.top_k <= vocab_size,
                "objective.top_k",
                self.top_k,
                f"must not exceed the vocabulary ({vocab_size} tokens)",
                "Lower top_k.",
            )


@dataclass
class ModelConfig:
    """One model: a local Hugging Face folder (safetensors) or a NeMo checkpoint folder."""

    path: str = "???"


@dataclass
class TeacherConfig(ModelConfig):
    micro_batch_size: int = 1  # rows of the teacher's forward-only pass
    offload: str = "none"  # none | cpu: where its hidden states wait for the student
    park: bool = False  # hold the teacher's weights on the host between passes
    precision: str = "bf16"  # bf16 | fp32 | fp8_tensorwise | fp8_blockwise


@dataclass
class ParallelConfig:
    """The layout, shared by student and teacher. world size = TP x PP x CP x DP; DP is what is left."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_nodes: int = 1
    gpus_per_node: int = 1  # ranks on a node; processes where there is no GPU


@dataclass
class PrecisionConfig:
    """The student's arithmetic. The LM head and the loss never run in FP8."""

    name: str = "bf16"  # bf16 | fp32 | fp8_tensorwise | fp8_blockwise
    first_last_layers_bf16: bool = True


@dataclass
class DataConfig:
    path: str = "???"  # .jsonl or .parquet, a folder of them, or a hub data set name
    subset: str | None = None  # of a hub data set
    split: str = "train"  # of a hub data set
    prompt_column: str = "prompt"
    response_column: str = "response"
    seq_length: int = 2048  # prompt + response; longer prompts are dropped and counted
    apply_chat_template: bool = True
    limit: int | None = None  # read the first `limit` rows only


@dataclass
class RolloutConfig:
    """lmbda is the chance that a batch is written by the student (on-policy) instead of read from the data."""

    lmbda: float = 1.0
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    batch_size: int = 64  # sequences decoded at once on a data-parallel rank
    reuse: int = 1  # optimizer steps on one set of rollouts


@dataclass
class OptimConfig:
    lr: float = 1e-5
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0


@dataclass
class CheckpointConfig:
    every_n_steps: int = 100
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # besides these, one each so many steps is kept for good; 0: none
    async_save: bool = False


@dataclass
class TrainConfig:
    """The root of `nemo-tsdkd train`."""

    run_dir: str = "???"
    max_steps: int = 1000
    global_batch_size: int = 64
    micro_batch_size: int = 1
    seed: int = 1234
    log_every_n_steps: int = 1
    progress_bar: bool = True
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def world_size(self) -> int:
        return self.parallel.num_nodes * self.parallel.gpus_per_node

    @property
    def data_parallel_size(self) -> int:
        p = self.parallel
        return self.world_size // (
            p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        )
