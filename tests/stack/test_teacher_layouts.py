"""The teacher in a layout of its own changes nothing: metrics and weights are those of the run on one process."""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch
from test_layouts import compare, results, run

from nemo_tsdkd.config.schema import TrainConfig

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
# ranks, the student's layout, the teacher's; the batch of 8 holds uneven responses and rows without one.
PAIRS = {
    "tp4_dp4": (4, {}, {TP: 4}),
    "pp4_tp2_dp2": (4, {TP: 2}, {TP: 1, PP: 4}),
    "tp2_pp2_of_tp2_pp2_dp2": (8, {TP: 2, PP: 2}, {}),
    "tp2_pp2_tp2_dp4_sp": (8, {TP: 2, SP: True}, {PP: 2, SP: False}),
    "without_and_with_sp": (4, {TP: 2, SP: True}, {TP: 4, SP: False}),
    "with_and_without_sp": (4, {}, {TP: 2, SP: True}),
    "dp4_pp2_tp2": (4, {TP: 2, PP: 2, SP: True}, {TP: 1, PP: 1}),
    "dp2_dp4_fused": (4, {TP: 1}, {TP: 2, PP: 1}),
}


APART = {  # nodes of two ranks: all of them and the teacher's; the student's layout, the teacher's
    "one_node_each": (2, 1, {TP: 2, SP: True}, {PP: 2, TP: 1}),
    "two_for_the_teacher": (3, 2, {PP: 2}, {PP: 1, TP: 2, SP: True}),
}


def config_of(root, run_dir, name: str) -> tuple[int, TrainConfig]:
    world_size, student, teacher = PAIRS[name]
    config = tiny_run.config(root, run_dir, world_size, **student)
    config.micro_batch_size = 1 if config.data_parallel_size > 4 else 2
    for field, value in teacher.items():
        setattr(config.teacher.parallel, field, value)
    config.teacher.micro_batch_size = 3
    if config.one_layout:
        config.teacher.micro_batch_size = 1
    if name.endswith("fused"):
        config.objective.head = "fused"
    return world_size, config


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """The reference: one process, off-policy."""
    return ranks.run_ranks(run, 1, tiny_run.config(root, tmp_path_factory.mktemp("alone"), 1))[0]


@pytest.mark.parametrize("name", PAIRS)
def test_five_steps_equal_those_of_one_process(name, root, alone, tmp_path):
    world_size, config = config_of(root, tmp_path, name)
    compare(*ranks.run_ranks(run, world_size, config)[0], *alone)


def train_apart(config: TrainConfig) -> None:
    from nemo_tsdkd.megatron.train import train

    train(config)


def result_of(config: TrainConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return results(Path(config.run_dir), config.max_steps)


@pytest.mark.parametrize("name", APART)
def test_a_teacher_on_nodes_of_its_own(name, root, alone, tmp_path):
    nodes, teacher_nodes, student, teacher = APART[name]
    config = tiny_run.config(root, tmp_path, 2, **student)
    config.parallel.num_nodes, config.teacher.nodes = nodes, teacher_nodes
    for field, value in teacher.items():
        setattr(config.teacher.parallel, field, value)
    config.teacher.micro_batch_size = 4
    ranks.run_ranks(train_apart, 2 * nodes, config, meet=False)
    compare(*ranks.run_ranks(result_of, 1, config)[0], *alone)
