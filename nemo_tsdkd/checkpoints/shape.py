"""A model's dimensions, read from a folder's config.json. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, is_nemo_checkpoint
from nemo_tsdkd.config.integers import round_up
from nemo_tsdkd.config.validation import UserError


@dataclass(frozen=True, kw_only=True)
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

    def stage_params(self, tp: int, pp: int, stage: int) -> int:
        """Parameters of a pipeline stage on one tensor-parallel rank (norms and biases counted as split)."""
        return self.layer_params_per_gpu(tp, pp) + self.tables(pp, stage) * self.table_params(tp)

    def tables(self, pp: int, stage: int) -> int:
        """How many of embedding and head a stage holds: if they are tied, both ends of a pipeline hold the one."""
        ends = (stage == 0) + (stage == pp - 1)
        return min(ends, 1) if self.tied else ends

    def table_params(self, tp: int) -> int:
        """Parameters of the embedding or of the head on one tensor-parallel rank."""
        return self.padded_vocab(tp) // tp * self.hidden

    def layer_params_per_gpu(self, tp: int, pp: int) -> int:
        return self.layers // pp * self.layer_params // tp

    @classmethod
    def of_folder(cls, folder: str | Path) -> ModelShape:
        """The shape of a Hugging Face folder, or of a NeMo checkpoint that keeps its source's config.json.

        Raises:
            UserError: no such file, or no such dimension in it.
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
            raise UserError(f"{path}: has no {error}, a model's dimension. Point at a Hugging Face folder.") from None


QWEN2_5 = {
    "1.5B": ModelShape(layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, vocab=151936, tied=True),
    "7B": ModelShape(layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064),
    "14B": ModelShape(layers=48, hidden=5120, heads=40, kv_heads=8, ffn=13824, vocab=152064),
    "32B": ModelShape(layers=64, hidden=5120, heads=40, kv_heads=8, ffn=27648, vocab=152064),
    "72B": ModelShape(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=29568, vocab=152064),
}


def padded_vocab_size(*vocab_sizes: int, tensor_model_parallel_size: int) -> int:
    """The common width of several models' embeddings: their largest, rounded up to 128 rows a tensor-parallel rank.

    The same width serves TP 1, 2, 4 and 8, so that a run resumes on another: flat optimizer state has no padding rows
    that could be cut or added.
    """
    rows = math.lcm(128 * 8, 128 * tensor_model_parallel_size)
    return round_up(max(vocab_sizes), rows)
