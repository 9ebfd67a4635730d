"""Dry runs for tests: models that are a config.json, and ranks that run for real what a dry run fakes."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.config.train_config import TrainConfig


def write_config(folder: Path, shape: ModelShape) -> Path:
    """A Hugging Face folder of a model of this shape, without weights: Qwen2 where heads fill the hidden size, else
    Qwen3, or Qwen3-MoE with experts."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }
    if shape.head_dim * shape.heads != shape.hidden or shape.experts:
        fields |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": shape.head_dim}
    if shape.experts:
        fields |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def dry(config: TrainConfig, rank: int, vocabulary: int, **settings: Any) -> dict[str, Any]:
    """`dry_run` in this process, which must be a rank of its own (`run_ranks(dry, 1, ..., meet=False)`)."""
    from nemo_tsdkd.plan.request import Request

    return dry_request(Request(config, rank, vocabulary, **settings))


def dry_request(request: Any) -> dict[str, Any]:
    """The same of a `Request`."""
    from nemo_tsdkd.megatron.dry_run.run import dry_run

    return vars(dry_run(request))


def real(config: TrainConfig, vocabulary: int, watch: bool = False) -> dict[str, Any]:
    """What this rank of a gloo job does, on tensors that have memory and in all micro-batches; its `rss_rise` is how
    much the process grew at most in the second step."""
    import torch.distributed as dist

    from nemo_tsdkd.distributed.job import Job
    from nemo_tsdkd.megatron.dry_run import run
    from nemo_tsdkd.plan.request import Request

    config = run.as_on_gpu(config)
    rank = dist.get_rank()
    rise = _Rise() if watch else None
    if rise:
        begin = run._Steps.on_train_batch_start
        run._Steps.on_train_batch_start = lambda *args: (begin(*args), rise.begin())
    job = Job(rank, dist.get_world_size(), dist.group.WORLD)
    result = vars(run.observed(config, Request(config, rank, vocabulary), job))
    return result | {"rss_rise": rise.bytes if rise else 0}


class _Rise:
    """Most bytes that this process has held since `begin`, beyond what it held then: by the operating system."""

    def begin(self) -> None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD, which else grows: the allocator would keep what is freed
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        self._before = self._status()["VmRSS"]

    @property
    def bytes(self) -> int:
        return self._status()["VmHWM"] - self._before

    def _status(self) -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
