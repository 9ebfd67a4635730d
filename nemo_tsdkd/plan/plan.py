"""A job's plan: dry runs of its roles, beside the arithmetic of `nemo-tsdkd check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.memory import GIB, RESERVE, Memory, per_stage, teacher_per_gpu
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.plan.estimate import TIMED, Step, act_seconds, bottleneck, step_of
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.processes import dry_runs
from nemo_tsdkd.plan.request import Request
from nemo_tsdkd.plan.roles import Role, roles

FAKED = "bf16"  # in place of FP8, which has no kernels without a GPU


@dataclass(frozen=True)
class Stage:
    """One role's memory, in bytes, without `RESERVE`.

    Attributes:
        arithmetic: by act, as `check` counts it.
        fp8_copies: of weights; the dry run computes in bf16, so both figures have them from the arithmetic.
    """

    step: Step
    arithmetic: dict[str, float]
    fp8_copies: float

    def held(self, act: str) -> float:
        """At the act's begin."""
        return self.step.held[act] + self.fp8_copies

    def peak_of(self, act: str) -> float:
        return self.step.peak[act] + self.fp8_copies

    @property
    def fullest(self) -> str:
        """The act with the most bytes."""
        return max(self.step.peak, key=self.peak_of)

    @property
    def peak(self) -> float:
        return self.peak_of(self.fullest)


@dataclass(frozen=True)
class Plan:
    """What is known of a job."""

    config: TrainConfig
    hardware: Hardware
    stages: list[Stage]
    has_experts: bool = False  # its router is taken to spread the tokens evenly

    @property
    def seconds(self) -> dict[str, float]:
        """Of each act of a step."""
        steps = [stage.step for stage in self.stages]
        return {act: act_seconds(act, steps, self.config) for act in TIMED}

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        return bottleneck([stage.step for stage in self.stages])

    @property
    def needs(self) -> float:
        """Bytes of the fullest GPU, with `RESERVE`."""
        return max(stage.peak for stage in self.stages) + RESERVE

    @property
    def fits(self) -> bool:
        return self.needs <= self.hardware.memory_gib * GIB

    def as_json(self) -> dict[str, Any]:
        """Bytes in GiB, times in seconds."""
        return {
            "world_size": self.config.parallel.world_size,
            "fits": self.fits,
            "reserve_gib": RESERVE / GIB,
            "stages": [_stage_json(stage) for stage in self.stages],
            "collectives": [
                {"stage": stage.step.role.name, **one._asdict()}
                for stage in self.stages
                for one in stage.step.collectives
            ],
            "flops": {stage.step.role.name: stage.step.flops for stage in self.stages},
            "time": {**self.seconds, "step": self.step_s, "bottleneck": self.bottleneck},
            "hardware": asdict(self.hardware),
        }


def _stage_json(stage: Stage) -> dict[str, Any]:
    step = stage.step
    acts = {
        act: {
            "held_gib": stage.held(act) / GIB,
            "peak_gib": stage.peak_of(act) / GIB,
            "at_peak_gib": {label: size / GIB for label, size in step.at_peak[act].items()},
            **({"arithmetic_gib": stage.arithmetic[act] / GIB} if act in stage.arithmetic else {}),
        }
        for act in step.peak
    }
    return {
        "stage": step.role.name,
        "rank": step.role.rank,
        "peak_gib": stage.peak / GIB,
        "arithmetic_gib": max(stage.arithmetic.values()) / GIB,
        "phases": acts,
    }


def plan_job(
    config: TrainConfig,
    shapes: Mapping[str, ModelShape],
    hardware: Hardware,
    *,
    opener_share: float,
    show: Callable[[int], None],
    which: Sequence[Role] = (),
    layers: Mapping[str, int] | None = None,
) -> Plan:
    """Dry-run a job's roles.

    Args:
        shapes: of "student" and "teacher", whose paths are folders with a config.json.
        opener_share: share of the response tokens that the indirect term ranks.
        show: is called with the number of acts that have ended (`processes.dry_runs`).
        which: roles; all, if none is named.
        layers: numbers of layers to plan with instead of the models' own.

    Raises:
        HostError, RuntimeError: as `dry_runs`.
    """
    which = which or roles(config)
    faked = in_bf16(config)
    vocabulary = min(shape.vocab for shape in shapes.values())
    speeds = {name: getattr(hardware, name) for name in ("flops_per_s", "bytes_per_s", "kernel_s")}
    requests = [Request(faked, role.rank, vocabulary, dict(layers or {}), opener_share, **speeds) for role in which]
    shapes = {name: replace(shape, layers=(layers or {}).get(name, shape.layers)) for name, shape in shapes.items()}
    stages = []
    for role, result in zip(which, dry_runs(requests, show), strict=True):
        arithmetic, copies = _arithmetic(config, faked, role, shapes)
        stages.append(Stage(step_of(role, result, config, hardware), arithmetic, copies))
    return Plan(config, hardware, stages, has_experts=any(shape.experts for shape in shapes.values()))


def in_bf16(config: TrainConfig) -> TrainConfig:
    """`config` without FP8."""
    student, teacher = (
        FAKED if name.startswith("fp8") else name for name in (config.precision.name, config.teacher.precision)
    )
    return replace(
        config,
        precision=replace(config.precision, name=student),
        teacher=replace(config.teacher, precision=teacher),
    )


def _arithmetic(
    config: TrainConfig, faked: TrainConfig, role: Role, shapes: Mapping[str, ModelShape]
) -> tuple[dict[str, float], float]:
    """(bytes by act, bytes of FP8 copies among them) of a role, as `check` counts them."""
    if role.student_stage is None:
        with_copies, without = (teacher_per_gpu(c, **shapes) - RESERVE for c in (config, faked))
        return {"teacher": with_copies}, with_copies - without
    memory, without_fp8 = (per_stage(c, **shapes)[role.student_stage] for c in (config, faked))
    return by_act(memory), memory.resident - without_fp8.resident


def by_act(memory: Memory) -> dict[str, float]:
    """A GPU's bytes in each act, without `RESERVE`."""
    resident = memory.resident
    return {
        "rollout": resident + memory.rollout,
        "teacher": resident + memory.teacher,
        "student": resident + memory.update,
    }
