"""report.html without a browser: what it takes from a run's files. tests/browser opens it in one."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from run_folder import HOSTILE, row, sample, validation, write_run

from nemo_tsdkd.cli.main import main
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.reporting import report
from nemo_tsdkd.reporting.charts import BARS, POINTS, figures, thinned
from nemo_tsdkd.reporting.report import build_report, refresh_report
from nemo_tsdkd.reporting.run_files import read_runs, record_start, restarts
from nemo_tsdkd.reporting.sample_page import shown_samples


def test_the_command_prints_the_path_alone(tmp_path, capsys, monkeypatch):
    first, second = (write_run(tmp_path / name, [row(1), row(2)]) for name in ("a", "b"))
    main(["report", str(first)])
    assert capsys.readouterr() == (f"{first / 'report.html'}\n", "")
    main(["report", str(first), str(second), "--output", str(tmp_path / "new" / "both.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'both.html'}\n"
    monkeypatch.chdir(tmp_path)
    main(["report", str(first), str(second)])
    assert (tmp_path / "report.html").stat().st_size == (tmp_path / "new" / "both.html").stat().st_size


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{str(tmp_path)!r}: holds no metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no metrics"):
        build_report([write_run(tmp_path / "a", [row(1)]), tmp_path], tmp_path / "r.html")


def test_a_run_of_a_thousand_steps_stays_small_and_keeps_what_the_student_writes_now(tmp_path):
    text = [HOSTILE, *[" word"] * 999]
    samples = [sample(step, i, text) for step in range(0, 1001, 50) for i in range(4)]
    folder = write_run(tmp_path / "a", [row(s, **validation(0.5)) for s in range(1, 1001)], samples)
    path = build_report([folder], tmp_path / "r.html")
    assert 7_000_000 < path.stat().st_size < 8_000_000
    kept = {s["step"] for s in shown_samples(read_runs([folder]), 2_000_000)["samples"]}
    assert {0, 1000, 950} <= kept and 50 not in kept


def test_what_one_run_s_samples_leave_is_for_the_others(tmp_path):
    few = write_run(tmp_path / "few", [row(1)], [sample(1, 0, ["a"])])
    many = write_run(tmp_path / "many", [row(1)], [sample(step, 0, ["a"] * 100) for step in range(10)])
    size = len(json.dumps(shown_samples(read_runs([many]), 10**9)["samples"]))
    shown = shown_samples(read_runs([many, few]), size + 2000)["samples"]
    assert len(shown) == 11


def test_steps_written_twice_and_torn_lines_leave_one_curve(tmp_path, caplog):
    folder = write_run(tmp_path / "a", [row(1), row(2), row(3), row(2, loss=9.0), row(3), row(4)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"step": 5, "lo')
    with (folder / "samples.jsonl").open("a") as file:
        file.write('garbage\n{"step": 5, "lo')
    (run,) = read_runs([folder])
    assert [(r["step"], r["loss"]) for r in run.rows] == [(1, 2.0), (2, 9.0), (3, row(3)["loss"]), (4, 1.25)]
    assert [m.split(": ")[1] for m in caplog.messages] == [
        "line 7 does not hold a step's metrics and is skipped",
        *("line 1 holds no sample and is skipped", "line 2 holds no sample and is skipped"),
    ]
    build_report([folder], tmp_path / "r.html")


def test_restarts_are_those_of_the_curve_that_is_left(tmp_path):
    def left(*steps):
        folder = tmp_path / "-".join(map(str, steps))
        folder.mkdir()
        for step in steps:
            record_start(folder, step)
        return restarts(folder / "starts.jsonl")

    assert restarts(tmp_path / "absent") == []
    assert left(0) == [] and left(0, 0) == []
    assert left(0, 40, 80) == [40, 80]
    assert left(0, 40, 40) == [40]
    assert left(0, 40, 80, 60) == [40, 60]  # step 80's checkpoint was damaged
    assert left(0, 40, 0, 20) == [20]
    torn = tmp_path / "torn"
    torn.write_text('{"resume_step": 3}\n\0\0\n[3]\n{"resume_step": "4"}\n{"resu')
    assert restarts(torn) == [3]


def test_long_runs_are_thinned_to_means():
    steps, values = thinned(range(1, 10_001), [float(s) for s in range(1, 10_001)], POINTS)
    assert len(steps) == POINTS and steps.tolist()[:2] == [5, 10] and values.tolist()[:2] == [3.0, 8.0]
    steps, values = thinned([1, 2, 3], [1.0, 2.0, 6.0], 2)
    assert steps.tolist() == [2, 3] and values.tolist() == [1.5, 6.0]
    assert [part.size for part in thinned([], [], POINTS)] == [0, 0]


def test_the_time_by_phase_adds_up(tmp_path):
    folder = write_run(
        tmp_path / "a", [row(step, validation_s=100.0 * (step == 200)) for step in range(1, 2 * BARS + 1)]
    )
    (bars,) = [figure for name, _, figure in figures(read_runs([folder])) if name == "time_0"]
    assert {bar.name: (len(bar.x), round(2 * float(np.sum(bar.y)))) for bar in bars.data}["validation_s"] == (BARS, 100)
    assert "mean of 2 steps" in bars.layout.yaxis.title.text


def test_a_metric_of_the_user_s_own_is_drawn_too(tmp_path):
    folder = write_run(tmp_path / "a", [row(1, mine=5.0, mine_weighted=0.5), row(2, mine=6.0, mine_weighted=0.6)])
    found = {name: [curve.name for curve in figure.data] for name, _, figure in figures(read_runs([folder]))}
    assert found["further_mine"] == ["mine"]
    assert found["loss"] == ["loss", "direct_weighted", "indirect_weighted", "entropy_weighted", "mine_weighted"]
    assert "further_mine_weighted" not in found


@pytest.mark.parametrize("damage", ["tokens", "verdict", "prompt"])
def test_samples_of_another_shape_do_not_end_a_report(damage, tmp_path):
    odd = [sample(1, 0, ["a", "b"]) | {damage: value} for value in (None, 3, [1], {"text": 5, "gate": [1]})]
    short = sample(1, 0, ["a", "b"])
    short["tokens"]["gate"] = [0.5]
    folder = write_run(tmp_path / "a", [row(1)], [*odd, short])
    build_report([folder], tmp_path / "r.html")
    shown = shown_samples(read_runs([folder]), 10**6)["samples"]
    assert (
        len(shown) == (2 if damage == "tokens" else 5)
        and "gate" not in shown[-1]["columns"]
        and "opener" in shown[-1]["columns"]
    )


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been recorded yet" in build_report([tmp_path], tmp_path / "r.html").read_text()


def test_no_failure_of_a_report_reaches_training(tmp_path, caplog, monkeypatch):
    refresh_report(tmp_path)  # no metrics.jsonl
    write_run(tmp_path / "a", [row(1)])
    monkeypatch.setattr(report, "figures", lambda runs: 1 / 0)
    refresh_report(tmp_path / "a")
    assert [m.split(" Training")[0] for m in caplog.messages if m.startswith("report.html could not be written")] == [
        f"report.html could not be written (UserError: report: {str(tmp_path)!r}: holds no metrics.jsonl. "
        "Give the run_dir of a run that has begun.).",
        "report.html could not be written (ZeroDivisionError: division by zero).",
    ]
    assert not (tmp_path / "a" / "report.html").exists()
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        refresh_report(tmp_path / "a")
    assert (tmp_path / "a" / "report.html").exists()


def test_the_command_needs_no_torch():
    code = "import sys, nemo_tsdkd.cli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
