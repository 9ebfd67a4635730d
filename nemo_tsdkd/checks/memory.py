"""Memory per GPU of a layout, by arithmetic: can this pair of models train on these GPUs?

docs/cluster.md derives each line. The figures are lower bounds of what a run needs (CUDA context, NCCL buffers and
fragmentation come on top: RESERVE), good for choosing a layout before a queue's night is spent on it. No torch.
Layers are counted as Transformer Engine computes them on a GPU: flash attention, and norms inside the linear layers. A
teacher's router is taken to spread the tokens evenly over its experts; the metric teacher_expert_load shows how far it
does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.precision import pad_to_multiple, teacher_pad_to_multiple
from nemo_tsdkd.config.integers import ceil_div, round_up
from nemo_tsdkd.config.schema import TILE_LOGITS
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.layout import Layout, hidden_state_shards, student_layout, teacher_layout
from nemo_tsdkd.rollout.schedule import PREFILL_TOKENS

GIB = 2**30
RESERVE = 6 * GIB  # CUDA context, NCCL and cuBLAS work space, fragmentation
BYTES_GRAD = 4
BYTES_OPTIMIZER = {2: 12, 4: 8}  # by a weight's bytes: two fp32 moments, and beside bf16 an fp32 master weight
# Bytes a layer's parameter of the copies that Transformer Engine keeps; for training transposed ones, too.
FP8_STUDENT, FP8_TEACHER = 2, 1
LOSS_TILES = 6  # fp32 tensors of a tile's size while the loss's gradient is taken; compiled passes hold fewer


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU, by what holds them."""

    student_weights_and_grads: int
    student_optimizer: int
    teacher_weights: int  # without those that `teacher.offload_weights` loads for the teacher's pass only:
    offloaded_weights: int
    activations: int  # what the student keeps for its backward pass, of all micro-batches in flight
    backward: int  # of the layer whose backward pass runs, with what it computes a second time
    loss: int
    teacher_hidden: int  # of a step, until the loss has read it
    teacher_pass: int  # one forward pass, and the hidden states that it leaves
    kv_cache: int
    prefill: int  # one pass over prompts

    @property
    def resident(self) -> int:
        """Bytes that stay on the GPU for the run."""
        return self.student_weights_and_grads + self.student_optimizer + self.teacher_weights

    @property
    def rollout(self) -> int:
        return self.kv_cache + self.prefill

    @property
    def teacher(self) -> int:
        return self.offloaded_weights + self.teacher_pass

    @property
    def update(self) -> int:
        """The loss's tensors are free again when the last layer's backward pass begins."""
        return self.activations + max(self.loss, self.backward) + self.teacher_hidden

    @property
    def peak(self) -> int:
        """Rollout, teacher's pass and update do not overlap: their tensors use the same memory in turn."""
        return self.resident + max(self.rollout, self.teacher, self.update) + RESERVE

    @property
    def weights(self) -> int:
        """Weights, gradients and optimizer: a smaller batch does not lower them."""
        return self.resident + self.offloaded_weights


def per_gpu(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> Memory:
    """Memory on the fullest GPU of the student's for `config`'s layouts; with `teacher.nodes` the teacher's own GPUs
    hold `teacher_per_gpu`."""
    return max(per_stage(config, student, teacher), key=lambda memory: memory.peak)


def per_stage(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> list[Memory]:
    """Memory on a GPU of each pipeline stage of the student's; where the teacher's stages lie otherwise, on the GPU
    with the fullest of them."""
    vocab = max(student.vocab, teacher.vocab)  # both models' embeddings get the larger width
    student, teacher = replace(student, vocab=vocab), replace(teacher, vocab=vocab)
    return [_stage(config, student, teacher, stage) for stage in range(config.parallel.pipeline_model_parallel_size)]


def teacher_per_gpu(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> int:
    """Bytes on the fullest GPU of the teacher's own nodes: its weights and its pass over a step's rows."""
    teacher = replace(teacher, vocab=max(student.vocab, teacher.vocab))
    stages = range(teacher_layout(config).pipeline)
    held = max(_teacher_weights(config, teacher, s) + _teacher_held(config, teacher, s) for s in stages)
    return held + _teacher_forward(config, teacher) + RESERVE


def _stage(config: TrainConfig, student: ModelShape, teacher: ModelShape, stage: int) -> Memory:
    layout, itemsize, fp8 = student_layout(config), _itemsize(config.precision.name), config.precision.name[:3] == "fp8"
    tp, pp, cp = layout.tensor, layout.pipeline, layout.context
    last, layers, params = stage == pp - 1, student.layers // pp, student.stage_params(tp, pp, stage)
    fp8_copies = student.layer_params_per_gpu(tp, pp) * FP8_STUDENT if fp8 else 0

    tokens, step = _micro_batch(config) // cp, _padded(config) * config.global_batch_size // layout.data // cp
    in_flight = min((pp - stage) * tokens, step)  # 1F1B: as many micro-batches as stages from here on
    everything, kept = (_kept(student, layout, how, itemsize) for how in ("none", config.parallel.recompute))
    inputs = itemsize * student.hidden // layout.token_shards
    gradients = itemsize * _mlp_gradients(student, layout)

    slots = config.data.seq_length * min(config.rollout.batch_size, _prompts(config))

    hidden = _itemsize(config.teacher.precision) * step * teacher.hidden * cp // hidden_state_shards(config)
    hidden = hidden if last and not config.teacher.offload_hidden_states else 0
    weights, offloaded, teacher_pass = _teacher_on(config, teacher, stage, hidden)
    return Memory(
        student_weights_and_grads=params * (itemsize + BYTES_GRAD) + fp8_copies,
        student_optimizer=params * BYTES_OPTIMIZER[itemsize] // (layout.data * cp),
        teacher_weights=weights,
        offloaded_weights=offloaded,
        activations=in_flight * (layers * kept + inputs),
        backward=tokens * (everything - kept + gradients),
        loss=_loss(config, tokens, student, teacher) if last else 0,
        teacher_hidden=hidden,
        teacher_pass=teacher_pass,
        kv_cache=2 * itemsize * slots * student.kv_width * layers // tp,
        # The residual stream before and after a layer's halves, and the MLP's halves and their product.
        prefill=itemsize
        * min(max(PREFILL_TOKENS, config.data.seq_length), slots)
        * (5 * student.hidden + 3 * student.ffn // tp),
    )


def _prompts(config: TrainConfig) -> int:
    """Most prompts that one rank answers at a time: its share of a step's, or of the held-out ones."""
    ranks = config.data_parallel_size * config.parallel.context_parallel_size
    step = ceil_div(config.global_batch_size, ranks) if config.rollout.lmbda > 0 else 0
    if config.validation.path is None:
        return step
    held_out = config.validation.limit
    return max(step, ceil_div(held_out, ranks) if held_out else config.rollout.batch_size)


def _itemsize(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _padded(config: TrainConfig) -> int:
    """Tokens of the longest row."""
    return round_up(config.data.seq_length, pad_to_multiple(config, on_gpu=True))


def _micro_batch(config: TrainConfig) -> int:
    """Tokens of the student's largest micro-batch."""
    return max(config.micro_batch_tokens, config.micro_batch_size * _padded(config))


def _kept(shape: ModelShape, layout: Layout, recompute: str, itemsize: int) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Counted as Korthikanti et al., 2022 (arXiv 2205.05198) do, for grouped-query attention and a gated MLP. Split over
    tensor-parallel ranks: q, k, v, attention's output and an fp32 number a head; the MLP's two halves and their
    product. Split by sequence parallelism only: the inputs and outputs of two norms.
    """
    attention = (itemsize * (2 * shape.q_width + 2 * shape.kv_width) + 4 * shape.heads) // layout.tensor
    mlp, hidden = itemsize * 3 * shape.ffn // layout.tensor, itemsize * shape.hidden // layout.token_shards
    return {
        "none": attention + mlp + 4 * hidden,
        "selective": attention + 3 * hidden,  # the second norm's output is computed again with the MLP
        "full": hidden,
    }[recompute]


def _mlp_gradients(shape: ModelShape, layout: Layout) -> int:
    """Numbers a token by which an MLP's backward pass exceeds what its layer keeps: gradients of output and residual;
    and of the halves, or what the products read and write of all ranks under sequence parallelism."""
    half, gathered = shape.ffn // layout.tensor, shape.hidden if layout.sequence_parallel else 0
    # The activation's backward; the second product's; the first one's, when all that the MLP kept is free.
    return 2 * shape.hidden // layout.token_shards + max(2 * half, half + gathered, 2 * gathered - half)


def _teacher_on(config: TrainConfig, teacher: ModelShape, stage: int, hidden: int) -> tuple[int, int, int]:
    """(weights that stay, weights that come for the pass, the pass's tensors) on a GPU of a stage of the student's that
    keeps `hidden` bytes of hidden states."""
    layout, own = student_layout(config), teacher_layout(config)
    head = teacher.table_params(layout.tensor) * _itemsize(config.teacher.precision)  # the loss needs it: it stays
    head = head if stage == layout.pipeline - 1 else 0
    if config.teacher.nodes:
        return head, 0, hidden
    if config.one_layout:
        weights, forward = _teacher_weights(config, teacher, stage), _teacher_forward(config, teacher)
        offloaded = weights - head if config.teacher.offload_weights else 0
        return weights - offloaded, offloaded, forward + hidden
    ranks, per_stage_of_own = layout.world_size // layout.pipeline, own.world_size // own.pipeline
    stages = {rank // per_stage_of_own for rank in range(stage * ranks, (stage + 1) * ranks)}
    needs = [(_teacher_weights(config, teacher, s), _teacher_held(config, teacher, s)) for s in stages]
    weights, held = max(needs, key=sum)
    # First the pass fills the rank's own buffer; then the buffer's rows change ranks.
    teacher_pass = held + max(_teacher_forward(config, teacher), hidden)
    return (head, weights, teacher_pass) if config.teacher.offload_weights else (head + weights, 0, teacher_pass)


def _teacher_weights(config: TrainConfig, teacher: ModelShape, stage: int) -> int:
    """Bytes of a stage of the teacher in its own layout; the loss has the head elsewhere if that differs."""
    layout, itemsize = teacher_layout(config), _itemsize(config.teacher.precision)
    tp, pp = layout.tensor, layout.pipeline
    ep = config.teacher.parallel.expert_model_parallel_size
    weights = teacher.stage_params(tp, pp, stage, ep) * itemsize
    if not config.one_layout and stage == pp - 1 and not teacher.tied:
        weights -= teacher.table_params(tp) * itemsize
    if config.teacher.precision.startswith("fp8"):
        weights += teacher.layer_params_per_gpu(tp, pp, ep) * FP8_TEACHER
    return weights


def _teacher_held(config: TrainConfig, teacher: ModelShape, stage: int) -> int:
    """Bytes of hidden states that a stage's pass leaves before they go to the student's ranks."""
    layout = teacher_layout(config)
    if stage < layout.pipeline - 1 or config.teacher.offload_hidden_states:
        return 0
    rows = ceil_div(config.global_batch_size, layout.data)
    row = _itemsize(config.teacher.precision) * config.data.seq_length * teacher.hidden
    return rows * row // layout.sequence_shards


def _teacher_forward(config: TrainConfig, teacher: ModelShape) -> int:
    """Bytes of one forward pass without gradient: a layer's MLP, or its experts, is where it holds most."""
    layout = teacher_layout(config)
    if config.one_layout:
        tokens = min(_micro_batch(config), config.teacher.micro_batch_size * _padded(config))
    else:
        padded = round_up(config.data.seq_length, teacher_pad_to_multiple(config, on_gpu=True))
        tokens = config.teacher.micro_batch_size * padded
    itemsize, tokens = _itemsize(config.teacher.precision), tokens // layout.context
    if teacher.experts:
        tokens //= layout.token_shards  # as many as a rank sends, it gets if the routing is balanced
        routing = 5 * teacher.experts * teacher.layers // layout.pipeline  # every layer keeps an fp32 weight and a flag
        return tokens * (itemsize * _expert_numbers(teacher) + routing)
    ffn, whole, shard = teacher.ffn // layout.tensor, teacher.hidden, teacher.hidden // layout.token_shards
    gathered = whole if layout.sequence_parallel else 0  # the norm's output, of all ranks
    # Beside the stage's input, the layer's and attention's output: the first product, the activation, the second one.
    most = 3 * shard + max(shard + gathered + 2 * ffn, 3 * ffn, ffn + whole)
    return itemsize * tokens * most


def _expert_numbers(shape: ModelShape) -> int:
    """Numbers that a layer of experts holds for each token of a rank at most.

    The stage's input, the layer's input, attention's output and the norm's. Then for each expert of the token a copy as
    it is sent, as it arrives and sorted by expert; and beside these the first product and the activation, the
    activation and the second product, or the second product in the order of the experts and in that of the ranks.
    """
    hidden, ffn = shape.hidden, shape.expert_ffn
    return 4 * hidden + shape.experts_per_token * (3 * hidden + max(3 * ffn, ffn + hidden, 2 * hidden))


def _loss(config: TrainConfig, tokens: int, student: ModelShape, teacher: ModelShape) -> int:
    """Bytes that the objective adds for a micro-batch of `tokens` on a rank of the last stage."""
    layout = student_layout(config)
    student_bytes, teacher_bytes = _itemsize(config.precision.name), _itemsize(config.teacher.precision)
    columns = student.padded_vocab(layout.tensor) // layout.tensor
    tile = min(tokens * columns, config.objective.tile_logits or TILE_LOGITS["cuda"])
    # On the way to the heads: the teacher's hidden states; the student's, in fp32 as Megatron's wrapper gives them out
    # of a 16-bit model, and back.
    wrapped = student_bytes + 4 if student_bytes == 2 else 0
    rows = tokens * (teacher_bytes * teacher.hidden + wrapped * student.hidden) // layout.token_shards
    if config.objective.head == "logits":  # of both models; the gradient takes the student's place
        copies = sum(n for n in (student_bytes, teacher_bytes) if n == 2)  # a 16-bit tile is read into an fp32 one
        return rows + tile * (4 * LOSS_TILES + copies) + tokens * columns * (student_bytes + teacher_bytes)
    # Whole rows of both models; the student's gradient in fp32 and a tile's share of it; the weight's gradient.
    rows += tokens * (teacher_bytes * teacher.hidden + (2 * student_bytes + 4) * student.hidden)
    rounded = student_bytes if student_bytes == 2 else 0  # a tile's gradient as the products take it
    return rows + tile * (4 * LOSS_TILES + rounded) + student_bytes * columns * student.hidden
