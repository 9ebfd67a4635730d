"""Precision by name, and what FP8 must refuse before a model is built. None of it needs a GPU."""

import sys

import pytest
import torch

from nemo_tsdkd.checkpoints.shape import QWEN2_5, ModelShape
from nemo_tsdkd.checks import precision
from nemo_tsdkd.config.schema import PrecisionConfig, TeacherConfig
from nemo_tsdkd.config.train_config import TrainConfig

STUDENT, TEACHER = QWEN2_5["1.5B"], QWEN2_5["14B"]


def config(name="bf16", teacher="bf16", seq_length=4096, tp=2, **parallel):
    c = TrainConfig(precision=PrecisionConfig(name=name), teacher=TeacherConfig(precision=teacher))
    c.data.seq_length = seq_length
    c.parallel.tensor_model_parallel_size = tp
    for field, value in parallel.items():
        setattr(c.parallel, field, value)
    return c


def test_the_teacher_is_bf16_unless_asked():
    assert TeacherConfig().precision == "bf16" and PrecisionConfig().name == "bf16"
    assert precision.model_settings("bf16")["fp8"] is None


@pytest.mark.parametrize(
    ("name", "fp8", "recipe"), [("fp8_tensorwise", "hybrid", "tensorwise"), ("fp8_blockwise", "e4m3", "blockwise")]
)
def test_fp8_keeps_one_layer_at_either_end_and_the_weights_in_bf16(name, fp8, recipe):
    s = precision.model_settings(name)
    assert (s["fp8"], s["fp8_recipe"]) == (fp8, recipe)
    assert s["first_last_layers_bf16"] is True
    assert (s["num_layers_at_start_in_bf16"], s["num_layers_at_end_in_bf16"]) == (1, 1)
    assert s["params_dtype"] is torch.bfloat16 and s["fp8_param"] is False


def test_all_layers_in_fp8_only_when_asked():
    s = precision.model_settings("fp8_tensorwise", first_last_layers_bf16=False)
    assert (s["first_last_layers_bf16"], s["num_layers_at_start_in_bf16"], s["num_layers_at_end_in_bf16"]) == (
        False,
        0,
        0,
    )


@pytest.mark.parametrize("field", ["student", "teacher"])
@pytest.mark.parametrize("name", ["fp8", "fp8_tensorwize", "mxfp8", "int8"])
def test_unknown_recipes_are_named_and_refused(field, name):
    c = config(name=name) if field == "student" else config(teacher=name)
    with pytest.raises(ValueError, match=rf"= '{name}': must be one of bf16, fp32, fp8_tensorwise, fp8_blockwise"):
        precision.check_names(c)


def test_delayed_scaling_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"teacher\.precision = 'fp8_delayed'.*frozen teacher's scales never update"):
        precision.check_names(config(teacher="fp8_delayed"))


@pytest.mark.parametrize("field", ["precision.name", "teacher.precision"])
def test_fp8_without_transformer_engine_is_an_error(field, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)  # also where TE is installed
    c = config(name="fp8_tensorwise") if field == "precision.name" else config(teacher="fp8_tensorwise")
    with pytest.raises(ValueError, match=rf"{field} = 'fp8_tensorwise': needs Transformer Engine"):
        precision.check_engine(c)
    precision.check_engine(config())  # bf16 does not need it


@pytest.mark.parametrize(
    ("student", "teacher", "field"), [("fp32", "bf16", "precision.name"), ("bf16", "fp32", "teacher.precision")]
)
def test_fp32_under_context_parallelism_is_an_error_before_a_model_is_built(student, teacher, field):
    c = config(student, teacher, context_parallel_size=2)
    with pytest.raises(ValueError, match=rf"{field} = 'fp32'.*the model's context_parallel_size is 2\. Use bf16"):
        precision.check_names(c)
    c.parallel.context_parallel_size = 1
    precision.check_names(c)


@pytest.mark.parametrize("field", ["precision.name", "teacher.precision"])
def test_a_model_of_which_no_layer_would_be_fp8_is_named(field):
    c = config("fp8_tensorwise") if field == "precision.name" else config(teacher="fp8_tensorwise")
    two, three = (ModelShape(layers=n, hidden=64, heads=4, kv_heads=2, ffn=64, vocab=512) for n in (2, 3))
    with pytest.raises(ValueError, match=rf"first_last_layers_bf16 = True: of the 2 layers .* with {field}"):
        precision.check_shapes(c, two, two)
    precision.check_shapes(c, three, three)
    c.precision.first_last_layers_bf16 = False
    precision.check_shapes(c, two, two)


def test_sequence_parallelism_on_a_gpu_without_transformer_engine_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    c = config(tp=2, sequence_parallel=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precision.check_engine(c)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"parallel\.sequence_parallel = True: needs Transformer Engine"):
        precision.check_engine(c)


@pytest.mark.parametrize(
    ("capability", "cuda", "name", "why"),
    [((8, 0), "12.9", "fp8_tensorwise", "Hopper"), ((9, 0), "12.8", "fp8_blockwise", r"CUDA 12\.9, found 12\.8")],
)
def test_gpus_and_cuda_too_old_for_a_recipe(capability, cuda, name, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", object())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=why):
        precision.check_engine(config(name=name))


def test_hopper_with_a_new_cuda_may_run_both(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", object())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    precision.check_engine(config(name="fp8_blockwise", teacher="fp8_tensorwise"))


@pytest.mark.parametrize("name", list(precision.FP8))
def test_production_pairs_have_dimensions_fp8_can_multiply(name):
    for student, teacher, tp in (("1.5B", "14B", 2), ("7B", "32B", 4), ("14B", "72B", 8)):
        c = config(name, name, tp=tp, sequence_parallel=True)
        precision.check_shapes(c, QWEN2_5[student], QWEN2_5[teacher])


def test_blocks_of_fp8_must_fill_a_sequence_shard_s_rows():
    shape = ModelShape(layers=3, hidden=192, heads=4, kv_heads=2, ffn=256, vocab=512)
    precision.check_shapes(config("fp8_blockwise"), shape, TEACHER)
    precision.check_shapes(config("fp8_tensorwise", sequence_parallel=True), shape, TEACHER)
    with pytest.raises(ValueError, match="gathers blocks of 128, but the hidden size is 192"):
        precision.check_shapes(config("fp8_blockwise", sequence_parallel=True), shape, TEACHER)


def test_an_mlp_cut_too_thin_is_named():
    shape = ModelShape(layers=3, hidden=64, heads=4, kv_heads=2, ffn=72, vocab=512)
    with pytest.raises(ValueError, match=r"MLP width on a rank is 36 at TP 2"):
        precision.check_shapes(config("fp8_tensorwise"), shape, TEACHER)
    precision.check_shapes(config("bf16"), shape, TEACHER)


@pytest.mark.parametrize(
    ("name", "seq_length", "layout", "use"),
    [
        ("fp8_tensorwise", 4090, {}, 4096),
        ("fp8_tensorwise", 4112, {"sequence_parallel": True}, 4128),  # 2 ranks x 16
        ("fp8_tensorwise", 4112, {"context_parallel_size": 2}, 4128),
        ("fp8_blockwise", 4224, {"sequence_parallel": True}, 4352),  # 2 ranks x 128
    ],
)
def test_token_counts_fp8_refuses_come_with_the_next_length_that_works(name, seq_length, layout, use):
    with pytest.raises(ValueError, match=rf"data\.seq_length = {seq_length}.*Use {use}\."):
        precision.check_shapes(config(name, seq_length=seq_length, **layout), STUDENT, TEACHER)
    precision.check_shapes(config(name, seq_length=use, **layout), STUDENT, TEACHER)


def test_more_rows_in_a_micro_batch_make_up_for_an_odd_length():
    c = config("fp8_tensorwise", seq_length=4100)
    c.micro_batch_size = 4
    precision.check_shapes(c, STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("student", "teacher", "layout", "multiple"),
    [
        ("bf16", "bf16", {}, 1),
        ("bf16", "bf16", {"sequence_parallel": True, "context_parallel_size": 2}, 8),  # TP x two halves x CP
        ("fp8_tensorwise", "bf16", {"sequence_parallel": True}, 32),
        ("fp8_tensorwise", "fp8_blockwise", {"sequence_parallel": True}, 256),
    ],
)
def test_rows_are_padded_to_what_the_layout_and_both_models_kernels_want(student, teacher, layout, multiple):
    c = config(student, teacher, **layout)
    assert precision.pad_to_multiple(c, on_gpu=False) == multiple
    assert precision.pad_to_multiple(c, on_gpu=True) == 256  # few lengths, since each one costs a kernel's plan


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: FP8 kernels cannot be emulated")
def test_this_gpu_runs_the_recipes():
    from transformer_engine.pytorch import Linear, fp8_autocast

    te_recipe = pytest.importorskip("transformer_engine.common.recipe")
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    layer = Linear(256, 256, params_dtype=torch.bfloat16)
    classes = {"fp8_tensorwise": te_recipe.Float8CurrentScaling, "fp8_blockwise": te_recipe.Float8BlockScaling}
    for name, fp8 in precision.FP8.items():
        precision.check_engine(config(name))
        recipe = classes[name](fp8_format=getattr(te_recipe.Format, fp8.format.upper()))
        with fp8_autocast(enabled=True, fp8_recipe=recipe):
            y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=0.3, rtol=0.1)
