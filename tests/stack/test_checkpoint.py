"""Hugging Face -> NeMo -> Hugging Face: the same logits everywhere, whatever layout held the weights in between."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from megatron_chunk import build

TEXT = "Ann has 3 boxes with 12 eggs each."
MODELS = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tied": True},
    "qwen2_tied_bf16": {"model_type": "qwen2", "tied": True, "dtype": "bfloat16"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "llama": {"model_type": "llama"},
    "llama3_tied": {
        "model_type": "llama",
        "tied": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}
VOCAB_SIZE = 330  # what save_hf gives a model
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp2_pp2": (2, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each model its Hugging Face folder and its import, made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name):
        if name not in made:
            hf = tiny_hf.save_hf(root / f"{name}_hf", **MODELS[name])
            if name == "llama":  # as some are published; transformers reads such a file, but refuses to write it
                generation = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}
                (hf / "generation_config.json").write_text(json.dumps(generation))
            ranks.run_ranks(tiny_run.import_hf, 1, hf, root / name, meet=False)
            made[name] = hf, root / name
        return made[name]

    return make


def hf_logits(folder: Path) -> torch.Tensor:
    """Logits `[1, S, V]` as any user of the folder would compute them, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


def reshard(checkpoint: Path, tp: int, pp: int, padded: int, output: Path) -> torch.Tensor | None:
    """Load a checkpoint into a layout, save it from there as a trainer would, and return the layout's logits."""
    from megatron.core import dist_checkpointing

    gpt = build(checkpoint, tp, pp, vocab_size=padded)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(checkpoint / "context", output / "context")
        (output / "weights").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(gpt.sharded_state_dict(prefix="module."), str(output / "weights"))
    return layout_logits(gpt, checkpoint)


def layout_logits(gpt, checkpoint: Path) -> torch.Tensor | None:
    """Logits `[1, S, V]` in fp32, on the ranks of the last stage."""
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from transformers import AutoTokenizer

    from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS

    tokens = AutoTokenizer.from_pretrained(checkpoint / HF_ASSETS)(TEXT, return_tensors="pt").input_ids
    positions = torch.arange(tokens.shape[1])[None]
    gpt.float().config.params_dtype = gpt.config.pipeline_dtype = torch.float32

    def forward_step(_, model):
        def gather(logits, non_loss_data=True):
            return tensor_parallel.gather_from_tensor_model_parallel_region(logits).clone()

        return model(tokens, positions, None), gather

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=gpt,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0] if gpt.post_process else None


def plain_nemo_logits(checkpoint: Path) -> torch.Tensor:
    """Logits of a NeMo checkpoint loaded by NeMo alone, from its context."""
    from nemo.lightning import io

    from nemo_tsdkd.megatron.gpt import unwrap

    model, _ = io.ModelConnector().nemo_load(checkpoint)
    assert type(model).__module__.startswith("nemo.collections.llm")
    assert not any("nemo_tsdkd" in p.read_text() for p in (checkpoint / "context").glob("*.*"))
    return layout_logits(unwrap(model.module), checkpoint)


def assert_equal_up_to_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_an_import_and_its_export_are_the_source(name, folders, tmp_path):
    from safetensors.torch import load_file

    hf, nemo = folders(name)
    ranks.run_ranks(tiny_run.export, 1, nemo, "hf", tmp_path / "hf", meet=False)
    source, back = load_file(hf / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert source.keys() == back.keys()
    assert all(torch.equal(source[key], back[key]) and source[key].dtype == back[key].dtype for key in source)
    if (hf / "generation_config.json").is_file():
        assert (tmp_path / "hf" / "generation_config.json").read_bytes() == (hf / "generation_config.json").read_bytes()


def export_from_meta(checkpoint: Path, to: str, output: Path) -> None:
    """As where Transformer Engine is: NeMo then builds the layers on the meta device."""
    from nemo.collections import llm

    configure = llm.GPTModel.configure_model

    def configure_on_meta(self, *args):
        configure(self, *args)
        self.module.decoder.to("meta")

    llm.GPTModel.configure_model = configure_on_meta
    tiny_run.export(checkpoint, to, output)


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_layers_built_on_the_meta_device_get_their_weights(to, folders, tmp_path):
    hf, nemo = folders("qwen2_tied_bf16")
    ranks.run_ranks(export_from_meta, 1, nemo, to, tmp_path / to, meet=False)
    got = (
        hf_logits(tmp_path / to) if to == "hf" else ranks.run_ranks(plain_nemo_logits, 1, tmp_path / to, meet=False)[0]
    )
    assert_equal_up_to_rounding(got[..., :VOCAB_SIZE], hf_logits(hf))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied"])
def test_logits_agree_between_source_layout_nemo_and_hf(name, layout, folders, tmp_path):
    hf, nemo = folders(name)
    tp, pp = LAYOUTS[layout]
    in_layout = ranks.run_ranks(reshard, tp * pp, nemo, tp, pp, 512, tmp_path / "trained")[-1]
    ranks.run_ranks(tiny_run.export, 1, tmp_path / "trained", "nemo", tmp_path / "nemo", meet=False)
    ranks.run_ranks(tiny_run.export, 1, tmp_path / "trained", "hf", tmp_path / "hf", meet=False)
    expected = hf_logits(hf)
    assert in_layout.shape[-1] == 512 and expected.shape[-1] == VOCAB_SIZE
    assert_equal_up_to_rounding(in_layout[..., :VOCAB_SIZE], expected)
    assert not in_layout[..., VOCAB_SIZE:].any(), "padding rows are zero"
    assert_equal_up_to_rounding(ranks.run_ranks(plain_nemo_logits, 1, tmp_path / "nemo", meet=False)[0], expected)
    assert_equal_up_to_rounding(hf_logits(tmp_path / "hf"), expected)


def fp32_logits(checkpoint: Path) -> torch.Tensor:
    gpt = build(checkpoint, params_dtype=torch.float32, bf16=False)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    return layout_logits(gpt, checkpoint)


def test_bf16_weights_are_loaded_into_an_fp32_model_exactly(folders):
    hf, nemo = folders("qwen2_tied_bf16")
    assert_equal_up_to_rounding(ranks.run_ranks(fp32_logits, 1, nemo)[0], hf_logits(hf))


def test_an_export_is_a_complete_hugging_face_folder(folders, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    hf, nemo = folders("qwen2_tied_bf16")
    ranks.run_ranks(tiny_run.export, 1, nemo, "hf", tmp_path / "hf", meet=False)
    source, back = AutoTokenizer.from_pretrained(hf), AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": TEXT}]
    assert back.apply_chat_template(messages) == source.apply_chat_template(messages)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").to_dict() == GenerationConfig.from_pretrained(hf).to_dict()
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "hf", hf)]
    assert configs[0] | {"_name_or_path": None} == configs[1] | {"_name_or_path": None}


def test_a_model_without_generation_config_is_imported(tmp_path):
    hf = tiny_hf.save_hf(tmp_path / "hf")
    (hf / "generation_config.json").unlink()
    ranks.run_ranks(tiny_run.import_hf, 1, hf, tmp_path / "nemo", meet=False)


def swap_norms(source: Path, output: Path) -> str:
    """Import with a table of names that confuses the two norms of a layer."""
    from nemo_tsdkd.megatron.checkpoints import hf

    hf._PLAIN_NORMS = dict(zip(hf._PLAIN_NORMS, reversed(hf._PLAIN_NORMS.values()), strict=True))
    try:
        tiny_run.import_hf(source, output)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_an_import_that_confuses_weights_fails_loudly_and_leaves_its_log(tmp_path):
    hf = tiny_hf.save_hf(tmp_path / "hf")
    assert "logits differ" in ranks.run_ranks(swap_norms, 1, hf, tmp_path / "nemo", meet=False)[0]
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "nemo.log"}
    assert "logits differ" in (tmp_path / "nemo.log").read_text()


def load_into_other_shape(checkpoint: Path, change: dict) -> str:
    try:
        build(checkpoint, **change)
    except ValueError as error:
        return str(error)
    return "no error"


def test_weights_that_are_not_the_models_are_refused(folders):
    checkpoint = folders("qwen2")[1]
    message = ranks.run_ranks(load_into_other_shape, 1, checkpoint, {"add_qkv_bias": False})[0]
    assert "In the file only: module.decoder.layers.self_attention.linear_qkv.bias;" in message
    message = ranks.run_ranks(load_into_other_shape, 1, checkpoint, {"qk_layernorm": True})[0]
    assert "k_layernorm" in message.split("in the model only")[1]
