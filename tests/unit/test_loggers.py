"""What a run hands to its loggers, with loggers that only take notes. tests/stack has the real ones in a real run."""

import json

import pytest
from run_folder import sample

from nemo_tsdkd.checks.setup import check_fields
from nemo_tsdkd.config.schema import DataConfig, ModelConfig, TeacherConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import HostError, UserError
from nemo_tsdkd.reporting.loggers import SAMPLE_COLUMNS, RunLoggers
from nemo_tsdkd.reporting.metrics import REQUIRED, MetricsLogger


class Noted:
    """Notes what it gets; fails at the step `fails_at`."""

    def __init__(self, run_id, purges=False, fails_at=None):
        self.run_id, self.purges, self.fails_at = run_id, purges, fails_at
        self.steps, self.samples, self.closed = [], [], []

    def log(self, step, values, samples):
        if step == self.fails_at:
            raise ConnectionError("no answer")
        assert values["loss"] == 1 / step
        self.steps.append(step)
        self.samples += samples

    def close(self, status):
        self.closed.append(status)


class Attempts:
    """The attempts of one run: what each logger got in each of them."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def open_logger(self, name, run_id):
        opened = Noted(run_id or f"{name}-{len(self.made.get(name, ()))}", purges=name == "tensorboard")
        self.made.setdefault(name, []).append(opened)
        return opened

    def attempt(self, steps, names=("tensorboard", "wandb"), samples=(), summary=None):
        loggers = RunLoggers(self.folder, names, self.open_logger)
        metrics = MetricsLogger(self.folder, 99, progress=False, resume_step=steps[0] - 1, loggers=loggers)
        for step in steps:
            with (self.folder / "samples.jsonl").open("a") as file:
                file.write("".join(json.dumps(s) + "\n" for s in samples if s["step"] == step))
            metrics.log(step, dict.fromkeys(REQUIRED, 1 / step))
        if summary is not None:
            metrics.close(summary)

    def steps(self, name):
        return [opened.steps for opened in self.made[name]]


def test_a_run_killed_twice_is_one_run_and_no_step_is_logged_twice(tmp_path):
    run = Attempts(tmp_path)
    run.attempt(range(1, 8))
    run.attempt(range(5, 7))  # resumed at step 4 and killed before it had come as far as before
    run.attempt(range(5, 11), summary={"finished": True})
    assert run.steps("wandb") == [[1, 2, 3, 4, 5, 6, 7], [], [8, 9, 10]]
    assert {opened.run_id for opened in run.made["wandb"]} == {"wandb-0"}
    # TensorBoard drops by itself what is done again, and takes all.
    assert run.steps("tensorboard") == [[1, 2, 3, 4, 5, 6, 7], [5, 6], [5, 6, 7, 8, 9, 10]]
    assert [opened.closed for opened in run.made["wandb"]] == [[], [], ["finished"]]


def test_a_logger_that_is_added_later_gets_the_steps_from_then_on(tmp_path):
    run = Attempts(tmp_path)
    run.attempt(range(1, 8), names=["wandb"])
    run.attempt(range(5, 10), names=["wandb", "mlflow"], summary={"finished": False})
    assert run.steps("mlflow") == [[5, 6, 7, 8, 9]] and run.steps("wandb") == [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    assert run.made["mlflow"][0].closed == ["stopped"]


def test_each_sample_is_handed_on_once_with_its_step(tmp_path):
    run = Attempts(tmp_path)
    samples = [sample(step, index, ["a", "b"], correct=index == 0) for step in (2, 3) for index in (0, 1)]
    run.attempt(range(1, 5), samples=samples)
    rows = run.made["wandb"][0].samples
    assert [(row["step"], row["index"], row["correct"], row["answer"]) for row in rows] == [
        (step, index, *((True, "4") if index == 0 else (False, None))) for step in (2, 3) for index in (0, 1)
    ]
    assert all(tuple(row) == SAMPLE_COLUMNS for row in rows)


def test_a_logger_that_fails_is_left_out_and_named_and_the_run_goes_on(tmp_path, caplog):
    made = {"wandb": Noted("w", fails_at=3), "mlflow": Noted("m")}
    loggers = RunLoggers(tmp_path, list(made), lambda name, run_id: made[name])
    for step in range(1, 6):
        loggers.log(step, {"loss": 1 / step})
    loggers.close("finished")
    assert (made["wandb"].steps, made["mlflow"].steps) == ([1, 2], [1, 2, 3, 4, 5])
    assert caplog.messages == ["loggers: wandb failed and is left out from here on (ConnectionError: no answer)."]
    assert (made["wandb"].closed, made["mlflow"].closed) == ([], ["finished"])


def test_a_logger_that_cannot_be_opened_ends_the_start(tmp_path):
    first = Noted("t")

    def open_logger(name, run_id):
        if name == "mlflow":
            raise ConnectionError("refused")
        return first

    with pytest.raises(HostError, match=r"loggers: mlflow cannot be opened \(refused\)"):
        RunLoggers(tmp_path, ["tensorboard", "mlflow"], open_logger)
    assert first.closed == ["failed"] and not (tmp_path / "loggers.json").exists()


def config(*loggers):
    made = TrainConfig(
        run_dir="r", student=ModelConfig("s"), teacher=TeacherConfig("t"), data=DataConfig(path="d"), loggers=[*loggers]
    )
    check_fields(made)


def test_names_are_checked_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config("tensorboard", "wandb", "mlflow"), config()
    for wrong in (["comet"], ["wandb", "wandb"]):
        with pytest.raises(UserError, match=r"^loggers = .*must be a list of tensorboard, wandb, mlflow"):
            config(*wrong)
    monkeypatch.setattr("nemo_tsdkd.checks.setup.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package of mlflow is not installed. pip install 'nemo-tsdkd\[mlflow\]'"):
        config("mlflow")


def test_wandb_without_a_key_is_told_before_anything_starts(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="wandb finds no API key"):
        config("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config("wandb")
