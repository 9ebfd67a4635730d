"""Writes the folders beside it: a config.json as transformers 5 writes it, and the logits that transformers 5 computes.

Run it where transformers 5 is installed, which this project's own environment does not hold:

    pip install torch==2.13.0 transformers==5.24.0 safetensors numpy
    python tests/data/transformers5/write.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from hashed_weights import hashed_tokens, hashed_weights  # noqa: E402

TOKENS, KEPT = 96, 8  # length of the text; its last positions, whose logits are kept: RoPE shows most in them
SIZES = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1000000.0}
MODELS = {
    "qwen2": {"rope_parameters": DEFAULT},
    "qwen3": {"rope_parameters": DEFAULT, "head_dim": 16},
    "qwen3_moe": {
        **{"rope_parameters": DEFAULT, "head_dim": 16, "norm_topk_prob": True},
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    },
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}


def stored(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of one of the model's parameters, which holds all experts of a layer."""
    prefix, _, part = name.partition(".experts.")
    if not part:
        return {name: shape}
    experts, rows, columns = shape
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    return {f"{prefix}.experts.{e}.{n}.weight": (rows // len(names), columns) for e in range(experts) for n in names}


def main() -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    assert int(transformers.__version__.split(".")[0]) >= 5, transformers.__version__
    for model_type, settings in MODELS.items():
        config = transformers.AutoConfig.for_model(model_type, **SIZES, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        shapes = {}
        for name, tensor in model.named_parameters():
            shapes |= stored(name, tuple(tensor.shape))
        with TemporaryDirectory() as folder:  # on the disk each expert's tensors have their own names
            config.save_pretrained(folder)
            weights = {name: torch.from_numpy(w) for name, w in hashed_weights(shapes).items()}
            save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})
            model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        model.eval()
        tokens = torch.from_numpy(hashed_tokens(TOKENS, SIZES["vocab_size"]))[None]
        with torch.no_grad():
            logits = model(tokens).logits[0, -KEPT:].contiguous()
        model.config.save_pretrained(HERE / model_type)
        save_file({"tokens": tokens[0], "logits": logits}, HERE / model_type / "logits.safetensors")


if __name__ == "__main__":
    main()
