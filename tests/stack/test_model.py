"""What a run must never do: train the teacher, save it, go on after a NaN, or die with unsaved steps."""

import os
import re
import signal
from pathlib import Path

import pytest
import ranks
import tiny_run
import torch

from nemo_tsdkd.checkpoints.manifest import newest_complete, step_folder
from nemo_tsdkd.config.schema import RolloutConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.reporting.rows import read_metrics
from nemo_tsdkd.rollout.schedule import Response

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def train_and_look(config: TrainConfig) -> dict:
    """Train on this rank; return what the trained module holds and what became of the teacher."""
    from nemo_tsdkd.megatron import callbacks
    from nemo_tsdkd.megatron.train import train

    seen = {}

    class Look(callbacks.SaveAndStop):
        def on_train_start(self, trainer, model):
            super().on_train_start(trainer, model)
            seen["before"] = [p.clone() for p in model.teacher.module.parameters()]

        def on_train_end(self, trainer, model):
            teacher = list(model.teacher.module.parameters())
            owned = {id(p) for p in trainer.model.parameters()}
            seen["shared"] = sum(id(p) in owned for p in teacher)
            seen["trainable"] = sum(p.requires_grad or p.grad is not None for p in teacher)
            seen["changed"] = sum(not torch.equal(p, q) for p, q in zip(teacher, seen.pop("before"), strict=True))
            seen["student"] = sum(p.numel() for p in trainer.model.parameters())
            seen["optimized"] = sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"])

    import nemo_tsdkd.megatron.train as module

    module.SaveAndStop = Look
    train(config)
    return seen


def test_only_the_student_is_trained_counted_and_saved(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 1, lmbda=1.0)
    config.max_steps = 2
    seen = ranks.run_ranks(train_and_look, 1, config)[0]
    assert seen["shared"] == seen["trainable"] == seen["changed"] == 0
    assert seen["optimized"] == seen["student"]
    saved = ranks.run_ranks(tensors_of, 1, step_folder(tmp_path, 2))[0]
    layers = {shape[0] for name, shape in saved.items() if "decoder.layers" in name}
    assert layers == {2}  # the student's depth; the teacher has four layers
    assert {shape[1] for name, shape in saved.items() if "word_embeddings" in name} == {32}


def tensors_of(checkpoint: Path) -> dict:
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint / "weights"))
    return {name: tensor.global_shape for name, tensor in tensors.items() if name.startswith("module.")}


def train_with_nan(config: TrainConfig) -> str:
    """Put a NaN into one rank's weights after the first step; return the error that ends the run on this rank."""
    import nemo_tsdkd.megatron.train as module

    class Spoil(module.SaveAndStop):
        def on_train_batch_end(self, trainer, model, *args):
            super().on_train_batch_end(trainer, model, *args)
            if trainer.global_step == 1 and trainer.is_global_zero:
                with torch.no_grad():
                    next(p for n, p in model.module.named_parameters() if "linear_fc1" in n)[0] = float("nan")

    module.SaveAndStop = Spoil
    try:
        module.train(config)
    except FloatingPointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {TP: 2}), (2, {PP: 2})], ids=["tp", "pp"])
def test_a_nan_stops_every_rank_and_the_error_names_the_place(world_size, parallel, root, tmp_path):
    config = tiny_run.config(root, tmp_path, world_size, **parallel)
    config.checkpoint.every_n_steps = 1
    errors = ranks.run_ranks(train_with_nan, world_size, config)
    assert all("step 2: " in e and "loss = nan" in e for e in errors), errors
    where = r"\(rank \d: loss nan in the micro-batch of samples \[(\d+, )*\d+\]: sample \d+, token \d+\)"
    assert all(re.search(where, e) for e in errors), errors
    assert newest_complete(tmp_path) == step_folder(tmp_path, 1)


def test_a_student_that_can_draw_no_token_stops_every_rank(root, tmp_path):
    """Two data-parallel ranks: the NaN is in the weights of one alone."""
    errors = ranks.run_ranks(train_with_nan, 2, tiny_run.config(root, tmp_path, 2, lmbda=1.0))
    assert all("step 2: response token 0 of sample " in e and "no token can be drawn" in e for e in errors), errors
    assert errors[0] == errors[1]


def test_a_batch_without_any_response_ends_the_run_in_words(root, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "Ann", "response": "", "response_ids": []}\n' * 8)
    config = tiny_run.config(root, tmp_path / "run", 2)
    config.data.path = str(tmp_path / "data.jsonl")
    with pytest.raises(AssertionError, match="UserError: a global batch holds no response token"):
        ranks.run_ranks(train_and_look, 2, config)


def train_with_signal(config: TrainConfig, rank: int, step: int) -> int:
    """Send SIGUSR1 to one rank in the middle of a step, as a cluster does; return how often this rank generated."""
    from unittest.mock import patch

    import nemo_tsdkd.megatron.train as module
    from nemo_tsdkd.megatron import model

    class Signalled(module.SaveAndStop):
        def on_train_batch_start(self, trainer, model, *args):
            if trainer.global_step == step and trainer.global_rank == rank:
                os.kill(os.getpid(), signal.SIGUSR1)

    module.SaveAndStop = Signalled
    with patch.object(model, "generate", wraps=model.generate) as generate:
        module.train(config)
    return generate.call_count


def test_a_signal_to_one_rank_saves_and_stops_all_and_the_run_resumes(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 2, lmbda=1.0)
    ranks.run_ranks(train_with_signal, 2, config, 1, 2)
    assert newest_complete(tmp_path) == step_folder(tmp_path, 3)
    assert not (tmp_path / "FINISHED").exists()
    ranks.run_ranks(train_with_signal, 2, config, 1, -1)
    assert (tmp_path / "FINISHED").exists() and (tmp_path / "last_step").read_text() == "5\n"


def report_after_a_signal_to_all() -> str:
    """Start the process of results as on a GPU, send SIGUSR1 to every process of this rank, and use it."""
    import multiprocessing

    from nemo_tsdkd.megatron.checkpoints import save as saving

    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append("signal"))
    queues = []
    saving.filesystem_async._get_write_results_queue = lambda: queues.append(
        multiprocessing.get_context("spawn").Manager().Queue()
    )
    saving.start_results_process()
    os.killpg(0, signal.SIGUSR1)
    queues[0].put("written")
    return " ".join([*seen, queues[0].get(timeout=30)])


def test_the_signal_that_asks_for_a_checkpoint_spares_the_process_that_a_checkpoint_needs():
    assert ranks.run_ranks(report_after_a_signal_to_all, 1) == ["signal written"]


def shared_out() -> list[list[int]]:
    """What each of two context-parallel ranks holds after five responses; a stand-in generates them."""
    from functools import partial
    from types import SimpleNamespace
    from unittest.mock import patch

    from megatron.core import parallel_state

    from nemo_tsdkd.distributed.groups import long_timeout_group
    from nemo_tsdkd.megatron import model

    def generate(module, prompts, *, sample_ids, **_):
        rank = torch.distributed.get_rank()
        return [Response([rank, i, *prompt], False) for i, prompt in zip(sample_ids, prompts, strict=True)]

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    train_config = SimpleNamespace(rollout=RolloutConfig(), max_steps=1, seed=1, data=SimpleNamespace(seq_length=9))
    vocabulary = Vocabulary(9, 0, (1,))
    student = SimpleNamespace(
        train_config=train_config, module=None, vocabulary=vocabulary, long_timeout_group=long_timeout_group()
    )
    student.generate = partial(model.TSDKDModel.generate, student)
    samples = [Sample(i, [10 + i], []) for i in range(5)]
    with patch.object(model, "generate", generate), patch.object(model, "unwrap"):
        return [response.token_ids for response in model.TSDKDModel._generate(student, samples, 0)]


def test_context_parallel_ranks_share_the_samples_out_and_hold_the_same_responses():
    """Their models need Transformer Engine, so that a stand-in generates here."""
    expected = [[i % 2, i, 10 + i] for i in range(5)]
    assert ranks.run_ranks(shared_out, 2) == [expected, expected]


def test_time_alone_makes_a_checkpoint_due(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 2, lmbda=1.0)
    config.max_steps, config.rollout.reuse, config.checkpoint.keep_last = 4, 2, 9
    config.checkpoint.every_n_steps, config.checkpoint.every_minutes = 100, 1e-9
    ranks.run_ranks(train_with_signal, 2, config, 0, -1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_rollouts_are_reused_and_a_stop_waits_for_their_end(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 1, lmbda=1.0)
    config.max_steps, config.rollout.reuse, config.checkpoint.every_n_steps = 6, 3, 3
    assert ranks.run_ranks(train_with_signal, 1, config, 0, 1) == [1]
    assert newest_complete(tmp_path) == step_folder(tmp_path, 3)
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [s["rollout_age"] for s in steps] == [0, 1, 2]
    assert len({s["response_length_mean"] for s in steps}) == 1
    assert steps[0]["loss"] > steps[1]["loss"] > steps[2]["loss"]  # three steps down on one batch
