"""Every key of a Hugging Face config.json, resolved: carried over, known to change nothing, or refused. No torch.

transformers ignores keys that it does not know. The imported model would then compute something else than the trained
one, and no comparison with transformers would show it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_tsdkd.config.validation import UserError

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_THETA = 10_000.0  # of all these architectures, in transformers 4 and 5

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_CARRIED_OVER = {
    *_REQUIRED,
    *"num_key_value_heads head_dim max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings".split(),
    *"model_type architectures dtype torch_dtype layer_types".split(),
    *"rope_theta rope_scaling rope_parameters partial_rotary_factor".split(),
}
# The only value that is supported; null means the same.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
# Text generation, training and bookkeeping: the logits do not depend on them.
_HARMLESS = set(
    "_name_or_path name_or_path transformers_version _commit_hash attn_implementation _attn_implementation "
    "_attn_implementation_autoset experts_implementation transformers.js_config "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
    "use_cache return_dict output_attentions output_hidden_states output_scores return_dict_in_generate torchscript "
    "use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder cross_attention_hidden_size "
    "finetuning_task id2label label2id num_labels task_specific_params problem_type gradient_checkpointing "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_version unsloth_fixed".split()
)
EXPERTS = ("num_experts", "num_local_experts")  # the number of experts, as transformers 4 and as 5 calls it
_SLIDING = frozenset({"sliding_window", "max_window_layers"})  # without effect: use_sliding_window, layer_types decide


@dataclass(frozen=True)
class Architecture:
    """The keys of config.json that one model_type may have besides those of all.

    Attributes:
        name: transformers' class.
        sizes: settings that must be whole numbers above 0.
        carried_over: other settings that the import reads.
        only: settings, each with the only supported value; null means the same.
        harmless: settings that the logits do not depend on.
    """

    name: str
    sizes: tuple[str, ...] = ()
    carried_over: frozenset[str] = frozenset()
    only: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()


# By model_type. To add one: CONTRIBUTING.md.
ARCHITECTURES = {
    "qwen2": Architecture("Qwen2ForCausalLM", only={"use_mrope": False}, harmless=_SLIDING),
    "qwen3": Architecture("Qwen3ForCausalLM", harmless=_SLIDING),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        sizes=("num_experts_per_tok", "moe_intermediate_size"),
        carried_over=frozenset({*EXPERTS, "norm_topk_prob"}),
        only={"mlp_only_layers": [], "decoder_sparse_step": 1},  # every layer is a mixture of experts
        harmless=_SLIDING | {"output_router_logits", "router_aux_loss_coef"},
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        only={"rope_interleaved": False},
        harmless=frozenset({"pretraining_tp", "max_sequence_length", "is_llama_config"}),  # tp: the order of sums only
    ),
}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's change of RoPE's frequencies; lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over whole heads: its base, and Llama 3.1's scaling or none."""

    theta: float
    scaling: Llama3Scaling | None = None


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if config.json holds a setting of the model's arithmetic that the import cannot carry over.

    Args:
        config: its content.
        path: the file, for messages.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type = {model_type!r}: must be one of {', '.join(ARCHITECTURES)}. "
            "Import other models with NeMo itself and give the NeMo checkpoint."
        )
    architecture = ARCHITECTURES[model_type]
    only = {**_ONLY, **architecture.only}
    known = _CARRIED_OVER | _HARMLESS | architecture.harmless | architecture.carried_over | {*architecture.sizes}
    for name, value in config.items():
        if name in only:
            _require(value is None or value == only[name], path, name, value, f"must be {json.dumps(only[name])}")
        elif name not in known:
            rule = f"not a setting of {model_type} that is known, and it may change what the model computes"
            fix = "Remove it if it does not, else choose a model without it."
            _require(value is None, path, name, value, rule, fix)
    for name in (*_REQUIRED, *architecture.sizes):
        _require_positive_integer(path, name, config.get(name))
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name) is not None:
            _require_positive_integer(path, name, config[name])
    _check_dtype_and_layers(config, path)
    if architecture.sizes:
        _check_router(config, path)
    rope(config, path)


def _check_dtype_and_layers(config: Mapping[str, Any], path: Path) -> None:
    written = {name: config[name] for name in ("dtype", "torch_dtype") if config.get(name) is not None}
    rule = f"must be one of {', '.join(_DTYPES)}"
    for name, value in (written or {"dtype": None}).items():
        _require(value in _DTYPES, path, name, value, rule, "Write the dtype of the model's weights.")
    _require(
        len(set(written.values())) < 2, path, "torch_dtype", config.get("torch_dtype"), "is not dtype", "Drop one."
    )
    expected = ARCHITECTURES[config["model_type"]].name
    found = config.get("architectures") or [expected]
    _require(expected in found, path, "architectures", found, f"must be [{expected!r}]", "Give the language model.")
    layers, full = config.get("layer_types"), ["full_attention"] * config["num_hidden_layers"]
    if isinstance(layers, list) and (other := [kind for kind in layers if kind != "full_attention"]):
        _require(False, path, "layer_types", other[0], "every layer must be full_attention")
    rule = f"must be a list of num_hidden_layers = {len(full)} names"
    _require(layers is None or layers == full, path, "layer_types", layers, rule, "Correct one of the two.")


def number_of_experts(config: Mapping[str, Any], path: Path) -> Any:
    """The number of experts in a layer, None without one. Raises UserError where two keys contradict."""
    found = [config[name] for name in EXPERTS if config.get(name) is not None]
    _require(len(set(found)) < 2, path, EXPERTS[1], found[-1:], f"is not {EXPERTS[0]}", "Drop one.")
    return found[0] if found else None


def _check_router(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where a mixture of experts' router asks for what Megatron's has not."""
    experts, chosen = number_of_experts(config, path), config["num_experts_per_tok"]
    _require_positive_integer(path, EXPERTS[0], experts)
    rule, normalized = f"must not exceed num_experts = {experts}", config.get("norm_topk_prob", False)
    _require(chosen <= experts, path, "num_experts_per_tok", chosen, rule, "Correct one of the two.")
    _require(isinstance(normalized, bool), path, "norm_topk_prob", normalized, "must be true or false", "Write one.")
    rule = "must be false with num_experts_per_tok = 1, or every weight would be 1"
    _require(chosen > 1 or not normalized, path, "norm_topk_prob", normalized, rule)


def rope(config: Mapping[str, Any], path: Path) -> Rope:
    """The rotary embedding of a config.json, in transformers 4's form (rope_theta, rope_scaling), in
    transformers 5's (rope_parameters), or in both where they agree.

    Raises:
        UserError: it is not RoPE's default or, for a Llama model, llama3 scaling.
    """
    settings = _rope_settings(config, path)

    def take(name: str, default: Any, ok: Callable[[Any], bool], rule: str) -> Any:
        place, value = settings.pop(name, (name, default))
        _require(ok(value), path, place, value, rule)
        return value

    allowed = ("default", "llama3") if config.get("model_type") == "llama" else ("default",)
    kind = take("rope_type", "default", lambda v: v in allowed, "must be default, or llama3 for a Llama model")
    theta = float(take("rope_theta", _DEFAULT_THETA, _positive, "must be a number above 0"))
    take("partial_rotary_factor", 1.0, lambda v: v == 1.0, "must be 1.0, the whole head is rotated")
    scaling = None
    if kind == "llama3":
        names = [field.name for field in fields(Llama3Scaling)]
        parts = {name: take(name, None, _positive, "llama3 scaling needs a number above 0") for name in names}
        scaling = Llama3Scaling(**parts)
        rule = f"must be above low_freq_factor = {scaling.low_freq_factor}"
        ok = scaling.high_freq_factor > scaling.low_freq_factor
        _require(ok, path, "high_freq_factor", scaling.high_freq_factor, rule, "Correct config.json.")
    for place, value in settings.values():
        _require(False, path, place, value, f"rope_type {kind} has no such setting")
    return Rope(theta, scaling)


def _rope_settings(config: Mapping[str, Any], path: Path) -> dict[str, tuple[str, Any]]:
    """RoPE's settings: the key that holds each, and its value. Two keys must not contradict."""
    written = [(name, name, config.get(name)) for name in ("rope_theta", "partial_rotary_factor")]
    for section in ("rope_scaling", "rope_parameters"):
        part = config.get(section) or {}
        _require(isinstance(part, dict), path, section, part, "must be an object or null", "Correct config.json.")
        written += [(f"{section}.{n}", "rope_type" if n == "type" else n, value) for n, value in part.items()]
    settings: dict[str, tuple[str, Any]] = {}
    for place, name, value in written:
        if value is not None:
            first, before = settings.setdefault(name, (place, value))
            _require(
                value == before, path, place, value, f"contradicts {first} = {before!r:.60}", "Remove one of them."
            )
    return settings


def _require_positive_integer(path: Path, name: str, value: Any) -> None:
    ok = isinstance(value, int) and _positive(value)
    _require(ok, path, name, value, "must be a whole number above 0", "Give a complete config.json.")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _require(ok: bool, path: Path, name: str, value: Any, rule: str, fix: str = "Choose a model without it.") -> None:
    if not ok:
        raise UserError(f"{path}: {name} = {value!r:.60}: {rule}. {fix}")
