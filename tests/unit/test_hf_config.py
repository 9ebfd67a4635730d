"""Every key of a config.json is carried over, known to change nothing, or refused by its name."""

import json
from pathlib import Path

import pytest

from nemo_tsdkd.checkpoints.hf_config import Llama3Scaling, Rope, check_config, rope
from nemo_tsdkd.checkpoints.transformers5 import transformers4_folder
from nemo_tsdkd.config.validation import UserError

DATA = Path(__file__).parents[1] / "data" / "transformers5"
PATH = Path("model/config.json")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SIZES = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
# The settings beside the sizes, as the named models publish them.
PUBLISHED = {
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
    },
    "DeepSeek-R1-Distill-Qwen": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 10000,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "model_type": "qwen3",
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "bfloat16",
    },
    "Llama-3.1": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"],
        "is_llama_config": True,
        "model_type": "llama",
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 130000,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"dtype": "q4"},
    },
}
ROPES = {
    "Qwen2.5-7B-Instruct": Rope(1e6),
    "DeepSeek-R1-Distill-Qwen": Rope(1e4),
    "Qwen3-8B": Rope(1e6),
    "Qwen3-30B-A3B": Rope(1e6),
    "Llama-3.1": Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "SmolLM2": Rope(130000.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    config = PUBLISHED[name] | SIZES
    check_config(config, PATH)
    assert rope(config, PATH) == ROPES[name]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_what_either_transformers_writes_by_default_is_read(model_type):
    from transformers import AutoConfig

    written = json.loads(AutoConfig.for_model(model_type, **SIZES, dtype="bfloat16").to_json_string(use_diff=False))
    check_config(written, PATH)
    check_config(json.loads((DATA / model_type / "config.json").read_text()), PATH)


QWEN = {"model_type": "qwen2", "torch_dtype": "bfloat16", **SIZES}
LLAMA = QWEN | {"model_type": "llama"}
MOE = SIZES | PUBLISHED["Qwen3-30B-A3B"]


def scaled(rope_type, **settings):
    return {"rope_type": rope_type, "rope_theta": 5e5, **settings}


REFUSED = {
    "unknown": (QWEN | {"logit_scale": 0.5}, "logit_scale = 0.5: not a setting of qwen2"),
    "unknown and false": (QWEN | {"norm_after": False}, "norm_after = False"),
    "of another architecture": (QWEN | {"pretraining_tp": 2}, "pretraining_tp = 2: not a setting of qwen2"),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    "dense layers among experts": (MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers = [0]: must be []"),
    "experts in each second layer": (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: must be 1"),
    "no number of experts": (
        {k: v for k, v in MOE.items() if k != "num_experts"},
        "num_experts = None: must be a whole",
    ),
    "more experts than there are": (
        MOE | {"num_experts": 4},
        "num_experts_per_tok = 8: must not exceed num_experts = 4",
    ),
    "one weight of one": (
        MOE | {"num_experts_per_tok": 1},
        "norm_topk_prob = True: must be false with num_experts_per",
    ),
    "two numbers of experts": (MOE | {"num_local_experts": 64}, "num_local_experts = [64]: is not num_experts"),
    "no answer": (MOE | {"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes': must be true or false"),
    "experts of a dense model": (QWEN | {"num_experts": 8}, "num_experts = 8: not a setting of qwen2"),
    "chunks": (QWEN | {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
    "activation": (QWEN | {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be \"silu\""),
    "output bias": (LLAMA | {"attention_bias": True}, "attention_bias = True: must be false"),
    "both ways": (LLAMA | {"is_causal": False}, "is_causal = False: must be true"),
    "dropout": (QWEN | {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "sliding window": (QWEN | {"use_sliding_window": True}, "use_sliding_window = True"),
    "sliding layers": (
        QWEN | {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "layer_types = 'sliding_attention': every layer must be full_attention",
    ),
    "too few layers": (QWEN | {"layer_types": ["full_attention"]}, "num_hidden_layers = 28"),
    "layers no list": (QWEN | {"layer_types": 3}, "layer_types = 3"),
    "partial": (QWEN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1.0"),
    "partial, nested": (
        QWEN | {"rope_parameters": scaled("default", partial_rotary_factor=0.25)},
        "rope_parameters.partial_rotary_factor = 0.25",
    ),
    "multi-axis": (QWEN | {"use_mrope": True}, "use_mrope = True"),
    "interleaved": (LLAMA | {"rope_interleaved": True}, "rope_interleaved = True"),
    "yarn": (QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type = 'yarn'"),
    "yarn of 5": (QWEN | {"rope_parameters": scaled("yarn", factor=4.0)}, "rope_parameters.rope_type = 'yarn'"),
    "linear": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
    "dynamic": (LLAMA | {"rope_scaling": scaled("dynamic", factor=2.0)}, "'dynamic'"),
    "longrope": (LLAMA | {"rope_parameters": scaled("longrope")}, "'longrope'"),
    "llama3 in Qwen": (QWEN | {"rope_scaling": scaled("llama3", **LLAMA3)}, "rope_scaling.rope_type = 'llama3'"),
    "llama3, incomplete": (
        LLAMA | {"rope_parameters": scaled("llama3", factor=8.0)},
        "low_freq_factor = None: llama3 scaling needs",
    ),
    "llama3, no band": (
        LLAMA | {"rope_parameters": scaled("llama3", **LLAMA3 | {"high_freq_factor": 1.0})},
        "high_freq_factor = 1.0: must be above",
    ),
    "llama3 and more": (
        LLAMA | {"rope_scaling": scaled("llama3", **LLAMA3, attention_factor=2.0)},
        "rope_scaling.attention_factor = 2.0",
    ),
    "per layer type": (QWEN | {"rope_parameters": {"full_attention": scaled("default")}}, "full_attention"),
    "sections": (QWEN | {"rope_scaling": scaled("default", mrope_section=[16, 24, 24])}, "mrope_section"),
    "two bases": (
        QWEN | {"rope_theta": 10000.0, "rope_parameters": scaled("default")},
        "rope_parameters.rope_theta = 500000.0: contradicts rope_theta = 10000.0",
    ),
    "two kinds": (
        LLAMA | {"rope_scaling": {"type": "linear"}, "rope_parameters": scaled("default")},
        "rope_parameters.rope_type = 'default': contradicts rope_scaling.type = 'linear'",
    ),
    "base as text": (QWEN | {"rope_theta": "1e6"}, "rope_theta = '1e6'"),
    "scaling no object": (QWEN | {"rope_scaling": [1]}, "rope_scaling = [1]"),
    "no dtype": ({k: v for k, v in QWEN.items() if k != "torch_dtype"}, "dtype = None"),
    "fp8": (QWEN | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype = 'float8_e4m3fn'"),
    "two dtypes": (QWEN | {"dtype": "float32"}, "torch_dtype = 'bfloat16': is not dtype"),
    "a classifier": (QWEN | {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures"),
    "no size": (QWEN | {"hidden_size": None}, "hidden_size = None"),
    "size as text": (QWEN | {"vocab_size": "152064"}, "vocab_size = '152064'"),
    "model type no name": (QWEN | {"model_type": ["qwen2"]}, "model_type = ['qwen2']"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_models_cannot_do_is_refused_by_its_name(kind):
    config, reason = REFUSED[kind]
    with pytest.raises(UserError) as error:
        check_config(config, PATH)
    assert reason in str(error.value) and str(error.value).startswith("model/config.json: ")
    assert len(str(error.value)) < 3 * 100, "three lines"


def test_null_is_the_default():
    nothing = dict.fromkeys(["unknown", "rope_scaling", "rope_theta", "rope_parameters", "layer_types", "hidden_act"])
    check_config(QWEN | nothing, PATH)
    assert rope(QWEN | nothing, PATH) == Rope(1e4)


def test_both_forms_may_stand_together_where_they_agree():
    both = {"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": scaled("default")}
    assert rope(QWEN | both, PATH) == Rope(5e5)


def test_a_folder_of_transformers_4_is_read_in_its_place(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with transformers4_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_a_translation_leaves_the_folder_as_it_was(tmp_path):
    config = LLAMA | {"rope_parameters": scaled("llama3", **LLAMA3)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with transformers4_folder(tmp_path) as folder:
        translated = json.loads((folder / "config.json").read_text())
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert translated == LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"} and not folder.exists()
