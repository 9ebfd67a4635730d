"""The whole way on a real Slurm: the true trainer, tiny models, two nodes of two tasks on gloo, every interruption.

A start of four ranks costs half a minute of two cores, so all interruptions hit one job, one after the other, and each
is of another kind to the trainer: SIGTERM, SIGUSR1, death. test_job_scripts.py has the other ways in which these come.
Losses and final weights are compared with those of a run that nothing interrupted, and that no Slurm started.
"""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny_run
from safetensors.numpy import load_file
from slurm_lab import TWO_BY_TWO, Job, preempt, wait_until

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.manifest import step_folder
from nemo_tsdkd.checkpoints.model_folder import is_nemo_checkpoint
from nemo_tsdkd.cli import main as cli
from nemo_tsdkd.reporting.rows import read_metrics

SCRIPT = "tsdkd_14b_to_1.5b.sh"
STEPS = 20
TINY = (
    *(f"max_steps={STEPS}", "global_batch_size=8", "micro_batch_size=2", "teacher.micro_batch_size=2"),
    *("data.seq_length=96", "rollout.max_new_tokens=16", "rollout.batch_size=8"),
    *(
        "precision=fp32",
        "teacher.precision=fp32",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "checkpoint.every_n_steps=2",
    ),
)
START = 400  # seconds until an attempt has saved its first checkpoint
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models and data on the "shared disk"; the environment's commands first on PATH, as after `activate`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield tiny_run.prepare(tmp_path_factory.mktemp("shared"))


def inputs(root: Path) -> dict[str, str]:
    return {"MODEL_NAME": "student", "TEACHER_NAME": "teacher", "MODELS_DIR": str(root), "DATA": f"{root}/data.jsonl"}


def submit(root: Path, name: str, *overrides: str, **options: Any) -> Job:
    return Job.submit(SCRIPT, root / name, "--", *TINY, *overrides, **inputs(root), **options)


@pytest.fixture(scope="module")
def runs(lab, root):
    """A job that has met all that can happen to one, at least one checkpoint apart, and has ended; the run folder of
    the same training that nothing interrupted, done while the job waits for Slurm's clock."""
    job = submit(root, "interrupted", MAX_RESTARTS="1")
    with ThreadPoolExecutor(1) as beside:
        for attempt, interrupt in enumerate([preempt, limit, crash_a_node]):
            wait_for_checkpoint(job, after=job.last_step())
            print(interrupt.__name__, "at step", job.last_step())
            if interrupt is limit:
                uninterrupted = beside.submit(train_in_one_go, root)
            interrupt(lab, job)
            wait_for_restart(job, attempt + 1)
        job.wait_end("COMPLETED", 300)
        for node in lab("run", "sinfo", "--noheader", "--states=down", "--format=%n").split():
            lab("boot", node)
        return job, uninterrupted.result()


@pytest.fixture(scope="module")
def job(runs):
    return runs[0]


@pytest.fixture(scope="module")
def uninterrupted(runs):
    return runs[1]


def train_in_one_go(root):
    """The same training in four ranks of one machine; its run folder."""
    folder = root / "uninterrupted"
    paths = (f"run_dir={folder}", f"student.path={root}/student", f"teacher.path={root}/teacher")
    layout = ("data.path=" + str(root / "data.jsonl"), "parallel.num_nodes=1", "parallel.gpus_per_node=4")
    command = ["train", "--config-name", SCRIPT.removesuffix(".sh"), *paths, *layout, *TINY]
    ranks.run_ranks(cli.main, 4, command, meet=False)
    return folder


def wait_for_checkpoint(job, after):
    wait_until(lambda: job.last_step() > after, START, lambda: f"{job.log}\n{job.logs_of('train')[-5000:]}")


def wait_for_restart(job, number):
    wait_until(lambda: int(job.field("Restarts")) == number, 90, lambda: f"restart {number} is missing:\n{job.log}")


def limit(lab, job):
    """Five minutes are left: Slurm sends the script's --signal at its next look, within 30 s. A rank is held
    meanwhile, so that the tiny run does not end first."""
    held = job.process(rank=1)
    os.kill(held, signal.SIGSTOP)
    lab("run", "scontrol", "update", f"JobId={job.id}", "TimeLimit=5")
    wait_until(lambda: "signalled" in job.log, 60, lambda: job.log)
    os.kill(held, signal.SIGCONT)
    wait_until(lambda: job.state == "PENDING", 60, lambda: job.log)
    lab("run", "scontrol", "update", f"JobId={job.id}", "TimeLimit=60")


def crash_a_node(lab, job):
    lab("crash", lab("run", "scontrol", "show", "hostnames", job.field("NodeList")).split()[-1])


def test_every_attempt_went_on_from_the_last_one(job):
    assert job.field("Restarts") == "3"
    assert [p.name for p in sorted((job.run_dir / "logs").iterdir())] == [f"{job.id}.{i}" for i in range(4)]
    assert [row["step"] for row in read_metrics(job.run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_every_step_s_loss_is_that_of_the_uninterrupted_run(job, uninterrupted):
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (job.run_dir, uninterrupted)]
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in run] for run in rows]
    assert losses[0] == losses[1]


def test_the_final_weights_are_those_of_the_uninterrupted_run(job, uninterrupted):
    """Bit for bit: digests of what each rank wrote of model, optimizer and random state in the last checkpoint."""
    manifests = [read_json(step_folder(folder, STEPS) / "manifest.json") for folder in (job.run_dir, uninterrupted)]
    written = [{n: d for n, d in m.items() if n.endswith(".distcp") or n.startswith("random/")} for m in manifests]
    assert len(written[0]) == 12  # a rank: two files of weights and one of random state
    assert written[0] == written[1]


def test_a_wrong_setting_ends_the_job_in_seconds_and_for_good(lab, root):
    job = submit(root, "wrong", "objective.beta=2")
    job.wait_end("FAILED")
    assert "objective.beta = 2.0: must lie in [0, 1]" in job.log
    assert (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0") and "preflight" not in job.log


def test_the_preflight_names_the_node_that_lacks_the_teacher(lab, root):
    teacher = root / "teacher"
    lab("on", "node2", "mount", "-t", "tmpfs", "none", str(teacher))
    try:
        job = submit(root, "blind", flags=(*TWO_BY_TWO, "--nodelist=node1,node2"), MAX_RESTARTS="0")
        job.wait_end("FAILED", 120)
    finally:
        lab("on", "node2", "umount", str(teacher))
    assert "preflight: FAILED: node2 (rank 2): node: " in job.log and str(teacher) in job.log
    assert "node1 (" not in job.log and "train: logs" not in job.log


def test_models_are_imported_and_students_exported(lab, root, job):
    models = root / "models"
    (models / "hf" / "Qwen").mkdir(parents=True)
    (models / "hf" / "Qwen" / "tiny").symlink_to(root / "hf_student")
    one = ("--gpus-per-node=1",)
    imported = Job.submit("import.sh", root / "import", flags=one, MODEL_NAME="Qwen/tiny", MODELS_DIR=str(models))
    exported = Job.submit("export.sh", job.run_dir, flags=one, OUTPUT=str(root / "exported"))
    for each in (imported, exported):
        each.wait_end("COMPLETED", 240)
    assert is_nemo_checkpoint(models / "Qwen" / "tiny")
    before, after = (load_file(root / name / "model.safetensors") for name in ("hf_student", "exported"))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)  # every weight was trained


def test_the_teacher_writes_data_that_training_reads(lab, root):
    output = root / "responses"
    # The container's runtime sets a rank's variables half: lab.sh's pyxis does as NVIDIA's.
    fields = {"OUTPUT": str(output), "CONTAINER_IMAGE": "image.sqsh", **inputs(root)}
    flags = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    layout = "teacher.parallel.tensor_model_parallel_size=2"
    job = Job.submit("generate_teacher_data.sh", root / "gen", "--", *TINY, layout, flags=flags, **fields)
    job.wait_end("COMPLETED", 240)
    rows = [json.loads(line) for path in sorted(output.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert len(rows) == 37 and all(row["response"] for row in rows)
