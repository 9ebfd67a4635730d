"""From what dry runs saw of some ranks to a whole step: bytes, collectives, FLOPs and time of each act.

The time is an estimate on stated assumptions: every operator at the roofline's speed, every collective after the work
before it (no overlap), a pipeline's bubble in full, all rollouts as long as they may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nemo_tsdkd.config.integers import ceil_div
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.request import HIDDEN_STATES, Result
from nemo_tsdkd.plan.roles import Role

TIMED = ("rollout", "teacher", "student", "optimizer")  # the acts of a step, one after the other
REPEATED = ("teacher", "student")  # acts whose work grows with the micro-batches


class Collective(NamedTuple):
    """Calls of one collective in a step; `size` is the bytes of the largest tensor of each, summed."""

    act: str
    group: str
    operator: str
    calls: float
    size: float


@dataclass(frozen=True)
class Step:
    """A step of one role.

    Attributes:
        held, peak, at_peak: bytes by act; the last by act and label. `load` is an act here, `decode` a part of rollout.
        flops, compute_s: by act of TIMED.
        collectives: of a step.
        collective_s: by act and group.
    """

    role: Role
    held: dict[str, float]
    peak: dict[str, float]
    at_peak: dict[str, dict[str, float]]
    flops: dict[str, float]
    compute_s: dict[str, float]
    collectives: list[Collective]
    collective_s: dict[tuple[str, str], float]

    def seconds(self, act: str) -> float:
        """Of an act on this role's ranks, without waiting for others."""
        return self.compute_s.get(act, 0) + sum(s for (of, _), s in self.collective_s.items() if of == act)


def step_of(role: Role, result: Result, config: TrainConfig, hardware: Hardware) -> Step:
    """The job's step of `role` from a dry run of it."""
    times = {act: _times(act, result.share, config, result.decode_steps) for act in result.phases}
    at_begin, at_peak = (
        {act: _whole_step(phase[when], result.share) for act, phase in result.phases.items()}
        for when in ("at_begin", "at_peak")
    )
    for act, parts in at_begin.items():  # with all hidden states an act may hold most at its begin
        at_peak[act] = max(parts, at_peak[act], key=lambda labels: sum(labels.values()))
    flops: dict[str, float] = dict.fromkeys(TIMED, 0.0)
    compute = dict(flops)
    collectives = []
    for act, phase in result.phases.items():
        if act == "load":
            continue
        into = "rollout" if act == "decode" else act
        flops[into] += phase["flops"] * times[act]
        compute[into] += phase["seconds"] * times[act]
        for group, operator, calls, size in phase["collectives"]:
            n = 1 if act in REPEATED and _once_a_step(group) else times[act]
            collectives.append(Collective(into, group, operator, calls * n, size * n))
    seconds: dict[tuple[str, str], float] = {}
    for one in collectives:
        key = one.act, one.group
        ranks = result.groups.get(one.group, range(2))
        seconds[key] = seconds.get(key, 0) + _collective_s(one, ranks, config, hardware)
    return Step(
        role=role,
        held={act: sum(parts.values()) for act, parts in at_begin.items()},
        peak={act: sum(parts.values()) for act, parts in at_peak.items()},
        at_peak=at_peak,
        flops=flops,
        compute_s=compute,
        collectives=collectives,
        collective_s=seconds,
    )


def _whole_step(at_peak: dict[str, int], share: float) -> dict[str, float]:
    """Bytes by label when all micro-batches' hidden states are there."""
    return {label: size / share if label == HIDDEN_STATES else size for label, size in at_peak.items()}


def _times(act: str, share: float, config: TrainConfig, decode_steps: int) -> float:
    """How often a step repeats what the dry run did of an act."""
    if act in REPEATED:
        return 1 / share
    if act != "decode":
        return 1
    ranks = config.data_parallel_size * config.parallel.context_parallel_size
    waves = ceil_div(ceil_div(config.global_batch_size, ranks), config.rollout.batch_size)
    return waves * (config.rollout.max_new_tokens - 1) / decode_steps * config.rollout.lmbda


def _once_a_step(group: str) -> bool:
    """Whether a group reduces what all micro-batches left: gradients, and numbers that are reported."""
    return group.startswith(("dp", "embedding"))


def _collective_s(one: Collective, ranks: Sequence[int], config: TrainConfig, hardware: Hardware) -> float:
    """Seconds of its calls: a latency each, and the bytes that a ring passes through each rank."""
    if len(ranks) < 2:
        return 0.0
    nodes = {rank // config.parallel.gpus_per_node for rank in ranks}
    speed, latency = hardware.link(inside_node=len(nodes) == 1)
    passes = 2 if one.operator.startswith("allreduce") else 1
    ring = 1 if one.operator in ("send", "recv", "broadcast", "ring") else (len(ranks) - 1) / len(ranks)
    return one.calls * latency + passes * ring * one.size / speed


def act_seconds(act: str, steps: Sequence[Step], config: TrainConfig) -> float:
    """Seconds of an act of the job: that of the slowest role, and the pipeline's waiting on top."""
    slowest = max(step.seconds(act) for step in steps)
    stages = config.parallel.pipeline_model_parallel_size
    if act == "rollout":
        return slowest * stages  # a token passes through all stages before the next one
    if act == "student":
        return slowest * (config.full_micro_batches + stages - 1) / config.full_micro_batches
    return slowest


def bottleneck(steps: Sequence[Step]) -> str:
    """The largest part of a step, in words."""
    return max(_parts(steps), key=lambda part: part[1])[0]


def _parts(steps: Sequence[Step]) -> Iterator[tuple[str, float]]:
    for step in steps:
        for act, seconds in step.compute_s.items():
            yield f"computation of the {act} on {step.role.name}", seconds
        for (act, group), seconds in step.collective_s.items():
            yield f"collectives of the {act} over the group {group}", seconds
