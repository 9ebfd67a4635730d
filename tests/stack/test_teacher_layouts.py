"""The teacher in a layout of its own changes nothing: metrics and weights are those of the run on one process."""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch
from test_layouts import compare, compare_validation, results, run, training, validated  # noqa: F401  a fixture

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.rows import read_metrics

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


def look_at_a_pass(config: TrainConfig) -> dict:
    """Train two steps; compare what Megatron and torch keep for the student before and after each teacher's pass, and
    count what each rank really sends."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from nemo_tsdkd.distributed.hidden_exchange import HiddenExchange
    from nemo_tsdkd.megatron.teacher import Teacher
    from nemo_tsdkd.megatron.train import train

    seen = {"passes": 0, "changed": set(), "other": 0}

    def student_state() -> dict:
        groups = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
        tracker = get_cuda_rng_tracker()
        return {
            **groups,
            "tracker": tracker,
            **{f"tracker.{name}": state.tolist() for name, state in tracker.get_states().items()},
            "random": torch.get_rng_state().tolist(),
            "micro-batches": vars(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR).copy(),
        }

    forward, exchange = Teacher.forward, HiddenExchange.exchange

    def watched_forward(self, batch):
        before = student_state()
        result = forward(self, batch)
        after = student_state()
        seen["passes"] += 1
        seen["changed"] |= {name for name in before if before[name] is not after[name] and before[name] != after[name]}
        with self._pass.parallel_state.active():
            seen["other"] += (
                student_state()["_TENSOR_MODEL_PARALLEL_GROUP"] is not before["_TENSOR_MODEL_PARALLEL_GROUP"]
            )
            torch.rand(3)  # what the teacher draws is not missing from the student's random states
        seen["changed"] |= {
            name for name, value in student_state().items() if name == "random" and value != before[name]
        }
        return result

    class Counted:
        """The group of all ranks, counting the bytes that leave this one."""

        def alltoall_base(self, received, sent, receive_counts, send_counts):
            rank = dist.get_rank()
            row = sent.shape[1] * sent.itemsize
            counted.append((sum(send_counts) - send_counts[rank]) * row)
            return dist.group.WORLD.alltoall_base(received, sent, receive_counts, send_counts)

    counted: list[int] = []

    def counted_exchange(self, micro_batch, buffer, group):
        return exchange(self, micro_batch, buffer, Counted())

    Teacher.forward, HiddenExchange.exchange = watched_forward, counted_exchange
    train(config)
    return seen | {"counted": sum(counted)}


def test_the_teachers_pass_leaves_the_student_unchanged_and_counts_sent_bytes(root, tmp_path):
    world_size, config = config_of(root, tmp_path, "pp4_tp2_dp2")
    config.max_steps = 2
    seen = ranks.run_ranks(look_at_a_pass, world_size, config)
    for rank in seen:
        assert (rank["passes"], rank["other"], rank["changed"]) == (2, 2, set())
    steps = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    logged = sum(step["teacher_bytes_sent"] for step in steps)
    assert logged == sum(rank["counted"] for rank in seen) > 0
    # Only rank 3 is on the last of four stages: all hidden states (64 values of 4 bytes) begin there, and those of its
    # own share stay: half of the rows of its data-parallel rank, one of two.
    tokens = sum(step["response_tokens"] for step in steps)
    assert 0.5 * tokens * 256 < logged < tokens * 256


def test_a_killed_run_with_a_teacher_apart_resumes_bit_for_bit(root, tmp_path):
    def config_at(name: str) -> TrainConfig:
        config = tiny_run.config(root, tmp_path / name, 1, lmbda=1.0)
        config.parallel.num_nodes, config.teacher.nodes = 2, 1
        config.checkpoint.every_n_steps, config.max_steps = 2, 4
        return config

    ranks.run_ranks(train_apart, 2, config_at("whole"), meet=False)
    config = config_at("killed")
    killed = tmp_path / "killed" / "metrics.jsonl"
    ranks.run_ranks(
        train_apart, 2, config, meet=False, kill_when=lambda: killed.exists() and len(read_metrics(killed)) >= 3
    )
    assert not (tmp_path / "killed" / "FINISHED").exists()
    ranks.run_ranks(train_apart, 2, config, meet=False)
    (steps, weights), (expected_steps, expected) = (
        ranks.run_ranks(result_of, 1, config_at(name))[0] for name in ("killed", "whole")
    )
    assert [s["loss"] for s in steps] == [s["loss"] for s in expected_steps]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def train_apart(config: TrainConfig) -> None:
    from nemo_tsdkd.megatron.train import train

    train(config)


def result_of(config: TrainConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return results(Path(config.run_dir), config.max_steps)


@pytest.mark.parametrize("name", APART)
def test_a_teacher_on_nodes_of_its_own(name, root, alone, validated, tmp_path):  # noqa: F811
    nodes, teacher_nodes, student, teacher = APART[name]
    config = tiny_run.config(root, tmp_path, 2, **student)
    config.parallel.num_nodes, config.teacher.nodes = nodes, teacher_nodes
    for field, value in teacher.items():
        setattr(config.teacher.parallel, field, value)
    config.teacher.micro_batch_size = 4
    tiny_run.validate(config, root, 2, "none")
    ranks.run_ranks(train_apart, 2 * nodes, config, meet=False)
    steps, weights = ranks.run_ranks(result_of, 1, config)[0]
    compare(training(steps), weights, *alone)
    compare_validation(steps, tmp_path, validated)
