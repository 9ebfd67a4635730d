"""A model's dimensions, read from a folder's config.json. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.hf_config import number_of_experts
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, is_nemo_checkpoint
from nemo_tsdkd.config.integers import round_up
from nemo_tsdkd.config.validation import UserError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a Qwen2-like decoder (RMS norm, gated MLP, grouped-query attention with QKV bias), or of one whose
    every MLP is a mixture of experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False  # the head is the embedding
    head_dim: int = 128
    experts: int = 0  # of a layer; 0: dense
    experts_per_token: int = 0
    expert_ffn: int = 0  # width of one expert

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        return self.shared_params + self.expert_params

    @property
    def shared_params(self) -> int:
        """Parameters of a layer that every token passes: attention, norms, and the MLP or the router."""
        qkv = (self.hidden + 1) * (self.q_width + 2 * self.kv_width)
        mlp = self.hidden * (self.experts or 3 * self.ffn)
        return qkv + self.hidden * self.q_width + mlp + 2 * self.hidden

    @property
    def expert_params(self) -> int:
        """Parameters of all experts of a layer."""
        return self.experts * 3 * self.hidden * self.expert_ffn

    def padded_vocab(self, tp: int) -> int:
        return padded_vocab_size(self.vocab, tensor_model_parallel_size=tp)

    def stage_params(self, tp: int, pp: int, stage: int, ep: int = 1) -> int:
        """Parameters of a pipeline stage on one tensor- and expert-parallel rank (norms, biases and routers counted as
        split)."""
        return self.layer_params_per_gpu(tp, pp, ep) + self.tables(pp, stage) * self.table_params(tp)

    def tables(self, pp: int, stage: int) -> int:
        """How many of embedding and head a stage holds: if they are tied, both ends of a pipeline hold the one."""
        ends = (stage == 0) + (stage == pp - 1)
        return min(ends, 1) if self.tied else ends

    def table_params(self, tp: int) -> int:
        """Parameters of the embedding or of the head on one tensor-parallel rank."""
        return self.padded_vocab(tp) // tp * self.hidden

    def layer_params_per_gpu(self, tp: int, pp: int, ep: int = 1) -> int:
        """Parameters of a stage's layers on one rank; experts are whole, tensor parallelism does not split them."""
        layers = self.layers // pp
        return layers * self.shared_params // tp + layers * self.expert_params // ep

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
                experts=number_of_experts(c, path) or 0,
                experts_per_token=c.get("num_experts_per_tok", 0),
                expert_ffn=c.get("moe_intermediate_size", 0),
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
_QWEN3_MOE = partial(ModelShape, kv_heads=4, vocab=151936, experts=128, experts_per_token=8)
QWEN3 = {
    "4B": ModelShape(layers=36, hidden=2560, heads=32, kv_heads=8, ffn=9728, vocab=151936, tied=True),
    "8B": ModelShape(layers=36, hidden=4096, heads=32, kv_heads=8, ffn=12288, vocab=151936),
    "30B-A3B": _QWEN3_MOE(layers=48, hidden=2048, heads=32, ffn=6144, expert_ffn=768),
    "235B-A22B": _QWEN3_MOE(layers=94, hidden=4096, heads=64, ffn=12288, expert_ffn=1536),
}


def padded_vocab_size(*vocab_sizes: int, tensor_model_parallel_size: int) -> int:
    """The common width of several models' embeddings: their largest, rounded up to 128 rows a tensor-parallel rank.

    The same width serves TP 1, 2, 4 and 8, so that a run resumes on another: flat optimizer state has no padding rows
    that could be cut or added.
    """
    rows = math.lcm(128 * 8, 128 * tensor_model_parallel_size)
    return round_up(max(vocab_sizes), rows)
