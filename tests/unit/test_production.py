"""The production configurations fit their GPUs, agree with their job scripts, and the docs state what is computed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_tsdkd.checkpoints.shape import QWEN2_5, QWEN3
from nemo_tsdkd.checks.memory import GIB, per_gpu
from nemo_tsdkd.checks.precision import FP8, check_shapes
from nemo_tsdkd.checks.setup import check_model_fits
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.distributed.layout import student_layout, teacher_layout

ROOT = Path(__file__).parents[2]
H100 = 79  # GiB
CONFIGS = sorted(path.stem for path in (ROOT / "conf").glob("tsdkd_*.yaml"))
COLUMNS = (
    ("weights, gradients", "student_weights_and_grads"),
    ("optimizer", "student_optimizer"),
    ("teacher weights", "teacher_weights"),
    ("activations", "activations"),
    ("backward", "backward"),
    ("loss", "loss"),
    ("hidden", "teacher_hidden"),
    ("teacher's pass", "teacher_pass"),
    ("KV cache", "kv_cache"),
    ("prefill", "prefill"),
    ("peak", "peak"),
)


def load(name, *overrides):
    return compose_config(name, ["run_dir=run", "data.path=data.jsonl", *overrides])


def shapes(name):
    family, teacher, student = re.match(r"tsdkd_(qwen3_)?([\w.]+b)_to_([\d.]+b)", name).groups()
    models = QWEN3 if family else QWEN2_5
    return {"student": models[student.upper()], "teacher": models[teacher.upper().replace("_", "-")]}


def memory_table():
    """docs/cluster.md's table of layouts, as it should read."""
    heads = ("configuration", "tokens", "GPUs", "student: TP x PP x DP", "teacher", *(title for title, _ in COLUMNS))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in CONFIGS:
        c = load(name)
        memory = per_gpu(c, **shapes(name))
        layout = " | ".join(f"{x.tensor} x {x.pipeline} x {x.data}" for x in (student_layout(c), teacher_layout(c)))
        figures = " | ".join(f"{getattr(memory, field) / GIB:.1f}" for _, field in COLUMNS)
        lines.append(f"| `{name}` | {c.data.seq_length} | {c.parallel.world_size} | {layout} | {figures} |")
    return "\n".join(lines)


def test_the_docs_state_the_memory_that_is_computed():
    assert memory_table() in (ROOT / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_layout_fits_an_h100_with_room_to_spare(name, precision):
    config = load(name)
    config.precision.name = config.teacher.precision = precision
    share = 0.8 if precision == "bf16" else 0.9  # FP8's copies of the weights are counted to the byte
    assert per_gpu(config, **shapes(name)).peak < share * H100 * GIB


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_can_be_cut_that_way_also_in_fp8(name):
    config = load(name)
    config.validate()
    for which, shape in shapes(name).items():
        check_model_fits(shape, config.layout_of(which), which)
    for precision in FP8:
        check_shapes(load(name, f"precision={precision}"), **shapes(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_more_tensor_parallelism_than_key_value_heads_is_refused(name):
    shape = replace(shapes(name)["student"], heads=2**10, ffn=2**12)
    config = load(name, f"parallel.tensor_model_parallel_size={2 * shape.kv_heads}")
    with pytest.raises(ValueError, match=f"num_key_value_heads = {shape.kv_heads}"):
        check_model_fits(shape, config.parallel, "student")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_job_script_asks_for_the_nodes_of_the_configuration(name):
    script = (ROOT / "slurm" / f"{name.removesuffix('_long')}.sh").read_text()
    p = load(name).parallel
    assert f"#SBATCH --nodes={p.num_nodes}\n" in script and f"#SBATCH --gpus-per-node={p.gpus_per_node}\n" in script
    assert f"#SBATCH --ntasks-per-node={p.gpus_per_node}\n" in script
