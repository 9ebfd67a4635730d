"""A run that was killed and resumed cannot be told from one that never was."""

import contextlib
import json
import logging
import math
import random
import subprocess
from pathlib import Path

import logged_runs
import pytest
import ranks
import tiny_run
import torch
from interruptions import CANARY, same, saved_weights, saving, steps_done, train

from nemo_tsdkd.checkpoints.manifest import find_damage, newest_complete, step_folder
from nemo_tsdkd.reporting.charts import figures
from nemo_tsdkd.reporting.rows import read_metrics
from nemo_tsdkd.reporting.run_files import read_runs

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {"dp2": (2, {}), "tp2_pp2": (4, {TP: 2, PP: 2})}


@pytest.fixture(scope="module")
def configure(root):
    def configure(run_dir, layout="dp2", lmbda=0.5):
        """Ten steps, half of them on-policy, saved after 4, 8 and 10."""
        world_size, parallel = LAYOUTS[layout]
        config = tiny_run.config(root, run_dir, world_size, lmbda=lmbda, **parallel)
        config.max_steps, config.checkpoint.every_n_steps, config.samples.every_n_steps = 10, 4, 3
        return config

    return configure


@pytest.fixture(scope="module")
def uninterrupted(configure, tmp_path_factory):
    """The outcome of a run in one go, made when first asked for."""
    made = {}

    def outcome(layout="dp2", lmbda=0.5):
        if (layout, lmbda) not in made:
            made[layout, lmbda] = train(configure(tmp_path_factory.mktemp("reference"), layout, lmbda))
        return made[layout, lmbda]

    return outcome


def test_killed_twice_and_resumed_it_is_one_run_bit_for_bit(configure, uninterrupted, tmp_path):
    layout, kills = "tp2_pp2", {5: 4, 9: 8}  # the tests below have dp2
    config = configure(tmp_path, layout)
    config.loggers = ["tensorboard", "wandb", "mlflow"]
    for killed_after, saved in kills.items():
        assert train(config, kill_when=steps_done(config, killed_after)) is None
        assert newest_complete(tmp_path) == step_folder(tmp_path, saved)
    assert same(train(config), uninterrupted(layout))
    assert {len(samples) for samples in uninterrupted(layout).samples.values()} == {config.global_batch_size}
    _one_run_in_every_logger(config, attempts=len(kills) + 1)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_10", "step_8"] and all(find_damage(step_folder(tmp_path, n)) is None for n in (8, 10))


def _one_run_in_every_logger(config, attempts):
    """All steps once, in order, in one run, with samples and configuration, and nothing of the environment."""
    run_dir, steps = Path(config.run_dir), list(range(1, config.max_steps + 1))
    assert logged_runs.tensorboard_steps(run_dir, "loss") == steps
    tracked, logged, table = logged_runs.mlflow_run(run_dir)
    assert {tuple(logged[name]) for name in ("loss", "grad_norm", "tokens_per_s")} == {tuple(steps)}
    assert tracked.info.status == "FINISHED" and tracked.data.params["optim/lr"] == str(config.optim.lr)
    assert len(list(Path(tracked.info.artifact_uri.removeprefix("file://"), "attempts").iterdir())) == attempts
    folders = logged_runs.wandb_attempts(run_dir)
    assert len(folders) == attempts and len({folder["run_id"] for folder in folders}) == 1
    in_wandb = [step for folder in folders for step in folder["rows"]]
    # What its own process had not written when the job was killed is missing; no step comes twice.
    assert in_wandb == sorted(set(in_wandb)) and in_wandb[-1] == steps[-1]
    losses = {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")}
    assert all(row["loss"] == losses[step] for folder in folders for step, row in folder["rows"].items())
    assert folders[-1]["config"]["optim"]["lr"] == config.optim.lr
    sampled = {step for folder in folders for step, row in folder["rows"].items() if "samples._type" in row}
    assert sampled == {3, 6, 9} & set(in_wandb) and {row["step"] for row in table} == {3, 6, 9}
    assert [row["step"] for row in table] == [3] * config.samples.count + [6] * config.samples.count + [
        9
    ] * config.samples.count
    found = subprocess.run(["grep", "-rl", CANARY, run_dir], capture_output=True, text=True).stdout
    assert found == ""
    (chart,) = [figure for name, _, figure in figures(read_runs([run_dir])) if name == "loss"]
    assert chart.data[0].x.tolist() == steps and (run_dir / "report.html").stat().st_size > 4_000_000


def test_a_run_resumes_in_another_layout(configure, uninterrupted, tmp_path):
    config = configure(tmp_path, "tp2_pp2", lmbda=0.0)
    assert train(config, kill_when=steps_done(config, 5)) is None
    outcome, expected = train(configure(tmp_path, "dp2", lmbda=0.0)), uninterrupted("dp2", lmbda=0.0)
    assert outcome.samples == expected.samples
    for row, expected_row in zip(outcome.metrics, expected.metrics, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)
    for name, value in expected.weights.items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-5, atol=1e-5)


def said(config) -> tuple[list[str], bool]:
    """What the package logs in a run, and what Lightning answers when it is asked for a GPU."""
    from lightning.pytorch.accelerators.cuda import CUDAAccelerator

    from nemo_tsdkd.megatron.train import train

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("nemo_tsdkd").setLevel(logging.INFO)
    logging.getLogger("nemo_tsdkd").addHandler(handler)
    train(config)
    return messages, CUDAAccelerator.is_available()


def test_what_a_run_says_at_its_start_and_when_it_has_finished(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 1)
    config.max_steps = 1
    ((first, gpu),) = ranks.run_ranks(said, 1, config)
    assert f"{tmp_path}: begins at step 1." in first
    assert gpu == ranks.HAS_GPU, "Lightning would print that the CPU stand-in's is there"
    ((again, _),) = ranks.run_ranks(said, 1, config)
    ways = "A larger max_steps continues it; another run_dir begins a new run."
    assert f"{tmp_path}: this run finished at step 1. {ways}" in again
    assert not any("resumes from" in message for message in again)


def test_a_finished_run_continues_with_more_steps_and_the_new_learning_rate(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 1)
    config.max_steps, config.optim.warmup_steps = 4, 1
    train(config)
    for name in ("FINISHED", "summary.json"):  # as if killed right after the last checkpoint
        (tmp_path / name).unlink()
    assert len(train(config).metrics) == 4
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 4, "finished": True}
    (tmp_path / "FINISHED").unlink()
    config.seed += 1
    config.max_steps = 6
    with pytest.raises(AssertionError, match=f"seed = {config.seed}: this run began with {config.seed - 1}"):
        train(config)
    config.seed -= 1
    config.max_steps, config.optim.lr, config.optim.weight_decay = 6, 5e-4, 0.1
    rows = train(config).metrics
    cosine = [0.5 * (1 + math.cos(math.pi * n / 5)) for n in (3, 4)]  # of 5 steps behind the warm-up
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows[4:]] == pytest.approx([5e-4 * part for part in cosine])
    assert rows[4]["loss"] < rows[0]["loss"]


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(configure, uninterrupted, tmp_path):
    config = configure(tmp_path)
    assert train(config, kill_when=saving(config, 8)) is None
    assert step_folder(tmp_path, 8).is_dir() and newest_complete(tmp_path) == step_folder(tmp_path, 4)
    assert same(train(config), uninterrupted())


def test_a_flipped_bit_sends_it_back_to_the_checkpoint_before(configure, uninterrupted, tmp_path):
    config = configure(tmp_path)
    assert train(config, kill_when=steps_done(config, 9)) is None
    shard = max(step_folder(tmp_path, 8).glob("weights/*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert newest_complete(tmp_path) == step_folder(tmp_path, 4)
    assert same(train(config), uninterrupted())


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes in memory; the test is skipped where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def size_after_one_checkpoint(configure, tmp_path_factory):
    """Bytes of a run folder between its first and its second checkpoint."""
    folder = tmp_path_factory.mktemp("probe")
    probe = configure(folder)
    assert train(probe, kill_when=steps_done(probe, 5)) is None
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_ends_the_run_with_its_reason_and_spares_the_older_checkpoint(
    async_save, configure, uninterrupted, size_after_one_checkpoint, tmp_path
):
    size = size_after_one_checkpoint
    with small_disk(tmp_path / "run", size + (1 << 18)):
        config = configure(tmp_path / "run")
        config.checkpoint.async_save = async_save
        with pytest.raises(AssertionError, match="No space left on device"):
            train(config)
        assert newest_complete(tmp_path / "run") == step_folder(tmp_path / "run", 4)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", tmp_path / "run"], check=True)
        assert same(train(config), uninterrupted())


def draw() -> list[float]:
    """One number of each of this rank's generators."""
    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), tracked]


def draw_before_and_after(folder: Path) -> bool:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_tsdkd.megatron.checkpoints.save import random_state, restore_random_state

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    draw()  # a Gaussian of each pair waits in its generator
    (folder / "random").mkdir(exist_ok=True)
    torch.save(random_state(), folder / "random" / f"rank_{rank}_of_{world_size}.pt")
    drawn, later = draw(), draw()
    restore_random_state(folder)
    return draw() == drawn != later


def test_every_random_generator_of_every_rank_resumes_its_state(tmp_path):
    assert ranks.run_ranks(draw_before_and_after, 2, tmp_path) == [True, True]


def test_saving_behind_the_steps_changes_nothing(configure, uninterrupted, tmp_path):
    config = configure(tmp_path)
    config.checkpoint.async_save = True
    assert train(config, kill_when=saving(config, 8)) is None
    assert same(train(config), uninterrupted())
    assert find_damage(step_folder(tmp_path, 10)) is None


def embedding(checkpoint: Path) -> torch.Tensor:
    return saved_weights(checkpoint)["module.embedding.word_embeddings.weight"]


def export_error(checkpoint: Path, output: Path) -> str:
    with pytest.raises(ValueError) as error:
        tiny_run.export(checkpoint, "hf", output)
    return str(error.value)


def test_a_run_is_exported_from_its_newest_complete_checkpoint(configure, tmp_path):
    from safetensors.torch import load_file

    run_dir = tmp_path / "checkpoints" / "run"  # a user's folder may have the name that a run's has
    config = configure(run_dir, "tp2_pp2")
    config.max_steps, config.checkpoint.every_n_steps = 2, 1
    train(config)
    (step_folder(run_dir, 2) / "manifest.json").unlink()
    ranks.run_ranks(tiny_run.export, 1, run_dir, "hf", tmp_path / "hf", meet=False)
    first, second = (ranks.run_ranks(embedding, 1, step_folder(run_dir, step))[0] for step in (1, 2))
    exported = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    vocab_size = 330  # of the student's source; the run padded it
    assert len(exported) == vocab_size < len(first)
    assert torch.equal(exported, first[:vocab_size]) and not torch.equal(exported, second[:vocab_size])
    assert "not written to its end" in export_error(step_folder(run_dir, 2), tmp_path / "refused")
    assert "no complete checkpoint" in export_error(tmp_path, tmp_path / "refused")
    assert "must not exist" in export_error(run_dir, tmp_path / "hf")
    assert not (tmp_path / "refused").exists()
