"""What a plan makes of dry runs, and a sweep of layouts; no dry run."""

import json
from dataclasses import replace
from pathlib import Path

import planned
import pytest

from nemo_tsdkd.checkpoints.shape import QWEN2_5
from nemo_tsdkd.cli.main import main
from nemo_tsdkd.config.compose import CONF, compose_config
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.plan.estimate import bottleneck, step_of
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.request import HIDDEN_STATES, Request, Result
from nemo_tsdkd.plan.roles import Role, roles
from nemo_tsdkd.plan.sweep import layouts, sweep

PLAN = Path(__file__).parents[2] / "benchmarks" / "plan.json"
SHAPES = {"student": QWEN2_5["1.5B"], "teacher": QWEN2_5["14B"]}


def config(*overrides):
    base = ["run_dir=r", "data.path=d", "student.path=s", "teacher.path=t"]
    return compose_config("tsdkd_14b_to_1.5b", [*base, *overrides])


def phase(at_peak, seconds=0.0, flops=0, collectives=()):
    return {
        "at_begin": {},
        "peak": 0,
        "at_peak": at_peak,
        "flops": flops,
        "seconds": seconds,
        "collectives": collectives,
    }


def test_roles_are_the_kinds_of_ranks():
    piped = config("parallel.pipeline_model_parallel_size=4", "teacher.parallel.pipeline_model_parallel_size=4")
    assert [(r.student_stage, r.teacher_stage) for r in roles(piped)] == [(0, 0), (2, 2), (3, 3)]
    # The student whole on each of 16 GPUs, the teacher at TP 4 x PP 4 on the same ones.
    own = config("teacher.parallel.pipeline_model_parallel_size=4")
    assert [(r.student_stage, r.teacher_stage) for r in roles(own)] == [(0, 0), (0, 2), (0, 3)]
    nodes = config("teacher.nodes=1")
    assert [(r.rank, r.student_stage, r.teacher_stage) for r in roles(nodes)] == [(7, 0, None), (15, None, 0)]


def test_a_step_is_what_its_micro_batches_repeat():
    """A quarter of the micro-batches was run: FLOPs, messages and hidden states of the others come on top; what a
    step does once does not."""
    phases = {
        "load": phase({"student": 100}),
        "rollout": phase({"KV cache": 7}, seconds=1.0, flops=10),
        "decode": phase({}, seconds=0.5, flops=1),
        "teacher": phase(
            {HIDDEN_STATES: 3, "teacher": 5}, seconds=2.0, flops=20, collectives=[["tp", "allreduce", 2, 8]]
        ),
        "student": phase({"student": 50}, seconds=3.0, flops=30, collectives=[["dp-cp", "reduce_scatter", 1, 64]]),
        "optimizer": phase({}, seconds=0.25),
    }
    groups = {"tp": [0, 1], "dp-cp": list(range(16))}
    hardware = replace(Hardware.read(), nvlink_latency_s=1.0, nvlink_bytes_per_s=8.0)
    step = step_of(Role(0, 0, 0), Result(0, phases, 2, 0.25, groups), config(), hardware)
    assert step.peak["teacher"] == 3 / 0.25 + 5
    assert step.flops == {"rollout": 10 + (3072 - 1) / 2, "teacher": 80, "student": 120, "optimizer": 0}
    assert step.compute_s["rollout"] == 1.0 + 0.5 * 3071 / 2 and step.compute_s["student"] == 12.0
    calls = {(row.group, row.calls, row.size) for row in step.collectives}
    assert calls == {("tp", 8, 32), ("dp-cp", 1, 64)}
    assert step.collective_s["teacher", "tp"] == 8 * 1.0 + 2 * (1 / 2) * 32 / 8.0
    assert bottleneck([step]) == "computation of the rollout on student 0, teacher 0"


def test_a_request_passes_through_json():
    request = Request(config("objective.beta=0.3"), 3, 151665, {"student": 2}, 0.5)
    assert Request.from_json(json.loads(json.dumps(request.as_json()))) == request


def test_a_sweep_lists_every_layout_with_its_reason():
    small = config("parallel.num_nodes=1", "teacher.parallel.tensor_model_parallel_size=8")
    planned_layouts = []

    def dry_run(layout):
        planned_layouts.append(layout)

    hardware = replace(Hardware.read(), memory_gib=40.0)
    found = sweep(small, SHAPES, hardware, dry_run, best=2)
    assert len(found) == len(list(layouts(small, SHAPES["student"])))
    feasible = [c for c in found if c.reason is None]
    assert [c.config for c in found[:2]] == planned_layouts and len(feasible) > 5
    assert all(c.memory_gib <= 40 for c in feasible)
    reasons = " ".join(c.reason for c in found if c.reason)
    assert "num_key_value_heads = 2" in reasons and "GiB of 40.0" in reasons
    again = config(
        "parallel.num_nodes=1", *feasible[-1].overrides.split(), "teacher.parallel.tensor_model_parallel_size=8"
    )
    assert again == feasible[-1].config, "the overrides give the layout"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world", "12"], "--world = 12: must be a multiple of parallel.gpus_per_node = 8"),
        (["--rank", "16"], "--rank = 16: must lie in [0, 16)"),
        (["--opener-share", "0"], "--opener-share = 0.0: must lie in (0, 1]"),
        (["--hardware", "nothing.yaml"], "--hardware = nothing.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    paths = [f"{w}.path={planned.write_config(tmp_path / w, shape)}" for w, shape in SHAPES.items()]
    with pytest.raises(SystemExit) as left:
        main(["plan", "--config-name", "tsdkd_14b_to_1.5b", *paths, f"run_dir={tmp_path}/r", "data.path=d", *arguments])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_hardware_has_all_its_fields(tmp_path):
    (tmp_path / "h.yaml").write_text("memory_gib: 80")
    with pytest.raises(UserError, match="must have exactly memory_gib, flops_per_s"):
        Hardware.read(tmp_path / "h.yaml")


def test_the_committed_plans_agree_with_the_arithmetic():
    """benchmarks/plan.py wrote them, at full depth."""
    plans = json.loads(PLAN.read_text())
    assert plans.keys() == {path.stem for path in CONF.glob("tsdkd_*.yaml")}
    for name, plan in plans.items():
        fullest = max(plan["stages"], key=lambda stage: stage["peak_gib"])
        assert fullest["peak_gib"] == pytest.approx(fullest["arithmetic_gib"], rel=0.05), name
        assert plan["fits"], name
