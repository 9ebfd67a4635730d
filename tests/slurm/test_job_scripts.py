"""The job scripts alone, on a real Slurm, with a stand-in for `nemo-tsdkd` that takes seconds (stand_in.sh)."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lab import ROOT, TWO_BY_TWO, Job, preempt, wait_until

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "lib.sh")
TRAINING = [name for name in SCRIPTS if name.startswith("tsdkd_")]
SCRIPT = "tsdkd_14b_to_1.5b.sh"
pytestmark = pytest.mark.slurm


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put the stand-in first on PATH, which sbatch hands to the job."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nemo-tsdkd").symlink_to(Path(__file__).with_name("stand_in.sh"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def calls(job: Job, command: str) -> list[str]:
    return [line for line in (job.run_dir / "calls").read_text().splitlines() if line.startswith(command)]


def wait_for_training(job: Job) -> None:
    """Until all four ranks of the stand-in have begun to train."""
    wait_until(lambda: (job.run_dir / "calls").exists() and len(calls(job, "train")) == 4, 30, lambda: job.log)


def test_shellcheck_finds_nothing():
    scripts = [*(ROOT / "slurm").glob("*.sh"), *Path(__file__).parent.glob("*.sh")]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", "-S", "warning", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_accepts_the_script_with_its_own_header(lab, name):
    text = (ROOT / "slurm" / name).read_text()
    assert "set -euo pipefail" in text
    lab("run", "sbatch", "--test-only", f"slurm/{name}")


@pytest.mark.parametrize("name", TRAINING)
def test_headers_let_a_job_save_requeue_and_keep_its_output(name):
    header = re.findall(r"^#SBATCH (.*)$", (ROOT / "slurm" / name).read_text(), re.MULTILINE)
    assert {"--exclusive", "--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(header)
    assert (ROOT / next(h for h in header if h.startswith("--output=")).partition("=")[2]).parent.is_dir()


def test_the_public_recipe_s_variables_reach_the_configuration(lab, stand_in):
    job = Job.submit(
        SCRIPT,
        stand_in / "a run, Tim's",
        "--",
        "max_steps=7",
        "objective.beta=0.2",
        BETA="0.5",
        LAMBDA="0.25",
        THRESHOLD="0.3",
        INDIRECT_KD_ALPHA="0.7",
        MODEL_NAME="Qwen/small",
        TEACHER_NAME=str(stand_in),
        DATA="/data/x=1.jsonl",
        MODELS_DIR="/models",
    )
    job.wait_end("COMPLETED")
    assert [len(calls(job, c)) for c in ("check", "preflight", "train")] == [1, 4, 4]

    from nemo_tsdkd.config.compose import compose_config

    name, *overrides = re.findall(r"[a-z_.]+='(?:[^'\\]|\\.)*'|\S+", calls(job, "train")[0])[2:-3]
    c = compose_config(name, overrides)
    assert (c.run_dir, c.data.path) == (str(job.run_dir), "/data/x=1.jsonl")
    assert (c.student.path, c.teacher.path) == ("/models/Qwen/small", str(stand_in))
    assert (c.objective.threshold, c.objective.indirect_kd_alpha, c.rollout.lmbda) == (0.3, 0.7, 0.25)
    assert (c.parallel.num_nodes, c.parallel.gpus_per_node, c.max_steps) == (2, 2, 7)
    assert c.objective.beta == 0.2  # what follows -- comes last


@pytest.mark.parametrize(
    ("run_dir", "arguments", "message"),
    [("", (), "RUN_DIR is not set"), ("run", ("max_steps=1",), "unexpected argument 'max_steps=1'")],
)
def test_bad_usage_ends_the_job_at_once_and_for_good(lab, stand_in, run_dir, arguments, message):
    job = Job.submit(SCRIPT, stand_in / "run", *arguments, **({} if run_dir else {"RUN_DIR": ""}))
    job.wait_end("FAILED")
    assert message in job.log and job.field("ExitCode") == "2:0" and job.field("Restarts") == "0"


def test_a_missing_command_names_what_to_activate(lab, tmp_path):
    job = Job.submit(SCRIPT, tmp_path / "run", PATH="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    job.wait_end("FAILED")
    assert "nemo-tsdkd is not on PATH: activate its environment" in job.log


def test_a_finished_run_is_not_run_again_even_in_a_chain(lab, stand_in):
    chain = [Job.submit(SCRIPT, stand_in / "run", flags=(*TWO_BY_TWO, "--dependency=singleton")) for _ in range(2)]
    for job in chain:
        job.wait_end("COMPLETED")
    assert f"finished: {stand_in / 'run'}" in chain[0].log
    assert "FINISHED exists: nothing to do" in chain[1].log
    assert len(calls(chain[0], "train")) == 4


def test_a_crash_loop_stops_after_restarts_without_progress(lab, stand_in):
    job = Job.submit(SCRIPT, stand_in / "run", STAND_IN="crash", MAX_RESTARTS="1")
    job.wait_end("FAILED")
    assert job.field("Restarts") == "1"
    assert "RuntimeError: out of luck" in job.log  # the end of the failed rank's log
    assert "check: exit status 2" in job.log  # of a restart, so no fault of the arguments
    assert "crash loop: 2 attempts in a row stopped at step 0" in job.log
    assert [p.name for p in sorted((stand_in / "run/logs").iterdir())] == [f"{job.id}.0", f"{job.id}.1"]


def test_a_signal_to_the_steps_and_one_before_a_preemption_and_a_killed_task_are_requeued(lab, stand_in):
    job = Job.submit(SCRIPT, stand_in / "run", STAND_IN_STEPS="999")

    def wait_for_attempt(number: int) -> None:
        wait_until(
            lambda: (job.run_dir / "calls").exists() and len(calls(job, "train")) == 4 * number, 60, lambda: job.log
        )

    try:
        wait_for_attempt(1)
        lab("run", "scancel", "--signal=USR1", job.id)  # as a user would, past the script
        wait_for_attempt(2)
        assert "signalled" not in job.log
        os.kill(job.process(rank=3), signal.SIGKILL)
        wait_for_attempt(3)
        lab("user-signal", "on")
        preempt(lab, job)
        job.wait_for("signalled: the steps have")  # by Slurm, through the script
        wait_for_attempt(4)
    finally:
        lab("user-signal", "off")
        lab("run", "scancel", job.id)
    job.wait_end("CANCELLED")
    stops = re.findall(r"stopped at step (\d+) with status (\d+): requeued", job.log)
    assert [int(status) for _, status in stops] == [0, 137, 0]
    assert 0 < int(stops[0][0]) <= int(stops[1][0]) < int(stops[2][0]) and job.field("Restarts") == "3"


def test_a_hang_is_requeued_before_the_limit_ends_the_job_for_good(lab, stand_in):
    job = Job.submit(SCRIPT, stand_in / "run", STAND_IN="hang", STAND_IN_STEPS="999", SAVE_SECONDS="2")
    wait_for_training(job)
    lab("run", "scancel", "--batch", "--signal=USR1", job.id)  # as before a limit, which test_cluster_run.py waits for
    job.wait_for("still running 2 s after the signal")
    job.wait_for("stopped at step 0 with status 124: requeued")
    wait_until(lambda: job.field("Restarts") == "1", 30, lambda: job.state)
    lab("run", "scancel", job.id)
    job.wait_end("CANCELLED")


def test_a_controller_that_does_not_answer_costs_no_requeue(lab, stand_in):
    scancel = stand_in / "bin" / "scancel"
    scancel.write_text("#!/bin/sh\nexit 1\n")
    scancel.chmod(0o755)
    job = Job.submit(SCRIPT, stand_in / "run", STAND_IN_STEPS="999", SAVE_SECONDS="2")
    wait_for_training(job)
    lab("run", "/usr/bin/scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("scancel cannot reach the steps")
    job.wait_for("stopped at step 0 with status 124: requeued")
    lab("run", "/usr/bin/scancel", job.id)
    job.wait_end("CANCELLED")


def test_a_cancelled_job_stays_cancelled(lab, stand_in):
    job = Job.submit(SCRIPT, stand_in / "run", STAND_IN_STEPS="999")
    job.wait_for("train: logs")
    wait_for_training(job)
    lab("run", "scancel", job.id)
    job.wait_end("CANCELLED")
    wait_until(lambda: lab("run", "squeue", "--noheader", "--jobs", job.id, check=False) == "", 30, lambda: job.state)
    assert job.field("Restarts") == "0"


def test_a_container_gets_the_image_and_the_folders(lab, stand_in):
    fields = {"CONTAINER_IMAGE": "nvcr.io#nvidia/nemo:25.11", "CONTAINER_NAME": "tsdkd", "CONTAINER_MOUNTS": "/d:/d"}
    job = Job.submit(SCRIPT, stand_in / "run", **fields)
    job.wait_end("COMPLETED")
    assert all("image=nvcr.io#nvidia/nemo:25.11 name=tsdkd" in line for line in calls(job, "train"))
    assert len(calls(job, "train")) == 4
    assert f"mounts=/d:/d,{ROOT}:{ROOT},{job.run_dir}:{job.run_dir}" in calls(job, "train")[0]


def test_an_evaluation_gets_its_options_and_mounts(lab, stand_in):
    (stand_in / "run").mkdir()
    fields = {"MODEL": str(stand_in), "OUTPUT": f"{stand_in}/scores/a.json", "CONTAINER_IMAGE": "image.sqsh"}
    job = Job.submit("evaluate.sh", stand_in / "run", "--", "--allow-code-execution", flags=("--nodes=1",), **fields)
    job.wait_end("COMPLETED")
    (call,) = calls(job, "evaluate")
    assert call.startswith(f"evaluate --model {stand_in} --tasks paper --output {stand_in}/scores/a.json --allow-code")
    assert f"{stand_in}:{stand_in},{stand_in}/scores:{stand_in}/scores" in call


def test_an_environment_that_sbatch_did_not_export_reaches_the_tasks(lab, stand_in):
    exported = f"--export=NONE,RUN_DIR={stand_in / 'run'},PATH={os.environ['PATH']}"
    job = Job.submit(SCRIPT, stand_in / "run", flags=(*TWO_BY_TWO, exported))
    job.wait_end("COMPLETED")
    assert len(calls(job, "train")) == 4
