"""Files of a run: strict, atomic, and the same after a resume as without an interruption."""

import json
import logging
import os
import subprocess
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

import nemo_tsdkd
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.config.schema import DataConfig, ModelConfig, TeacherConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed import progress
from nemo_tsdkd.objective import Metrics, ObjectiveConfig, reported, weighted
from nemo_tsdkd.reporting import metrics
from nemo_tsdkd.reporting.metrics import PLOTS, REQUIRED, MetricsLogger
from nemo_tsdkd.reporting.provenance import changed_settings, git_state, save_provenance
from nemo_tsdkd.reporting.rows import read_metrics
from nemo_tsdkd.reporting.run_files import STARTS, restarts


def values(step):
    return dict.fromkeys(REQUIRED, 1.0 / step)


def write_steps(folder, steps, resume_step=0, summary=None):
    metrics_logger = MetricsLogger(folder, 10, progress=False, resume_step=resume_step)
    for step in steps:
        metrics_logger.log(step, values(step))
    if summary is not None:
        metrics_logger.close(summary)
    return metrics_logger


def test_a_run_from_first_to_last_step(tmp_path):
    write_steps(tmp_path, range(1, 4), summary={"steps": 3})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": step, **values(step)} for step in (1, 2, 3)]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PLOTS)


def test_a_resumed_run_leaves_the_same_file(tmp_path):
    write_steps(tmp_path / "whole", range(1, 9), summary={})
    interrupted = write_steps(tmp_path / "resumed", range(1, 7))
    interrupted._file.write('{"step": 7, "lo')  # killed inside a write
    interrupted._file.flush()
    write_steps(tmp_path / "resumed", range(5, 9), resume_step=4, summary={})
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_new_run_in_an_old_folder_starts_over(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2), summary={})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


GARBAGE = [
    b"\0" * 40,
    b"\xff\xfe garbage",
    b'{"step": 3, "lo\0s": NaN}',
    b'{"loss": 1.0}',
    b'{"step": "3", "loss": 1.0}',
    b'{"step": 3, "loss": 1e999}',
    b'{"step": true}',
    b"[3]",
    b"3",
    b"",
    b"[" * 100_000,
    b"9" * 5_000,
]


def test_garbage_lines_are_cut_and_named(tmp_path, caplog):
    """In the middle and at the end of a file that is resumed."""
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, range(1, 7))
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:2]) + b"".join(line + b"\n" for line in GARBAGE) + b"".join(rows[2:]) + b"\0\0\0")
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(5, 9), resume_step=4, summary={})
    named = [f"line {3 + n} does not hold a step's metrics and is skipped" for n in range(len(GARBAGE))]
    assert [any(name in text for text in caplog.messages) for name in named] == [True] * len(GARBAGE)
    assert max(map(len, caplog.messages)) < 250 + len(str(path))
    write_steps(tmp_path / "whole", range(1, 9), summary={})
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_row_that_lost_a_metric_does_not_end_the_run_at_its_plots(tmp_path):
    metrics_logger = write_steps(tmp_path, range(1, 4))
    text = metrics_logger.path.read_text()
    metrics_logger.path.write_text(text.replace('"student_entropy"', '"student_entrppy"', 1))
    metrics_logger.close({})
    assert (tmp_path / "loss.png").exists()


def test_every_row_is_on_the_disk_before_the_next_step(tmp_path, monkeypatch):
    synced = []
    metrics_logger = MetricsLogger(tmp_path, 10, progress=False)
    monkeypatch.setattr(metrics.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    for step in (1, 2):
        metrics_logger.log(step, values(step))
        assert synced[-1] == metrics_logger.path.stat().st_size and len(synced) == step


def test_plots_appear_while_the_run_goes_on_and_their_failure_ends_nothing(tmp_path, caplog):
    write_steps(tmp_path, range(1, 4))
    metrics.refresh_plots(tmp_path)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    metrics.refresh_plots(tmp_path / "absent")
    assert "Training goes on" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_an_error(tmp_path, value):
    metrics_logger = MetricsLogger(tmp_path, 10, progress=False)
    with pytest.raises(ValueError, match=r"step 2: grad_norm = (nan|inf): not finite"):
        metrics_logger.log(2, values(2) | {"grad_norm": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics_logger.close({"accuracy": value})
    assert read_metrics(metrics_logger.path) == []


def test_every_plotted_metric_is_one_that_each_step_reports():
    weighted = {f"{term}_weighted" for term in ("direct", "indirect", "entropy")}
    assert {key for _, keys in PLOTS.values() for key in keys} <= {*REQUIRED, *Metrics._fields, *weighted}


def test_the_loss_is_drawn_with_its_terms_as_they_enter_it():
    """The indirect term before its weight is so large that beside it the others are lines at the bottom."""
    assert PLOTS["loss"][1] == ("loss", "direct_weighted", "indirect_weighted", "entropy_weighted")


def test_each_start_is_noted_for_the_report(tmp_path):
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(3, 7), resume_step=2)
    assert restarts(tmp_path / STARTS) == [2]


def test_terms_without_weight_are_neither_required_nor_drawn(tmp_path):
    off = {"direct", "indirect", "entropy", "gate_mean", "opener_fraction", "rank_agreement"}
    assert off.isdisjoint(REQUIRED) and off < set(Metrics._fields)
    config = ObjectiveConfig(preset="forward_kl").resolved()
    assert off.intersection(reported(config)) == {"direct", "gate_mean"}
    assert set(reported(ObjectiveConfig())) == set(Metrics._fields)
    write_steps(tmp_path, [1], summary={})
    assert (tmp_path / "selection.png").exists()


def test_a_step_must_report_every_metric(tmp_path):
    incomplete = {key: value for key, value in values(1).items() if key not in ("lr", "student_entropy")}
    with pytest.raises(ValueError, match="step 1 reports no student_entropy, lr"):
        MetricsLogger(tmp_path, 10, progress=False).log(1, incomplete)


def test_progress_in_a_log_file_is_a_line_for_some_steps(tmp_path, capsys, monkeypatch):
    """Steps of 24 s: a line for the first, the last, and those that come a minute or more after the last line."""
    clock = iter(range(0, 1000, 24))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    metrics_logger = MetricsLogger(tmp_path, 12, progress=True, resume_step=4)
    for step in range(5, 13):
        accuracy = {"validation_accuracy": 0.25} if step == 7 else {}
        metrics_logger.log(step, values(step) | {"tokens_per_s": 1234.4} | accuracy)
    metrics_logger.close({})
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.strip() for line in err.splitlines() if line.strip()] == [
        "step 5/12  loss 0.2000  1,234 tokens/s  ETA 0:02:48",
        "step 8/12  loss 0.1250  1,234 tokens/s  ETA 0:01:36  accuracy 25.0%",
        "step 11/12  loss 0.0909  1,234 tokens/s  ETA 0:00:24  accuracy 25.0%",
        "step 12/12  loss 0.0833  1,234 tokens/s  ETA 0:00:00  accuracy 25.0%",
    ]


PATHS = ("run_dir=r", "student.path=s", "teacher.path=t", "data.path=d")


@pytest.mark.parametrize("name", ["paper", "no_entropy", "forward_kl"])
def test_weighted_terms_are_those_of_the_loss(name):
    config = replace(
        compose_config("train", [f"objective={name}", *PATHS]).objective, extra_terms={"a": 0.5}
    ).resolved()
    means = {"direct": 2.0, "indirect": 3.0, "entropy": 5.0, "a": 7.0}
    expected = {
        "direct_weighted": 2.0 * config.direct_weight,
        "indirect_weighted": 3.0 * config.indirect_kd_alpha,
        "entropy_weighted": 5.0 * config.entropy_weight,
        "a_weighted": 3.5,
    }
    assert weighted(config, means) == {name: value for name, value in expected.items() if value}


def test_provenance(tmp_path):
    config = TrainConfig(
        run_dir="r", student=ModelConfig("s"), teacher=TeacherConfig("t"), data=DataConfig(path="d", limit=3)
    )
    save_provenance(tmp_path, config)
    saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(saved) == config
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["megatron-core"] == "0.15.3"
    assert versions["nemo-tsdkd"] == nemo_tsdkd.__version__
    assert versions["git"].keys() == {"revision", "dirty"}


def test_each_attempt_s_configuration_is_kept_and_changes_are_listed(tmp_path):
    config = TrainConfig(run_dir="r", student=ModelConfig("s"), teacher=TeacherConfig("t"), data=DataConfig(path="d"))
    assert changed_settings(tmp_path, config) == []
    save_provenance(tmp_path, config)
    assert changed_settings(tmp_path, config) == []
    config.run_dir = "moved"
    config.optim.lr, config.objective.beta, config.data.seq_length = 3e-6, 0.5, 512
    config.teacher.path, config.precision.name, config.data.limit = "u", "fp32", 5
    told = {
        "optim.lr: 1e-05 -> 3e-06",
        "objective.beta: 0.9 -> 0.5",
        "data.seq_length: 2048 -> 512",
        "data.limit: None -> 5",
        "teacher.path: t -> u",
        "precision.name: bf16 -> fp32",
    }
    assert set(changed_settings(tmp_path, config)) == told
    save_provenance(tmp_path, config)
    attempts = [OmegaConf.load(tmp_path / "attempts" / f"000{n}.yaml") for n in (1, 2)]
    assert [attempt.optim.lr for attempt in attempts] == [1e-5, 3e-6]
    assert OmegaConf.load(tmp_path / "config.yaml") == attempts[1]


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff\xfe\0", b"a: [", b"a: !!python/object:os.system {}", b"\0" * 99]
)
def test_a_damaged_last_configuration_is_no_end(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    config = TrainConfig(run_dir="r", student=ModelConfig("s"), teacher=TeacherConfig("t"), data=DataConfig(path="d"))
    (told,) = changed_settings(tmp_path, config)
    assert "config.yaml cannot be read" in told


def test_git_state(tmp_path):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], cwd=tmp_path, check=True)

    unknown = {"revision": "unknown", "dirty": "unknown"}
    tracked, ignored = tmp_path / "a.py", tmp_path / "b.py"
    tracked.touch()
    ignored.touch()
    assert git_state(tracked) == unknown
    git("init", "-q")
    git("add", "a.py")
    git("commit", "-qm", "one")
    clean = git_state(tracked)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    tracked.write_text("changed")
    assert git_state(tracked) == clean | {"dirty": True}
    assert git_state(ignored) == unknown  # as a package in a virtual environment inside another checkout
