"""The memory arithmetic behind the production layouts."""

import json

import pytest

from nemo_tsdkd.checkpoints.shape import QWEN2_5, ModelShape
from nemo_tsdkd.checks.memory import GIB, per_gpu
from nemo_tsdkd.config.train_config import TrainConfig


def config(tp=1, pp=1, nodes=1, gpus=8, **fields):
    c = TrainConfig(**fields)
    c.parallel.tensor_model_parallel_size, c.parallel.pipeline_model_parallel_size = tp, pp
    c.parallel.num_nodes, c.parallel.gpus_per_node = nodes, gpus
    c.parallel.sequence_parallel = tp > 1
    return c


@pytest.mark.parametrize(
    ("name", "published"),  # parameter counts of the safetensors files on the hub
    [
        ("1.5B", 1_543_714_304),
        ("7B", 7_615_616_512),
        ("14B", 14_770_033_664),
        ("32B", 32_763_876_352),
        ("72B", 72_706_203_648),
    ],
)
def test_parameters_are_the_published_ones(name, published):
    shape = QWEN2_5[name]
    tables, final_norm = (1 if shape.tied else 2) * shape.vocab * shape.hidden, shape.hidden
    assert shape.layers * shape.layer_params + tables + final_norm == published
    padding = (shape.padded_vocab(1) - shape.vocab) * (1 if shape.tied else 2) * shape.hidden
    assert shape.params_per_gpu(tp=1, pp=1) + final_norm == published + padding


def test_fp32_doubles_weights_and_activations():
    c = config(2)
    bf16 = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["14B"])
    c.precision.name = c.teacher.precision = "fp32"
    fp32 = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["14B"])
    for name in ("teacher_weights", "activations", "teacher_hidden", "kv_cache"):
        assert getattr(fp32, name) == 2 * getattr(bf16, name)
    assert fp32.student_weights_and_grads * 3 == bf16.student_weights_and_grads * 4
    assert fp32.student_optimizer * 12 == pytest.approx(bf16.student_optimizer * 8)


def test_adding_data_parallel_ranks_shrinks_the_optimizer_alone():
    one, two = (per_gpu(config(8, nodes=n), QWEN2_5["14B"], QWEN2_5["72B"]) for n in (1, 2))
    assert two.student_optimizer == pytest.approx(one.student_optimizer / 2, rel=1e-6)
    assert (two.student_weights_and_grads, two.teacher_weights) == (one.student_weights_and_grads, one.teacher_weights)


def test_a_pipeline_halves_the_weights_and_not_the_activations():
    flat, piped = (per_gpu(config(4, pp, gpus=8), QWEN2_5["7B"], QWEN2_5["32B"]) for pp in (1, 2))
    assert piped.teacher_weights == pytest.approx(flat.teacher_weights / 2, rel=0.05)
    assert piped.activations == flat.activations  # half the layers, two micro-batches in flight


def test_sequence_parallelism_fused_head_and_offloading_each_save_memory():
    base = config(4)
    base.data.seq_length = 16384  # over few tokens the fused head's own tensors outweigh the logits it spares
    base.parallel.sequence_parallel = False
    plain = per_gpu(base, QWEN2_5["7B"], QWEN2_5["32B"])
    base.parallel.sequence_parallel = True
    base.objective.head, base.teacher.offload_weights, base.teacher.offload_hidden_states = "fused", True, True
    saving = per_gpu(base, QWEN2_5["7B"], QWEN2_5["32B"])
    assert saving.activations < plain.activations and saving.loss < plain.loss
    assert saving.teacher_hidden < plain.teacher_hidden
    head = 2 * 152576 // 4 * 5120
    assert (saving.teacher_weights, saving.offloaded_weights) == (head, plain.teacher_weights - head)
    assert saving.peak < plain.peak


def test_offloaded_weights_count_while_the_teacher_reads():
    c = config(2)
    plain = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["72B"])
    c.teacher.offload_weights = True
    offloaded = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["72B"])
    assert offloaded.weights == plain.weights and offloaded.peak > 68 * GIB


@pytest.mark.parametrize(("which", "copies"), [("student", 2), ("teacher", 1)])
def test_fp8_keeps_quantized_copies_of_the_layers(which, copies):
    c = config(8)
    bf16 = per_gpu(c, QWEN2_5["14B"], QWEN2_5["72B"])
    if which == "student":
        c.precision.name = "fp8_tensorwise"
    else:
        c.teacher.precision = "fp8_tensorwise"
    fp8 = per_gpu(c, QWEN2_5["14B"], QWEN2_5["72B"])
    shape = QWEN2_5["14B" if which == "student" else "72B"]
    assert fp8.resident - bf16.resident == copies * shape.layer_params_per_gpu(8, 1)


def test_rollouts_and_updates_share_their_room():
    c = config(8)
    m = per_gpu(c, QWEN2_5["14B"], QWEN2_5["72B"])
    c.rollout.lmbda = 0.0
    offline = per_gpu(c, QWEN2_5["14B"], QWEN2_5["72B"])
    assert m.kv_cache > 0 and offline.kv_cache == 0
    assert offline.peak <= m.peak < offline.peak + m.kv_cache


def test_shape_of_a_hugging_face_folder(tmp_path):
    fields = {
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelShape.of_folder(tmp_path) == QWEN2_5["1.5B"]
    (tmp_path / "config.json").write_text(json.dumps({**fields, "head_dim": 256}))
    assert ModelShape.of_folder(tmp_path).q_width == 12 * 256  # Qwen3's heads together are wider than its hidden states
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1}))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ModelShape.of_folder(tmp_path)
