"""The different things that ranks of a job do; ranks of one role differ in their data alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.layout import Layout, student_layout, teacher_layout


@dataclass(frozen=True)
class Role:
    """One rank, and the pipeline stages that it holds; None where it holds none of that model."""

    rank: int
    student_stage: int | None
    teacher_stage: int | None

    @property
    def name(self) -> str:
        """Such as "student 0, teacher 3": the models' pipeline stages."""
        stages = (("student", self.student_stage), ("teacher", self.teacher_stage))
        return ", ".join(f"{model} {stage}" for model, stage in stages if stage is not None)


def roles(config: TrainConfig) -> list[Role]:
    """The last rank of each role. Of a model's stages the first, the second and the last are different: those between
    hold the same as the second."""
    student, teacher = student_layout(config), teacher_layout(config)
    found: dict[tuple[int | None, int | None], Role] = {}
    for role in of_ranks(config, range(config.parallel.world_size)):
        found[_kind(student, role.student_stage), _kind(teacher, role.teacher_stage)] = role
    return sorted(found.values(), key=lambda role: role.rank)


def _stage(layout: Layout, rank: int) -> int | None:
    if rank not in layout.ranks:
        return None
    return (rank - layout.first_rank) // (layout.world_size // layout.pipeline)


def _kind(layout: Layout, stage: int | None) -> int | None:
    return None if stage is None else 0 if stage == 0 else 2 if stage == layout.pipeline - 1 else 1


def of_ranks(config: TrainConfig, ranks: Iterable[int]) -> list[Role]:
    """These ranks, whatever their roles."""
    student, teacher = student_layout(config), teacher_layout(config)
    return [Role(rank, _stage(student, rank), _stage(teacher, rank)) for rank in ranks]
