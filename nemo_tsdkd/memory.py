"""Memory per GPU of a layout, by arithmetic: can this pair of models train on these GPUs?

docs/cluster.md derives each line. The figures are lower bounds of what a run needs (CUDA context, NCCL buffers and
fragmentation come on top: RESERVE), good for choosing a layout before a queue's night is spent on it. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_tsdkd.config import TILE_LOGITS, TrainConfig
from nemo_tsdkd.folders import HF_ASSETS, is_nemo_checkpoint, read_json

GIB = 2**30
RESERVE = 6 * GIB  # CUDA context, NCCL and cuBLAS work space, fragmentation
BYTES_GRAD = 4
BYTES_OPTIMIZER = {2: 12, 4: 8}  # by a weight's bytes: two fp32 moments, and beside bf16 an fp32 master weight
# Bytes a layer's parameter of the copies that Transformer Engine keeps; for training transposed ones, too.
FP8_STUDENT, FP8_TEACHER = 2, 1


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a Qwen2-like decoder (RMS norm, gated MLP, grouped-query attention with QKV bias)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False  # the head is the embedding
    head_dim: int = 128

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        qkv = (self.hidden + 1) * (self.q_width + 2 * self.kv_width)
        return qkv + self.hidden * self.q_width + 3 * self.hidden * self.ffn + 2 * self.hidden

    def padded_vocab(self, tp: int) -> int:
        return padded_vocab_size(self.vocab, tensor_model_parallel_size=tp)

    def params_per_gpu(self, tp: int, pp: int) -> int:
        """Parameters of the fullest pipeline stage on one tensor-parallel rank (norms and biases counted as split)."""
        table = self.padded_vocab(tp) * self.hidden
        tables = 2 * table if pp == 1 and not self.tied else table  # PP > 1: the embedding or the head, not both
        return self.layer_params_per_gpu(tp, pp) + tables // tp

    def layer_params_per_gpu(self, tp: int, pp: int) -> int:
        return self.layers // pp * self.layer_params // tp

    @classmethod
    def of_folder(cls, folder: str | Path) -> ModelShape:
        """The shape of a Hugging Face folder, or of a NeMo checkpoint that keeps its source's config.json.

        Raises:
            ValueError: no such file, or no such dimension in it.
        """
        path = Path(folder, HF_ASSETS if is_nemo_checkpoint(Path(folder)) else "", "config.json")
        try:
            c = read_json(path)
            return cls(
                layers=c["num_hidden_layers"],
                hidden=c["hidden_size"],
                heads=c["num_attention_heads"],
                kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
                head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
                ffn=c["intermediate_size"],
                vocab=c["vocab_size"],
                tied=c.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise ValueError(f"{path}: has no {error}, a model's dimension. Point at a Hugging Face folder.") from None


QWEN2_5 = {
    "1.5B": ModelShape(28, 1536, 12, 2, 8960, 151936, tied=True),
    "7B": ModelShape(28, 3584, 28, 4, 18944, 152064),
    "14B": ModelShape(48, 5120, 40, 8, 13824, 152064),
    "32B": ModelShape(64, 5120, 40, 8, 27648, 152064),
    "72B": ModelShape(80, 8192, 64, 8, 29568, 152064),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by what holds them."""

    student_weights_and_grads: int
    student_optimizer: int
    teacher_weights: int  # without those that `teacher.park` brings back for the teacher's pass alone:
    parked_weights: int
    activations: int
    loss: int
    teacher_hidden: int
    kv_cache: int

    @property
    def resident(self) -> int:
        """What stays on the GPU for the whole run."""
        return self.student_weights_and_grads + self.student_optimizer + self.teacher_weights

    @property
    def peak(self) -> int:
        """The three acts do not overlap: KV cache, parked weights and the update's tensors share the same room."""
        update = self.activations + self.loss + self.teacher_hidden
        return self.resident + max(self.kv_cache, self.parked_weights + self.teacher_hidden, update) + RESERVE

    @property
    def weights(self) -> int:
        """Weights, gradients and optimizer: what no smaller batch lowers."""
        return self.resident + self.parked_weights


def per_gpu(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> Memory:
    """Memory on the fullest GPU for `config`'s layout.

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

    hidden = teacher_bytes * tokens * teacher.hidden // (tp if p.sequence_parallel else 1)
    teacher_hidden = hidden * micro_batches if config.teacher.offload == "none" else hidden

    slots = config.data.seq_length * config.rollout.batch_size if config.rollout.lmbda > 0 else 0
    kv_cache = 2 * student_bytes * slots * student.kv_width * (student.layers // pp) // tp

    teacher_weights = teacher.params_per_gpu(tp, pp) * teacher_bytes
    if config.teacher.precision.startswith("fp8"):
        teacher_weights += teacher.layer_params_per_gpu(tp, pp) * FP8_TEACHER
    head = teacher.padded_vocab(tp) // tp * teacher.hidden * teacher_bytes  # the loss needs it: never parked
    parked = teacher_weights - head if config.teacher.park else 0
    fp8_copies = student.layer_params_per_gpu(tp, pp) * FP8_STUDENT if config.precision.name.startswith("fp8") else 0
    shards = config.data_parallel_size * cp
    return Memory(
        student_weights_and_grads=params * (student_bytes + BYTES_GRAD) + fp8_copies,
        student_optimizer=params * BYTES_OPTIMIZER[student_bytes] // shards,
        teacher_weights=teacher_weights - parked,
        parked_weights=parked,
        activations=activations,
        loss=_loss(config, tokens, student, teacher, student_bytes, teacher_bytes),
        teacher_hidden=teacher_hidden,
        kv_cache=kv_cache,
    )


def _loss(
    config: TrainConfig, tokens: int, student: ModelShape, teacher: ModelShape, student_bytes: int, teacher_bytes: int
) -> int:
    """Bytes of the objective over a micro-batch of `tokens`, beside the models' own activations."""
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


def padded_vocab_size(*vocab_sizes: int, tensor_model_parallel_size: int) -> int:
    """The common width of several models' embeddings: their largest, rounded up to 128 rows a tensor-parallel rank.

    The same width serves TP 1, 2, 4 and 8, so that a run resumes on another: flat optimizer state has no padding rows
    that could be cut or added.
    """
    rows = math.lcm(128 * 8, 128 * tensor_model_parallel_size)
    return -(-max(vocab_sizes) // rows) * rows
