"""The configuration of `nemo-tsdkd train`: all sections, and the rules between them.

`conf/*.yaml` is composed by Hydra onto these dataclasses (`compose.py`), so an unknown key or a wrong type is an
error that names it. `validate()` needs neither torch nor a GPU, so a submission can be checked on the login node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any
from unicodedata import category

from nemo_tsdkd.config import validation
from nemo_tsdkd.config.schema import (
    MISSING,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherConfig,
    TeacherLayoutConfig,
)
from nemo_tsdkd.config.watch import SamplesConfig, ValidationConfig

LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass
class TrainConfig:
    """The root of `nemo-tsdkd train`."""

    run_dir: str = MISSING
    max_steps: int = 1000
    global_batch_size: int = 64  # sequences of an optimizer step, over all ranks
    micro_batch_size: int = 1  # sequences of one forward and backward pass on a rank
    # In place of micro_batch_size, if not 0: as many sequences as fit into so many tokens, padding included. A sequence
    # that is longer has a micro-batch of its own. micro_batch_size must then be 1, which stands for "not set".
    micro_batch_tokens: int = 0
    seed: int = 1234
    progress_bar: bool = True
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])  # of tensorboard, wandb, mlflow; []: none
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    @property
    def student_world_size(self) -> int:
        """The student's ranks: those of all nodes but the `teacher.nodes` last."""
        return (self.parallel.num_nodes - self.teacher.nodes) * self.parallel.gpus_per_node

    @property
    def teacher_world_size(self) -> int:
        """The teacher's ranks: those of the last `teacher.nodes` nodes, or else the student's."""
        return self.teacher.nodes * self.parallel.gpus_per_node or self.student_world_size

    @property
    def data_parallel_size(self) -> int:
        return self.student_world_size // self.parallel.model_parallel_size

    @property
    def full_micro_batch_size(self) -> int:
        """Sequences of `data.seq_length` tokens in one of the student's micro-batches."""
        return max(self.micro_batch_size, self.micro_batch_tokens // self.data.seq_length)

    @property
    def full_micro_batches(self) -> int:
        """A rank's micro-batches of a step in which all sequences have `data.seq_length` tokens."""
        return max(1, self.global_batch_size // self.data_parallel_size // self.full_micro_batch_size)

    @property
    def teacher_parallel(self) -> TeacherLayoutConfig:
        """The teacher's layout, `teacher.parallel` over the student's."""
        own = {name: value for name, value in vars(self.teacher.parallel).items() if value is not None}
        layout = TeacherLayoutConfig(**vars(self.parallel) | own)
        if self.teacher.parallel.sequence_parallel is None and layout.tensor_model_parallel_size == 1:
            layout.sequence_parallel = False
        return layout

    def layout_of(self, which: str) -> ParallelConfig:
        """The layout of the "student" or the "teacher"."""
        return self.teacher_parallel if which == "teacher" else self.parallel

    @property
    def one_layout(self) -> bool:
        """Whether both models lie on the same ranks in the same way, so that hidden states stay where they are. Expert
        parallelism distributes weights, and no positions of the hidden states."""
        teacher = vars(self.teacher_parallel)
        return self.teacher.nodes == 0 and all(teacher[name] == value for name, value in vars(self.parallel).items())

    def validate(self, batch: bool = True) -> None:
        """Raise UserError on the first field that breaks its rule or a rule between fields. Reads no file.

        `batch=False`: the global batch need not divide over the ranks (`generate` has none).
        Not here: selection rules (their registry), precisions (`checks/precision.py`) and what the models allow
        (`checks/setup.py`).
        """
        missing = [name for name, value in _leaves(self) if value == MISSING]
        validation.require(
            not missing, ", ".join(missing), MISSING, "must be set", "Give it in the config or as key=value."
        )
        for name, value in _leaves(self):
            _check_leaf(name, value)
        validation.positive(self, "", "max_steps", "global_batch_size", "micro_batch_size")
        validation.not_negative(self, "", "seed", "micro_batch_tokens")
        validation.require(
            set(self.loggers) <= set(LOGGERS) and len(set(self.loggers)) == len(self.loggers),
            "loggers",
            self.loggers,
            f"must be a list of {', '.join(LOGGERS)}, each at most once",
            "Choose among these.",
        )
        for part in (
            *(self.teacher, self.objective, self.data, self.rollout, self.parallel, self.optim, self.checkpoint),
            *(self.validation, self.samples),
        ):
            part.validate()
        self.objective.validate_preset()
        self._validate_layouts()
        if batch:
            self._validate_batch()
        validation.require(
            not self.checkpoint.async_save or not self.teacher.offload_hidden_states,
            "checkpoint.async_save",
            self.checkpoint.async_save,
            "teacher.offload_hidden_states pins memory every step, from under the writers of Megatron-core 0.15",
            "Turn off one of the two.",
        )
        validation.require(
            self.optim.warmup_steps < self.max_steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"must be fewer than max_steps = {self.max_steps}",
            "Lower it.",
        )
        for name, steps in (
            ("checkpoint.every_n_steps", self.checkpoint.every_n_steps),
            ("max_steps", self.max_steps),
        ):
            why = ": a checkpoint holds no rollouts"
            validation.multiple_of(name, steps, self.rollout.reuse, "rollout.reuse", why)
        validation.require(
            self.rollout.lmbda == 0 or self.rollout.max_new_tokens < self.data.seq_length,
            "rollout.max_new_tokens",
            self.rollout.max_new_tokens,
            f"must be fewer than data.seq_length = {self.data.seq_length}, which also holds the prompt",
            "Lower it or raise data.seq_length.",
        )

        self._validate_validation()

    def _validate_validation(self) -> None:
        held_out, what = self.validation, "validation.path"
        validation.require(
            held_out.path is not None or not self.checkpoint.keep_best,
            "checkpoint.keep_best",
            self.checkpoint.keep_best,
            f"needs {what}: the best is the one with the best validation",
            "Give held-out prompts, or leave it out.",
        )
        if held_out.path is None:
            return
        if self.checkpoint.keep_best or held_out.patience:
            why = ": its checkpoint holds no rollouts"
            validation.multiple_of(
                "validation.every_n_steps", held_out.every_n_steps, self.rollout.reuse, "rollout.reuse", why
            )
        limit = held_out.max_new_tokens or self.rollout.max_new_tokens
        validation.require(
            limit < self.data.seq_length,
            "validation.max_new_tokens",
            limit,
            f"must be fewer than data.seq_length = {self.data.seq_length}, which also holds the prompt",
            "Lower it or raise data.seq_length.",
        )

    def _validate_layouts(self) -> None:
        validation.require(
            self.teacher.nodes < self.parallel.num_nodes,
            "teacher.nodes",
            self.teacher.nodes,
            f"must leave a node of parallel.num_nodes = {self.parallel.num_nodes} to the student",
            "Lower it or add nodes.",
        )
        nodes = "(parallel.num_nodes - teacher.nodes)" if self.teacher.nodes else "parallel.num_nodes"
        for prefix, layout, ranks, ranks_from in (
            ("", self.parallel, self.student_world_size, nodes),
            (
                "teacher.",
                self.teacher_parallel,
                self.teacher_world_size,
                "teacher.nodes" if self.teacher.nodes else nodes,
            ),
        ):
            validation.require(
                ranks % layout.model_parallel_size == 0,
                f"{ranks_from} x parallel.gpus_per_node",
                ranks,
                f"must be a multiple of {prefix}parallel's TP x PP x CP = {layout.model_parallel_size}",
                "Give more ranks or lower one of the parallel sizes.",
            )
            validation.require(
                not layout.sequence_parallel or layout.tensor_model_parallel_size > 1,
                f"{prefix}parallel.sequence_parallel",
                layout.sequence_parallel,
                f"needs {prefix}parallel.tensor_model_parallel_size > 1",
                "Turn it off.",
            )
        experts, stage = self.teacher.parallel.expert_model_parallel_size, self.teacher_parallel
        ranks = self.teacher_world_size // stage.pipeline_model_parallel_size
        validation.require(
            ranks % experts == 0,
            "teacher.parallel.expert_model_parallel_size",
            experts,
            f"must divide the {ranks} ranks of a pipeline stage of the teacher's",
            "Choose a divisor of them.",
        )

    def _validate_batch(self) -> None:
        tokens = self.micro_batch_tokens
        validation.require(
            not tokens or self.micro_batch_size == 1,
            "micro_batch_size",
            self.micro_batch_size,
            f"micro_batch_tokens = {tokens} decides how many sequences a micro-batch has",
            "Set micro_batch_size=1, which means none is set, or micro_batch_tokens=0.",
        )
        validation.require(
            not tokens or tokens >= self.data.seq_length,
            "micro_batch_tokens",
            tokens,
            f"must hold a sequence of data.seq_length = {self.data.seq_length} tokens",
            "Raise it, or lower data.seq_length.",
        )
        validation.require(
            not self.one_layout or tokens > 0 or self.teacher.micro_batch_size <= self.micro_batch_size,
            "teacher.micro_batch_size",
            self.teacher.micro_batch_size,
            f"must not exceed micro_batch_size = {self.micro_batch_size}: in one layout the teacher reads parts of it",
            "Lower it, or give the teacher a layout of its own.",
        )
        rows, dp = self.micro_batch_size, self.data_parallel_size
        what = f"micro_batch_size x DP = {rows} x {dp}"
        validation.multiple_of("global_batch_size", self.global_batch_size, rows * dp, what)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every field that is no section."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _check_leaf(name: str, value: Any) -> None:
    """What holds for a field of its kind, whatever it means."""
    if isinstance(value, float):
        validation.require(math.isfinite(value), name, value, "must be a finite number", "Give one.")
    elif isinstance(value, int):
        validation.require(abs(value) < 2**31, name, value, "must be less than 2^31", "Give a smaller number.")
    elif isinstance(value, str):
        readable = not any(category(character) in ("Cc", "Cs") for character in value)  # control, half a surrogate
        validation.require(readable, name, value, "not text", "Leave out what is no character.")
        is_path = name.endswith(("path", "_dir"))
        validation.require(not is_path or bool(value), name, value, "must be a path", "Give one.")
