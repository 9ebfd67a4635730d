"""What surrounds a run: the lock, stops by hand, other settings, no silent start over; a seed of the adversary."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import ranks
import tiny_run
from interruptions import refusals
from omegaconf import OmegaConf

from nemo_tsdkd.checkpoints.manifest import checkpoint_folders, find_damage, newest_complete, step_folder
from nemo_tsdkd.checkpoints.run_lock import lock
from nemo_tsdkd.distributed.signals import Stopped
from nemo_tsdkd.reporting.rows import read_metrics


def attempt(config, event=None, signum=0):
    """Train on this rank; after the second step take the lock from it, or send it a signal. What came of it, and what
    the log said."""
    import nemo_tsdkd.megatron.train as module

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("nemo_tsdkd").addHandler(handler)
    logging.getLogger("nemo_tsdkd").setLevel(logging.INFO)

    class Interrupted(module.SaveAndStop):
        def on_train_batch_start(self, trainer, model, *args):
            if trainer.global_step == 2 and event == "signal" and trainer.global_rank == 1:
                os.kill(os.getpid(), signum)
            if trainer.global_step == 2 and event == "taken over" and trainer.is_global_zero:
                path = Path(config.run_dir, "lock", "1.json")
                values = json.loads(path.read_text()) | {"host": "node9", "pid": 77, "job": "123"}
                path.with_name("2.json").write_text(json.dumps(values))

    module.SaveAndStop = Interrupted
    try:
        return module.train(config), said
    except ValueError as error:
        return f"{type(error).__name__}: {error}", said


def run(config, *args):
    return ranks.run_ranks(attempt, config.parallel.world_size, config, *args)


def test_a_second_start_is_refused_on_every_rank_in_one_line_and_changes_nothing(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 2)
    with lock(tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        said = refusals(config)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert said[0] == said[1] and "\n" not in said[0]
    assert f"in use by {os.uname().nodename}, process {os.getpid()}" in said[0]


def test_a_run_that_was_taken_over_stops_on_every_rank_before_it_writes_more(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 2)
    config.checkpoint.every_n_steps = 1
    (first, _), (second, _) = run(config, "taken over")
    assert first == second and "was taken over by node9, process 77, Slurm job 123" in first
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert checkpoint_folders(tmp_path)[-1] == step_folder(tmp_path, 2)
    assert json.loads((tmp_path / "lock" / "2.json").read_text())["released"] is False


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """A run of two ranks that SIGHUP ended, sent to one of them; what its ranks returned; the models as it had them."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_run.config(root, folder / "run", 2)
    return config, run(config, "signal", signal.SIGHUP)


def again(stopped, tmp_path, **changes):
    """The stopped run's copy under another name, with its configuration."""
    config = OmegaConf.to_object(OmegaConf.structured(stopped[0]))
    config.run_dir = str(tmp_path / "run")
    shutil.copytree(stopped[0].run_dir, config.run_dir)
    return config


def test_a_signal_to_one_rank_saves_on_all_and_is_logged(stopped):
    config, results = stopped
    checkpoint = step_folder(Path(config.run_dir), 3)
    assert [result for result, _ in results] == [Stopped(signal.SIGHUP, 3, checkpoint)] * 2
    assert find_damage(checkpoint) is None
    assert json.loads(Path(config.run_dir, "summary.json").read_text()) == {"steps": 3, "finished": False}
    (left,) = Path(config.run_dir, "lock").iterdir()
    assert json.loads(left.read_text())["released"]


def test_changed_settings_are_logged_and_each_attempt_s_are_kept(stopped, tmp_path):
    config = again(stopped, tmp_path)
    config.max_steps, config.optim.lr, config.objective.beta = 4, 5e-4, 0.5
    shutil.copytree(config.student.path, tmp_path / "moved")  # the same student, elsewhere
    config.student.path = str(tmp_path / "moved")
    result, said = run(config)[0]
    assert result is None
    told = said[said.index(f"{config.run_dir}: resumes from step_3 with other settings:") + 1 :][:4]
    assert set(told) == {
        "  max_steps: 5 -> 4",
        "  optim.lr: 0.001 -> 0.0005",
        "  objective.beta: 0.9 -> 0.5",
        f"  student.path: {stopped[0].student.path} -> {config.student.path}",
    }
    kept = [OmegaConf.load(path).optim.lr for path in sorted(Path(config.run_dir, "attempts").iterdir())]
    assert kept == [1e-3, 5e-4]


def test_another_student_and_another_tokenizer_are_refused_by_content(stopped, tmp_path):
    config = again(stopped, tmp_path)
    for which in ("student", "teacher"):
        shutil.copytree(getattr(config, which).path, tmp_path / which)
        getattr(config, which).path = str(tmp_path / which)
        (template,) = (tmp_path / which).glob("context/huggingface/chat_template.jinja")
        template.write_text(template.read_text() + " ")
        (tmp_path / which / "manifest.json").unlink()  # another model, not a damaged one
    before = Path(config.run_dir, "config.yaml").read_bytes()
    said = refusals(config)
    assert said[0] == said[1] and "student.path: its tokenizer is not the one that this run began with" in said[0]
    config = again(stopped, tmp_path / "other")
    shutil.copytree(config.student.path, tmp_path / "other" / "student")
    config.student.path = str(tmp_path / "other" / "student")
    shard = max(Path(config.student.path, "weights").glob("*.distcp"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    Path(config.student.path, "manifest.json").unlink()
    said = refusals(config)
    assert said[0] == said[1] and "student.path: its student is not the one that this run began with" in said[0]
    assert Path(config.run_dir, "config.yaml").read_bytes() == before
    assert len(list(Path(config.run_dir, "attempts").iterdir())) == 1


def test_starting_over_needs_the_flag_and_keeps_what_was_there(stopped, tmp_path):
    config = again(stopped, tmp_path)
    run_dir, metrics = Path(config.run_dir), Path(config.run_dir, "metrics.jsonl").read_bytes()
    (step_folder(run_dir, 3) / "manifest.json").write_text("{")
    said = refusals(config)
    assert said[0] == said[1] and "step '3' was saved (last_step), but no checkpoint is complete" in said[0]
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    config.checkpoint.start_over = True
    assert run(config)[0][0] is None
    assert (run_dir / "metrics.jsonl.set_aside").read_bytes() == metrics
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (run_dir / "checkpoints" / "step_3.set_aside").is_dir() and newest_complete(run_dir) == step_folder(
        run_dir, 5
    )


@pytest.fixture
def faults():
    path = Path(__file__).parents[2] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = importlib.util.module_from_spec(spec)
    with contextlib.ExitStack() as stack:
        stack.callback(sys.modules.pop, "faults")
        sys.modules["faults"] = module  # dataclasses ask for it
        spec.loader.exec_module(module)
        yield module


def test_a_few_of_the_adversary_s_events_lose_nothing(faults, root, tmp_path):
    rows = list(faults.soak(root, tmp_path, events=3, seed=66, styles=("async disk",)))
    assert [row.what.split()[0] for row in rows] == ["kill", "torn", "disk", "end"]
    assert [row for row in rows if not row.as_expected] == []
