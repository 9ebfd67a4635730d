"""Checkpoints of models and optimizer over Transformer Engine: families, resume with its FusedAdam."""

import shutil

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from interruptions import same, steps_done, train
from safetensors.torch import load_file
from training_runs import SP, TP

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "llama"])
def test_import_and_export_give_the_source_back(model_type, tmp_path):
    """Both compare their logits with Hugging Face's; `engine_cases` has Qwen2. Experts are in grouped layers."""
    experts = EXPERTS if model_type == "qwen3_moe" else {}
    source = tiny_hf.save_hf(tmp_path / "hf", model_type, num_hidden_layers=2, **experts)
    ranks.run_ranks(tiny_run.import_hf, 1, source, tmp_path / "nemo", meet=False)
    ranks.run_ranks(tiny_run.export, 1, tmp_path / "nemo", "hf", tmp_path / "back", meet=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def configure(root):
    def configure(run_dir, name, layout="tp2_sp"):
        """Four steps, half of them on-policy, saved after 2 and 4."""
        parallel = {TP: 2, SP: True} if layout == "tp2_sp" else {}
        config = tiny_run.config(root, run_dir, 2, lmbda=0.5, **parallel)
        config.max_steps, config.checkpoint.every_n_steps, config.data.seq_length = 4, 2, 128
        config.precision.name = config.teacher.precision = name
        config.precision.first_last_layers_bf16 = False
        return config

    return configure


@pytest.mark.parametrize("name", ["fp32", "fp8_tensorwise"])
def test_a_killed_run_resumes_bit_for_bit(name, configure, tmp_path):
    uninterrupted = train(configure(tmp_path / "whole", name))
    config = configure(tmp_path / "parts", name)
    assert train(config, kill_when=steps_done(config, 3)) is None
    shutil.copytree(config.run_dir, tmp_path / "other")
    assert same(train(config), uninterrupted)
    if name == "fp32":  # exact enough to compare layouts
        on_dp2 = train(configure(tmp_path / "other", name, layout="dp2"))
        assert on_dp2.samples == uninterrupted.samples
        for row, expected in zip(on_dp2.metrics, uninterrupted.metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for key, value in uninterrupted.weights.items():
            torch.testing.assert_close(on_dp2.weights[key], value, rtol=1e-5, atol=1e-5)
