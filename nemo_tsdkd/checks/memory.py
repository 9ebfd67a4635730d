"""Memory per GPU of a layout, by arithmetic: can this pair of models train on these GPUs?

docs/cluster.md derives each line. The figures are lower bounds of what a run needs (CUDA context, NCCL buffers and
fragmentation come on top: RESERVE), good for choosing a layout before a queue's night is spent on it. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.config.integers import ceil_div
from nemo_tsdkd.config.schema import TILE_LOGITS
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.layout import teacher_layout

GIB = 2**30
RESERVE = 6 * GIB  # CUDA context, NCCL and cuBLAS work space, fragmentation
BYTES_GRAD = 4
BYTES_OPTIMIZER = {2: 12, 4: 8}  # by a weight's bytes: two fp32 moments, and beside bf16 an fp32 master weight
# Bytes a layer's parameter of the copies that Transformer Engine keeps; for training transposed ones, too.
FP8_STUDENT, FP8_TEACHER = 2, 1


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by what holds them."""

    student_weights_and_grads: int
    student_optimizer: int
    teacher_weights: int  # without those that `teacher.offload_weights` loads for the teacher's pass only:
    offloaded_weights: int
    activations: int
    loss: int
    teacher_hidden: int
    kv_cache: int

    @property
    def resident(self) -> int:
        """Bytes that stay on the GPU for the run."""
        return self.student_weights_and_grads + self.student_optimizer + self.teacher_weights

    @property
    def peak(self) -> int:
        """Rollout, teacher's pass and update do not overlap: their tensors use the same memory in turn."""
        update = self.activations + self.loss + self.teacher_hidden
        return self.resident + max(self.kv_cache, self.offloaded_weights + self.teacher_hidden, update) + RESERVE

    @property
    def weights(self) -> int:
        """Weights, gradients and optimizer: a smaller batch does not lower them."""
        return self.resident + self.offloaded_weights


def per_gpu(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> Memory:
    """Memory on the fullest GPU of the student's for `config`'s layouts; with `teacher.nodes` the teacher's own GPUs
    hold `teacher_per_gpu`.

    Activations follow Korthikanti et al., 2022 (arXiv 2205.05198) with selective recompute (no score matrix is kept):
    recounted for grouped-query attention and a gated MLP. The first stage of a 1F1B pipeline holds PP micro-batches.
    """
    vocab = max(student.vocab, teacher.vocab)  # both models' embeddings get the larger width
    student, teacher = replace(student, vocab=vocab), replace(teacher, vocab=vocab)
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    params = student.params_per_gpu(tp, pp)
    tokens = config.data.seq_length * config.micro_batch_size // cp
    micro_batches = config.global_batch_size // (config.micro_batch_size * config.data_parallel_size)
    in_flight = min(pp, micro_batches)

    student_bytes, teacher_bytes = (4 if n == "fp32" else 2 for n in (config.precision.name, config.teacher.precision))

    # What a layer's backward pass reads, in elements a token. Always split over TP: q, k, v, the attention's output;
    # the MLP's halves and their product. Split by sequence parallelism only: inputs and outputs of two norms.
    split = 2 * student.q_width + 2 * student.kv_width + 3 * student.ffn
    whole = 4 * student.hidden
    layer = student_bytes * tokens * (split // tp + whole // (tp if p.sequence_parallel else 1))
    activations = student.layers // pp * in_flight * layer

    # In one layout a rank keeps what it computes, else its share of what it receives.
    hidden_shards = tp if p.sequence_parallel or not config.one_layout else 1
    hidden = teacher_bytes * tokens * teacher.hidden // hidden_shards
    teacher_hidden = hidden if config.teacher.offload_hidden_states else hidden * micro_batches

    prompts = ceil_div(config.global_batch_size, config.data_parallel_size * cp)  # of a step on one rank
    rows = min(config.rollout.batch_size, prompts) if config.rollout.lmbda > 0 else 0
    slots = config.data.seq_length * rows
    kv_cache = 2 * student_bytes * slots * student.kv_width * (student.layers // pp) // tp

    head = teacher.padded_vocab(tp) // tp * teacher.hidden * teacher_bytes  # the loss needs it: never offloaded
    if config.teacher.nodes:
        teacher_weights, offloaded = head, 0
    else:
        teacher_weights = _teacher_weights(config, teacher) + (0 if config.one_layout else head)
        offloaded = teacher_weights - head if config.teacher.offload_weights else 0
    fp8_copies = student.layer_params_per_gpu(tp, pp) * FP8_STUDENT if config.precision.name.startswith("fp8") else 0
    shards = config.data_parallel_size * cp
    return Memory(
        student_weights_and_grads=params * (student_bytes + BYTES_GRAD) + fp8_copies,
        student_optimizer=params * BYTES_OPTIMIZER[student_bytes] // shards,
        teacher_weights=teacher_weights - offloaded,
        offloaded_weights=offloaded,
        activations=activations,
        loss=_loss(config, tokens, student, teacher, student_bytes, teacher_bytes),
        teacher_hidden=teacher_hidden,
        kv_cache=kv_cache,
    )


def teacher_per_gpu(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> int:
    """Bytes on the fullest GPU of the teacher's own nodes: its weights and the hidden states of a step."""
    layout = teacher_layout(config)
    teacher = replace(teacher, vocab=max(student.vocab, teacher.vocab))
    rows = ceil_div(config.global_batch_size, layout.data)
    itemsize = 4 if config.teacher.precision == "fp32" else 2
    hidden = itemsize * rows * config.data.seq_length * teacher.hidden // layout.sequence_shards
    return _teacher_weights(config, teacher) + (0 if config.teacher.offload_hidden_states else hidden) + RESERVE


def _teacher_weights(config: TrainConfig, teacher: ModelShape) -> int:
    """Bytes of the teacher's fullest stage in its own layout; the loss has the head elsewhere if that differs."""
    layout, itemsize = config.teacher_parallel, 4 if config.teacher.precision == "fp32" else 2
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    weights = teacher.params_per_gpu(tp, pp) * itemsize
    if not config.one_layout and pp == 1 and not teacher.tied:
        weights -= teacher.padded_vocab(tp) // tp * teacher.hidden * itemsize
    if config.teacher.precision.startswith("fp8"):
        weights += teacher.layer_params_per_gpu(tp, pp) * FP8_TEACHER
    return weights


def _loss(
    config: TrainConfig, tokens: int, student: ModelShape, teacher: ModelShape, student_bytes: int, teacher_bytes: int
) -> int:
    """Bytes that the objective adds for a micro-batch of `tokens`."""
    tp = config.parallel.tensor_model_parallel_size
    columns = student.padded_vocab(tp) // tp
    tile = min(tokens * columns, config.objective.tile_logits or TILE_LOGITS["cuda"])
    both = student_bytes + teacher_bytes
    tiles = tile * (both + 4 * 4)  # logits of both models; four fp32 tensors while the loss is taken
    if config.objective.head == "logits":
        return tiles + both * tokens * columns  # logits of both models; the gradient takes the student's place
    # Whole rows of both models; the student's gradient in fp32 and a tile's share of it; the weight's gradient.
    rows = tokens * (teacher_bytes * teacher.hidden + (2 * student_bytes + 4) * student.hidden)
    return tiles + rows + student_bytes * columns * student.hidden
