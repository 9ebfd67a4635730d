"""Layouts of a pair of models on the job's GPUs: which fit, by arithmetic, and the best of them dry-run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.memory import GIB, per_gpu
from nemo_tsdkd.checks.precision import check_names
from nemo_tsdkd.checks.setup import check_layouts
from nemo_tsdkd.config.integers import ceil_div
from nemo_tsdkd.config.schema import RECOMPUTE
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.plan import Plan

MICRO_BATCH_SIZES = (1, 2, 4, 8)
REPEATED_WORK = {"none": 0.0, "selective": 0.2, "full": 1.0}  # share of a forward pass; MLPs' products without the last
KERNELS = 25  # of a decoded token and layer


@dataclass(frozen=True)
class Candidate:
    """A layout of the student's; the teacher's follows the configuration.

    Attributes:
        seconds: of a step by a rough count of products, messages and kernels: good for an order, no more.
        reason: why it cannot run; None if it can.
        plan: its dry run, if there was one.
    """

    config: TrainConfig
    memory_gib: float
    seconds: float
    reason: str | None = None
    plan: Plan | None = None

    @property
    def name(self) -> str:
        p, c = self.config.parallel, self.config
        return (
            f"TP {p.tensor_model_parallel_size} PP {p.pipeline_model_parallel_size} CP {p.context_parallel_size} "
            f"DP {c.data_parallel_size} micro-batch {c.micro_batch_size} recompute {p.recompute}"
        )

    @property
    def overrides(self) -> str:
        """What gives the configuration this layout."""
        p = self.config.parallel
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "recompute")
        fields = [f"parallel.{name}={getattr(p, name)}" for name in names]
        fields.append(f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}")
        return " ".join([*fields, f"micro_batch_size={self.config.micro_batch_size}", "micro_batch_tokens=0"])


def sweep(
    config: TrainConfig,
    shapes: Mapping[str, ModelShape],
    hardware: Hardware,
    dry_run: Callable[[TrainConfig], Plan],
    best: int,
) -> list[Candidate]:
    """All layouts: the `best` feasible ones with their dry runs, by its time; the other feasible ones by the rough
    time; then the infeasible ones."""
    found = [_judge(layout, shapes, hardware) for layout in layouts(config, shapes["student"])]
    feasible = sorted((c for c in found if c.reason is None), key=_order)
    planned = [Candidate(c.config, c.memory_gib, c.seconds, plan=dry_run(c.config)) for c in feasible[:best]]
    planned.sort(key=lambda c: c.plan.step_s if c.plan else 0.0)
    return [*planned, *feasible[best:], *(c for c in found if c.reason is not None)]


def _order(candidate: Candidate) -> tuple:
    """By time; of about equal ones the plainest first."""
    config = candidate.config
    plain = config.parallel.model_parallel_size, RECOMPUTE.index(config.parallel.recompute), config.micro_batch_size
    return round(candidate.seconds, 1), *plain


def layouts(config: TrainConfig, student: ModelShape) -> Iterator[TrainConfig]:
    """Configurations with other layouts of the student on the same GPUs: TP within a node, PP by the layers, CP up to
    8, every micro-batch size that a rank's rows allow, every kind of recomputation."""
    ranks, per_node = config.student_world_size, config.parallel.gpus_per_node
    tensor = [n for n in _powers_of_two(per_node) if student.heads % n == 0]
    pipeline = _powers_of_two(min(ranks, student.layers))
    context = _powers_of_two(min(8, ranks)) if config.precision.name != "fp32" else [1]
    for tp, pp, cp in itertools.product(tensor, pipeline, context):
        if ranks % (tp * pp * cp):
            continue
        rows = ceil_div(config.global_batch_size, ranks // (tp * pp * cp))
        for size, recompute in itertools.product(MICRO_BATCH_SIZES, RECOMPUTE):
            if size > 1 and size > rows:
                continue
            other = copy.deepcopy(config)
            p = other.parallel
            p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size = tp, pp, cp
            p.sequence_parallel, p.recompute = tp > 1, recompute
            other.micro_batch_size, other.micro_batch_tokens = size, 0
            yield other


def _powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _judge(config: TrainConfig, shapes: Mapping[str, ModelShape], hardware: Hardware) -> Candidate:
    try:
        config.validate()
        check_names(config)
        check_layouts(config, shapes)
    except UserError as error:
        return Candidate(config, 0.0, 0.0, str(error))
    memory = per_gpu(config, **shapes).peak / GIB
    reason = None
    if memory > hardware.memory_gib:
        reason = f"needs {memory:.1f} GiB of {hardware.memory_gib:.1f}"
    return Candidate(config, memory, rough_seconds(config, shapes, hardware), reason)


def rough_seconds(config: TrainConfig, shapes: Mapping[str, ModelShape], hardware: Hardware) -> float:
    """Of a step, without a dry run."""
    student, teacher = shapes["student"], shapes["teacher"]
    p, micro_batches = config.parallel, config.full_micro_batches
    tokens = config.global_batch_size * config.data.seq_length
    layers = student.layers // p.pipeline_model_parallel_size
    params = student.layers * student.layer_params + student.table_params(1)
    work = (6 + 2 * REPEATED_WORK[p.recompute]) * params * tokens / config.student_world_size / hardware.flops_per_s
    messages = _tensor_parallel_s(config, student, layers, tokens, micro_batches, hardware)
    update = (work + messages) * (micro_batches + p.pipeline_model_parallel_size - 1) / micro_batches
    gradients = 6 * student.stage_params(p.tensor_model_parallel_size, p.pipeline_model_parallel_size, 0)
    speed, _ = hardware.link(inside_node=config.student_world_size <= p.gpus_per_node)
    update += gradients / speed if config.data_parallel_size > 1 else 0
    teacher_params = teacher.layers * teacher.layer_params
    forward = 2 * teacher_params * tokens / config.teacher_world_size / hardware.flops_per_s
    return update + forward + config.rollout.lmbda * _decode_s(config, student, hardware)


def _tensor_parallel_s(
    config: TrainConfig, student: ModelShape, layers: int, tokens: int, micro_batches: int, hardware: Hardware
) -> float:
    """Eight gathers and scatters a layer, of the residual stream in 16 bits."""
    p = config.parallel
    if p.tensor_model_parallel_size == 1:
        return 0.0
    mine = tokens / config.data_parallel_size / p.context_parallel_size
    size = 8 * layers * mine * student.hidden * 2
    return size / hardware.nvlink_bytes_per_s + 8 * layers * micro_batches * hardware.nvlink_latency_s


def _decode_s(config: TrainConfig, student: ModelShape, hardware: Hardware) -> float:
    """Decoding to the limit: weights and cache are read once a token, and each layer launches its kernels."""
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    per_rank = ceil_div(config.global_batch_size, config.data_parallel_size * p.context_parallel_size)
    rows = min(config.rollout.batch_size, per_rank)
    read = 2 * student.stage_params(tp, pp, pp - 1)
    read += 2 * 2 * rows * config.data.seq_length // 2 * student.kv_width * (student.layers // pp) // tp
    layer = KERNELS * hardware.kernel_s + (2 * hardware.nvlink_latency_s if tp > 1 else 0)
    token = max(read / hardware.bytes_per_s, student.layers // pp * layer)
    return ceil_div(per_rank, rows) * config.rollout.max_new_tokens * token * pp
