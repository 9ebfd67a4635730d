"""Folders that transformers 5 writes, held to logits that transformers 5 itself computed (tests/data/transformers5)."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from hashed_weights import hashed_weights
from safetensors.torch import load_file, save_file

from nemo_tsdkd.checkpoints.manifest import MANIFEST

DATA = Path(__file__).parents[1] / "data" / "transformers5"
MODELS = ("qwen2", "qwen3", "qwen3_moe", "llama")  # the last with llama3 scaling and a tied head
# What transformers 5.24 wrote of a tokenizer that transformers 4 had saved: without these keys it is tiny_hf's.
TOKENIZER = {
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "qwen3": {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]},
    "qwen3_moe": {"tokenizer_class": "Qwen2Tokenizer"},
    "llama": {"tokenizer_class": "TokenizersBackend"},
}


def write(folder: Path, model_type: str) -> Path:
    """The whole Hugging Face folder whose config.json and logits are committed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_hf.save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder")
    settings |= {"backend": "tokenizers", "is_local": True, "local_files_only": False} | TOKENIZER[model_type]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(DATA / model_type / "config.json", folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_experts = getattr(config, "num_local_experts", 0)  # of which transformers 4 knows nothing
    model = AutoModelForCausalLM.from_config(config)
    weights = hashed_weights({name: tuple(p.shape) for name, p in model.named_parameters()})
    save_file(
        {name: torch.from_numpy(w) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By model type: the folder and its import."""
    root, made = tmp_path_factory.mktemp("transformers5"), {}

    def make(model_type):
        if model_type not in made:
            source = write(root / f"{model_type}_hf", model_type)
            ranks.run_ranks(tiny_run.import_hf, 1, source, root / model_type, meet=False)
            made[model_type] = source, root / model_type
        return made[model_type]

    return make


def megatron_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    from megatron_chunk import build

    with torch.no_grad():
        return build(checkpoint).eval()(tokens[None], torch.arange(len(tokens))[None], None)[0]


@pytest.mark.parametrize("model_type", MODELS)
def test_an_imported_model_computes_what_transformers_5_does(model_type, folders):
    stored = load_file(DATA / model_type / "logits.safetensors")
    got = ranks.run_ranks(megatron_logits, 1, folders(model_type)[1], stored["tokens"])[0]
    expected = stored["logits"]
    torch.testing.assert_close(got[-len(expected) :], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("model_type", MODELS)
def test_an_export_is_what_transformers_5_wrote(model_type, folders, tmp_path):
    source, checkpoint = folders(model_type)
    ranks.run_ranks(tiny_run.export, 1, checkpoint, "nemo", tmp_path / "nemo", meet=False)
    ranks.run_ranks(tiny_run.export, 1, tmp_path / "nemo", "hf", tmp_path / "hf", meet=False)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {p.name for p in source.iterdir()} | {
        "generation_config.json",
        MANIFEST,
    }
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    back, weights = load_file(tmp_path / "hf" / "model.safetensors"), load_file(source / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_installed_transformers_reads_the_translation_as_transformers_5_does(model_type, folders, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_tsdkd.checkpoints.transformers5 import transformers4_folder

    source, checkpoint = folders(model_type)
    stored = load_file(DATA / model_type / "logits.safetensors")
    with transformers4_folder(source) as folder, torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(folder)(stored["tokens"][None]).logits[0]
        tokenizers = [AutoTokenizer.from_pretrained(f) for f in (folder, checkpoint / "context" / "huggingface")]
    expected = stored["logits"]
    torch.testing.assert_close(got[-len(expected) :], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    tiny_hf.save_tokenizer(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Ann has 3 boxes: 箱が三つ"}]
    for tokenizer in tokenizers:
        assert tokenizer.apply_chat_template(messages) == plain.apply_chat_template(messages)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (plain.eos_token_id, plain.pad_token_id)
        assert tokenizer.get_vocab() == plain.get_vocab()


def import_misread(source: Path, output: Path) -> str:
    """Import with a reading of the rotary base that is wrong, as where `rope_parameters` is passed over."""
    from nemo_tsdkd.checkpoints import hf_config, transformers5
    from nemo_tsdkd.megatron.checkpoints import hf

    hf.rope = transformers5.rope = lambda *_: hf_config.Rope(10000.0)
    try:
        tiny_run.import_hf(source, output)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_the_comparison_of_logits_does_not_share_the_imports_reading(model_type, folders, tmp_path):
    message = ranks.run_ranks(import_misread, 1, folders(model_type)[0], tmp_path / "nemo", meet=False)[0]
    assert "logits differ" in message
