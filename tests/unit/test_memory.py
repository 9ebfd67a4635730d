"""The memory arithmetic behind the production layouts."""

import json
from dataclasses import replace

import pytest
import torch

from nemo_tsdkd.checkpoints.shape import QWEN2_5, QWEN3, ModelShape
from nemo_tsdkd.checks.memory import GIB, RESERVE, per_gpu, per_stage, teacher_per_gpu
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.ledger import Ledger
from nemo_tsdkd.objective import tsdkd_loss, tsdkd_loss_from_hidden


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
    assert shape.stage_params(tp=1, pp=1, stage=0) + final_norm == published + padding


@pytest.mark.parametrize(
    ("name", "published"),  # parameter counts of the safetensors files on the hub
    [("4B", 4_022_468_096), ("8B", 8_190_735_360), ("30B-A3B", 30_532_122_624), ("235B-A22B", 235_093_634_560)],
)
def test_parameters_of_qwen3_are_the_published_ones(name, published):
    shape = QWEN3[name]
    # Counted with biases of q, k and v, which Qwen3 has not; without the norms of q and k, and the last norm.
    bias, norms = shape.q_width + 2 * shape.kv_width, 2 * shape.head_dim
    tables = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    assert shape.layers * (shape.layer_params - bias + norms) + tables + shape.hidden == published


def test_expert_parallelism_divides_the_experts_and_nothing_else():
    def of(ep, tp=1, pp=1):
        c = config(pp=pp, gpus=8, nodes=2)
        c.teacher.parallel.expert_model_parallel_size, c.teacher.parallel.tensor_model_parallel_size = ep, tp
        return per_gpu(c, QWEN3["4B"], QWEN3["30B-A3B"])

    layer = 128 * 3 * 2048 * 768  # numbers of 2 bytes
    assert of(1).teacher_weights - of(8).teacher_weights == 48 * 2 * (layer - layer // 8)
    assert of(8).teacher_pass == of(1).teacher_pass  # balanced routing brings as many tokens as it takes away
    assert of(8, pp=2).teacher_weights == pytest.approx(of(8).teacher_weights / 2, rel=0.1)
    # Tensor parallelism divides the rest: attention, a router and norms; the head is elsewhere.
    rest = 2048 * (2 * 4096 + 2 * 512) + 5120 + 2048 * 128 + 2 * 2048
    assert of(8).teacher_weights - of(8, tp=2).teacher_weights == pytest.approx(48 * rest + 152576 * 2048, rel=0.01)


def test_fp32_doubles_weights_and_activations():
    c = config(2)
    bf16 = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["14B"])
    c.precision.name = c.teacher.precision = "fp32"
    fp32 = per_gpu(c, QWEN2_5["1.5B"], QWEN2_5["14B"])
    for name in ("teacher_weights", "teacher_hidden", "teacher_pass", "kv_cache", "prefill"):
        assert getattr(fp32, name) == 2 * getattr(bf16, name)
    assert fp32.activations == pytest.approx(2 * bf16.activations, rel=1e-3)  # but for one fp32 number a head
    assert fp32.student_weights_and_grads * 3 == bf16.student_weights_and_grads * 4
    assert fp32.student_optimizer * 12 == pytest.approx(bf16.student_optimizer * 8)


def test_adding_data_parallel_ranks_shrinks_the_optimizer_alone():
    one, two = (per_gpu(config(8, nodes=n), QWEN2_5["14B"], QWEN2_5["72B"]) for n in (1, 2))
    assert two.student_optimizer == pytest.approx(one.student_optimizer / 2, rel=1e-6)
    assert (two.student_weights_and_grads, two.teacher_weights) == (one.student_weights_and_grads, one.teacher_weights)


def test_a_pipeline_halves_the_weights_and_not_the_activations():
    flat, piped = (per_gpu(config(4, pp, gpus=8), QWEN2_5["7B"], QWEN2_5["32B"]) for pp in (1, 2))
    assert piped.teacher_weights == pytest.approx(flat.teacher_weights / 2, rel=0.05)
    # Half the layers, two micro-batches in flight; and both stages' input.
    assert piped.activations == pytest.approx(flat.activations, rel=0.01)


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


SMALL = ModelShape(layers=8, hidden=256, heads=4, kv_heads=2, ffn=1024, vocab=4096, head_dim=64)
LARGE = ModelShape(layers=4, hidden=512, heads=8, kv_heads=2, ffn=2048, vocab=4096, head_dim=64)


def small(tp=1, pp=1, gpus=None, **fields):
    """512 tokens a row, 8 rows a step."""
    c = config(tp, pp, gpus=gpus or tp * pp, global_batch_size=8, **fields)
    c.data.seq_length, c.rollout.max_new_tokens = 512, 256
    return c


@pytest.mark.parametrize(
    ("recompute", "a_layer"),
    [
        # q 256, k and v 128 each, attention's output 256, and 4 fp32 numbers; two norms' inputs and outputs of 256; the
        # MLP's 2 x 1,024 and 1,024.
        ("none", 2 * (256 + 2 * 128 + 256) + 4 * 4 + 2 * 4 * 256 + 2 * 3 * 1024),
        ("selective", 2 * (256 + 2 * 128 + 256) + 4 * 4 + 2 * 3 * 256),
        ("full", 2 * 256),
    ],
)
def test_what_recompute_keeps_of_a_layer(recompute, a_layer):
    """Counted by hand, and in tests/engine from the tensors that Transformer Engine's layers keep."""
    c = small()
    c.parallel.recompute = recompute
    m = per_gpu(c, SMALL, LARGE)
    assert m.activations == 512 * (8 * a_layer + 2 * 256)
    none = 2 * (256 + 2 * 128 + 256) + 4 * 4 + 2 * 4 * 256 + 2 * 3 * 1024
    assert m.backward == 512 * (none - a_layer + 2 * (2 * 256 + 2 * 1024))  # and gradients: two of 256, two of 1,024
    c = small(tp=2)  # with sequence parallelism all of it is halved
    c.parallel.recompute = recompute
    assert per_gpu(c, SMALL, LARGE).activations == m.activations / 2


def test_sequence_parallelism_gathers_what_narrow_products_read_and_write():
    wide = replace(SMALL, hidden=1024, ffn=256)
    m = per_gpu(small(tp=2), wide, LARGE)
    assert m.backward == 2 * 512 * (2 * 512 + 2 * 1024 - 128)


def test_the_first_stage_holds_the_activations_and_the_last_the_loss():
    first, second, third, last = per_stage(small(pp=4), SMALL, LARGE)
    assert [m.activations for m in (first, second, third, last)] == [last.activations * n for n in (4, 3, 2, 1)]
    for m in (first, second, third):
        assert m.loss == m.teacher_hidden == 0 < last.loss
    table = 6 * 4096 * 256  # weights of 2 bytes, gradients of 4
    assert first.student_weights_and_grads == last.student_weights_and_grads
    assert first.student_weights_and_grads - second.student_weights_and_grads == table
    assert per_gpu(small(pp=4), SMALL, LARGE) in (first, second, third, last)
    few = small(pp=4, micro_batch_size=4)  # two micro-batches of a step: no stage holds more
    few.global_batch_size = 8
    assert [m.activations // last.activations for m in per_stage(few, SMALL, LARGE)] == [8, 8, 8, 4]


def test_a_token_budget_bounds_a_micro_batch():
    rows = per_gpu(small(micro_batch_size=4), SMALL, LARGE)
    budget = per_gpu(small(micro_batch_tokens=4 * 512), SMALL, LARGE)
    assert budget == rows
    least = small(micro_batch_tokens=512)  # a row of 512 fits, a longer one has its own micro-batch
    assert per_gpu(least, SMALL, LARGE) == per_gpu(small(), SMALL, LARGE)


def test_rows_are_padded_to_256_tokens_on_a_gpu():
    c, padded = small(), small()
    c.data.seq_length, padded.data.seq_length = 513, 768
    one, other = per_gpu(c, SMALL, LARGE), per_gpu(padded, SMALL, LARGE)
    for name in ("activations", "backward", "loss", "teacher_hidden"):
        assert getattr(one, name) == getattr(other, name)
    assert one.kv_cache < other.kv_cache  # a prompt is not padded


def test_a_prefill_and_a_teachers_pass():
    c = small(tp=2)
    m = per_gpu(c, SMALL, LARGE)
    # 8 prompts of up to 512 tokens in one pass: five tensors of the width, the MLP's halves and their product.
    assert m.prefill == 2 * 8 * 512 * (5 * 256 + 3 * 512)
    assert m.kv_cache == 2 * 2 * 8 * 512 * (8 * 128) // 2
    hidden = 2 * 8 * 512 * 512 // 2
    # Three shards of the width; the MLP's halves and their product.
    assert m.teacher_pass == 2 * 512 * (3 * 256 + 3 * 1024) + hidden and m.teacher_hidden == hidden
    narrow = per_gpu(c, SMALL, replace(LARGE, ffn=512))  # all ranks' normed tokens are wider than an MLP's product
    assert narrow.teacher_pass == 2 * 512 * (4 * 256 + 512 + 2 * 256) + hidden
    c.teacher.micro_batch_size, c.micro_batch_size = 2, 4
    assert per_gpu(c, SMALL, LARGE).teacher_pass - hidden == 2 * (m.teacher_pass - hidden)
    c.global_batch_size, c.rollout.batch_size = 64, 64  # more prompts than one pass takes
    assert per_gpu(c, SMALL, LARGE).prefill == 2 * 16384 * (5 * 256 + 3 * 512)


def test_validation_may_decode_more_rows_than_a_step():
    c = small(gpus=4)
    c.rollout.batch_size = 6  # a step has two prompts on each of four ranks
    a_row = per_gpu(c, SMALL, LARGE).kv_cache // 2
    c.validation.path = "held_out.jsonl"
    assert per_gpu(c, SMALL, LARGE).kv_cache == 6 * a_row
    c.validation.limit = 10
    assert per_gpu(c, SMALL, LARGE).kv_cache == 3 * a_row
    c.rollout.lmbda = 0.0
    assert per_gpu(c, SMALL, LARGE).kv_cache == 3 * a_row


def test_a_teacher_in_a_layout_of_its_own_keeps_its_hidden_states_until_they_are_sent():
    c = small(gpus=4)
    c.teacher.parallel.tensor_model_parallel_size = 4
    m = per_gpu(c, SMALL, LARGE)
    hidden = 2 * 2 * 512 * 512  # two of eight rows on each student
    forward = 2 * 512 * (3 * 512 + max(512 + 2 * 512, 3 * 512))
    assert m.teacher_hidden == hidden and m.teacher_pass == 2 * 8 * 512 * 512 + max(forward, hidden)
    c.parallel.num_nodes, c.teacher.nodes = 2, 1
    layers = 2 * (4 * LARGE.layer_params + 4096 * 512) // 4  # without the head, which the loss has elsewhere
    assert teacher_per_gpu(c, SMALL, LARGE) == layers + 2 * 8 * 512 * 512 + forward + RESERVE


@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_term_is_what_the_loss_holds(head, dtype):
    """Measured from its tensors on the CPU, beyond the inputs."""
    c, tokens, size = small(), 512, dtype.itemsize
    c.precision.name = c.teacher.precision = {2: "bf16", 4: "fp32"}[size]
    c.objective.head, c.objective.tile_logits = head, 2**18  # tiles of 64 rows, or of 512 columns
    student, teacher = replace(SMALL, hidden=64), replace(LARGE, hidden=128)
    counted = per_gpu(c, student, teacher).loss
    mask = torch.ones(tokens, 1, dtype=torch.bool)

    def made(*shape):
        return (torch.randn(*shape) / 8).to(dtype)

    ledger = Ledger()
    inputs = [made(tokens, 1, 64), made(4096, 64), made(tokens, 1, 128), made(4096, 128)]
    if head == "logits":
        inputs = [made(tokens, 1, 4096), made(tokens, 1, 4096)]
        counted -= 2 * size * tokens * 4096  # the logits
    # What the trainer brings along: the teacher's hidden states and the wrapper's copies of the student's.
    counted -= tokens * (size * 128 + (4 + 2 if size == 2 else 0) * 64)
    for x in inputs[: 1 if head == "logits" else 2]:
        x.requires_grad_()
    with ledger:
        for x in inputs:
            x.detach()  # known from here on
        if head == "logits":
            whole = inputs[0].clone()
            before = ledger.reset()
            out = tsdkd_loss(whole, inputs[1], mask, c.objective, overwrite_student_logits=True)
        else:
            before = ledger.reset()
            out = tsdkd_loss_from_hidden(*inputs, mask, c.objective, vocab_size=4096)
        out.loss_sum.backward()
    measured = ledger.peak - before
    assert counted == pytest.approx(measured, rel=0.05), (counted, measured)


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
