"""A dry run against what it stands for: the same steps on real tensors with real ranks; and `check`'s arithmetic."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import planned
import pytest
import ranks

import nemo_tsdkd.plan.plan as plan_module
from nemo_tsdkd.checkpoints.shape import QWEN2_5, QWEN3, ModelShape
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.plan.estimate import step_of
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.plan import plan_job
from nemo_tsdkd.plan.request import HIDDEN_STATES, Result
from nemo_tsdkd.plan.roles import roles

CONFIGURATIONS = {
    "tsdkd_32b_to_7b_long": ("32B", "7B"),
    "tsdkd_72b_to_14b": ("72B", "14B"),
    "tsdkd_qwen3_235b_a22b_to_8b": ("235B-A22B", "8B"),
}  # a layout of each kind; benchmarks/plan.json has all of them at full depth

VOCABULARY = 1000
STUDENT = ModelShape(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=384, vocab=VOCABULARY, tied=True)
TEACHER = ModelShape(layers=4, hidden=192, heads=6, kv_heads=2, head_dim=32, ffn=512, vocab=VOCABULARY + 24)


def job(root: Path, tp: int, pp: int, head: str = "logits", recompute: str = "none", rows: int = 6) -> TrainConfig:
    """One data-parallel rank, micro-batches of 2 rows of 256 tokens; all tokens in the opener, as a dry run has it."""
    config = TrainConfig(global_batch_size=rows, micro_batch_size=2)
    config.run_dir = str(root / "run")
    config.student.path = str(planned.write_config(root / "student", STUDENT))
    config.teacher.path = str(planned.write_config(root / "teacher", TEACHER))
    config.data.seq_length, config.data.path = 256, "none"
    config.rollout.batch_size, config.rollout.max_new_tokens = 4, 200
    config.objective.threshold = 1.0
    config.objective.head = head
    p = config.parallel
    p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.gpus_per_node = tp, pp, tp * pp
    p.sequence_parallel, p.recompute = tp > 1, recompute
    config.validate()
    return config


@pytest.mark.parametrize(("head", "recompute"), [("logits", "selective"), ("fused", "full")])
def test_a_dry_run_sees_what_a_gloo_run_does(head, recompute, tmp_path):
    """TP 2 x PP 2: bytes by phase, collectives and their bytes, FLOPs, on the first and on the last stage."""
    config = job(tmp_path, 2, 2, head, recompute)
    gloo = ranks.run_ranks(planned.real, 4, config, VOCABULARY)
    for rank in (0, 3):
        (fake,) = ranks.run_ranks(planned.dry, 1, config, rank, VOCABULARY, meet=False)
        expected = gloo[rank]
        assert fake["share"] == 1, "three micro-batches are PP + 1: nothing is left out"
        assert fake["phases"].keys() == expected["phases"].keys()
        for name, phase in fake["phases"].items():
            of_gloo = expected["phases"][name]
            assert phase["peak"] == pytest.approx(of_gloo["peak"], rel=0.01), name
            assert sum(phase["at_begin"].values()) == pytest.approx(sum(of_gloo["at_begin"].values()), rel=0.01), name
            assert phase["flops"] == of_gloo["flops"], name
            if name != "load":  # there NeMo's and gloo's own barriers and seeds
                assert sizes(phase["collectives"]) == sizes(of_gloo["collectives"]), name
        assert fake["phases"]["student"]["flops"] > 0
        assert HIDDEN_STATES not in expected["phases"]["rollout"]["at_begin"], "of the step before: free"
        assert {row[0] for row in fake["phases"]["student"]["collectives"]} >= {"tp", "dp-cp"}


def sizes(rows: list) -> list:
    """Collectives without the bytes of pickled objects, whose length depends on what they say."""
    return [row[:3] if row[1] == "allgather" else row for row in rows]


def test_the_ledger_counts_what_the_operating_system_does(tmp_path):
    config = job(tmp_path, 1, 1, rows=8)
    config.data.seq_length = 1024
    config.micro_batch_size = 8
    config.precision.name = config.teacher.precision = "fp32"  # 16-bit products have work space of their own on a CPU
    (run,) = ranks.run_ranks(planned.real, 1, config, VOCABULARY, True)
    phases = {name: phase for name, phase in run["phases"].items() if name != "load"}
    rise = max(phase["peak"] for phase in phases.values()) - sum(run["phases"]["rollout"]["at_begin"].values())
    assert rise > 2**28, "large beside what Python and the allocator take"
    assert rise == pytest.approx(run["rss_rise"], rel=0.05)


def test_the_rest_of_a_step_repeats_what_was_run(tmp_path):
    """Of five micro-batches two are run; the plan's step is that of a run of all."""
    config = job(tmp_path, 1, 1, rows=10)
    (role,) = roles(config)
    (fake,) = ranks.run_ranks(planned.dry, 1, config, 0, VOCABULARY, meet=False)
    (whole,) = ranks.run_ranks(planned.real, 1, config, VOCABULARY)
    assert fake["share"] == pytest.approx(0.4)
    del whole["rss_rise"]
    part, full = (step_of(role, Result(**result), config, Hardware.read()) for result in (fake, whole))
    assert part.flops == pytest.approx(full.flops, rel=1e-6)
    tokens = 10 * 256 * 64  # of the micro-batches left out: ids, positions, labels, mask; little beside real models
    for act, peak in full.peak.items():
        assert part.peak[act] == pytest.approx(peak, rel=0.01, abs=tokens), act


def test_a_value_that_nobody_listed_stops_a_dry_run():
    message = ranks.run_ranks(unlisted, 1, meet=False)[0]
    assert "cannot know a value" in message and "test_dry_run.py:unlisted" in message


def unlisted() -> str:
    import torch

    from nemo_tsdkd.megatron.dry_run.fakes import fake_values

    with fake_values():
        x = torch.ones(3)
        assert torch.arange(4).sum().item() == 6, "integers are real"
        assert torch.tensor([True, False, True]).nonzero().flatten().tolist() == [0, 2]
        try:
            x.sum().item()
        except RuntimeError as error:
            return str(error)
    return "nothing was said"


def test_what_the_teacher_keeps_on_the_host_is_not_counted(tmp_path):
    config = job(tmp_path, 1, 1, rows=4)
    (plain,) = ranks.run_ranks(planned.dry, 1, config, 0, VOCABULARY, meet=False)
    config.teacher = replace(config.teacher, offload_weights=True, offload_hidden_states=True)
    (parked,) = ranks.run_ranks(planned.dry, 1, config, 0, VOCABULARY, meet=False)
    hidden = 2 * 4 * 255 * TEACHER.hidden
    weights = 2 * TEACHER.layers * TEACHER.layer_params + 2 * TEACHER.table_params(1)  # the head stays
    before, after = (run["phases"]["student"]["peak"] for run in (plain, parked))
    assert before - after == pytest.approx(weights + hidden, rel=0.02)
    in_its_pass = parked["phases"]["teacher"]["at_peak"]["teacher weights"]
    assert in_its_pass == plain["phases"]["teacher"]["at_peak"]["teacher weights"]


def forked(requests, show):
    """`dry_runs` in forks of a process that has imported NeMo."""
    return [Result(**ranks.run_ranks(planned.dry_request, 1, request, meet=False)[0]) for request in requests]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_arithmetic_of_a_configuration_is_within_five_percent(name, tmp_path, monkeypatch):
    """With two layers: what layers hold is the same a layer, and the rest weighs more."""
    monkeypatch.setattr(plan_module, "dry_runs", forked)
    teacher, student = (replace((QWEN2_5 | QWEN3)[size], layers=2) for size in CONFIGURATIONS[name])
    shapes = {"student": student, "teacher": teacher}
    folders = [f"{w}.path={planned.write_config(tmp_path / w, shape)}" for w, shape in shapes.items()]
    config = compose_config(name, [*folders, f"run_dir={tmp_path}", "data.path=none"])
    plan = plan_job(config, shapes, Hardware.read(), opener_share=config.objective.threshold, show=print)
    written = plan.as_json()
    fullest = max(written["stages"], key=lambda stage: stage["peak_gib"])
    assert fullest["peak_gib"] == pytest.approx(fullest["arithmetic_gib"], rel=0.05)
    assert 0 < written["time"]["step"] < 1000 and written["time"]["bottleneck"]


def test_the_last_of_1024_ranks_and_what_the_command_writes(tmp_path):
    """Nothing but two config.json and the configuration; in a process of its own, as a user has it."""
    shape = replace(STUDENT, hidden=256, heads=8, kv_heads=4)
    folders = [f"{w}.path={planned.write_config(tmp_path / w, shape)}" for w in ("student", "teacher")]
    command = [sys.executable, "-m", "nemo_tsdkd", "plan", "--config-name", "train", *folders]
    command += [f"run_dir={tmp_path}/run", "data.path=none", "data.seq_length=512", "rollout.max_new_tokens=256"]
    command += ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"]
    command += ["parallel.sequence_parallel=true", "parallel.gpus_per_node=8", "global_batch_size=512"]
    command += ["teacher.parallel.pipeline_model_parallel_size=4", "--world", "1024", "--rank", "1023"]
    command += ["--json", "plan.json", "--picture", "memory.png"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "student 1, teacher 3" in done.stdout and "the job fits into" in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "plan.json").read_text())
    (stage,) = written["stages"]
    assert stage["rank"] == 1023 and stage["phases"].keys() >= {"load", "rollout", "teacher", "student", "optimizer"}
    assert written["world_size"] == 1024 and written["flops"][stage["stage"]]["student"] > 0
    assert any(row["group"] == "teacher tp" and row["calls"] for row in written["collectives"])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_the_teacher_s_own_nodes_are_roles_too(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "dry_runs", forked)
    config = job(tmp_path, 2, 1)
    config.parallel.num_nodes, config.teacher.nodes = 2, 1
    config.teacher.parallel.pipeline_model_parallel_size, config.teacher.parallel.tensor_model_parallel_size = 2, 1
    config.validate()
    plan = plan_job(config, {"student": STUDENT, "teacher": TEACHER}, Hardware.read(), opener_share=1.0, show=print)
    names = [stage.step.role.name for stage in plan.stages]
    assert names == ["student 0", "teacher 0", "teacher 1"]
    student, _, last = plan.stages
    assert student.step.flops["teacher"] == 0 < last.step.flops["teacher"]
    for stage in plan.stages:
        assert {row.group for row in stage.step.collectives if row.operator == "alltoall_base"} == {"job"}
    # Small models: what arithmetic leaves out (ids, masks) weighs more than in conf/.
    assert last.step.peak["teacher"] == pytest.approx(last.arithmetic["teacher"], rel=0.2)
