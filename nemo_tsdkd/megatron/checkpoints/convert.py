"""Convert checkpoints from one format to the other. Each function builds NeMo's trainer and a world of one rank: it
needs its own process."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer as NemoTokenizer
from nemo.lightning import io
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.completeness import require_complete
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, copy_assets, restore_assets
from nemo_tsdkd.checkpoints.transformers5 import translate_assets
from nemo_tsdkd.megatron.checkpoints.hf import CLASSES, config_from_hf, require_equal_logits, to_hf, to_megatron
from nemo_tsdkd.megatron.checkpoints.load import gpt_config, load_weights


def import_hf(source: Path, output: Path) -> None:
    """Write the NeMo checkpoint of a Hugging Face folder into `output`.

    Raises:
        RuntimeError: the two models' logits differ.
    """
    with TemporaryDirectory() as staging:
        assets = Path(staging, HF_ASSETS.name)
        copy_assets(source, assets)
        translate_assets(assets)
        if not (assets / "generation_config.json").is_file():
            GenerationConfig.from_model_config(AutoConfig.from_pretrained(assets)).save_pretrained(assets)
        config = config_from_hf(assets)
        model, trainer = _unloaded_model(config, assets)
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, config=AutoConfig.from_pretrained(assets), dtype=config.params_dtype, use_safetensors=True
        )
        to_megatron(hf_model, model.module)
        del hf_model
        io.ModelConnector().nemo_save(output, trainer)
        require_equal_logits(source, model.module, assets)


def export_nemo(checkpoint: Path, output: Path) -> None:
    """Write the model of any of our checkpoints, without optimizer or padding, as NeMo's plain model class."""
    with TemporaryDirectory() as staging:
        assets = Path(staging, HF_ASSETS.name)
        copy_assets(checkpoint / HF_ASSETS, assets)
        model, trainer = _unloaded_model(gpt_config(checkpoint), assets)
        load_weights(model.module, checkpoint)
        io.ModelConnector().nemo_save(output, trainer)


def export_hf(checkpoint: Path, output: Path) -> None:
    """Write the model of any of our checkpoints as a Hugging Face folder, in the vocabulary's original width.

    Raises:
        UserError: the checkpoint's weights are not those of its config.json.
        RuntimeError: the two models' logits differ.
    """
    assets = checkpoint / HF_ASSETS
    config = gpt_config(checkpoint)
    model, _ = _unloaded_model(config, assets)
    load_weights(model.module, checkpoint)
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets), dtype=config.params_dtype)
    to_hf(model.module, hf_model)
    hf_model.save_pretrained(output)
    restore_assets(assets, output)  # the source's generation_config.json too, which transformers might refuse to write
    del hf_model
    require_complete(output)
    require_equal_logits(output, model.module, assets)


def _unloaded_model(config: llm.GPTConfig, assets: Path) -> tuple[llm.GPTModel, Any]:
    """NeMo's model with the trainer that can save it."""
    _, model_class = CLASSES[read_json(assets / "config.json")["model_type"]]
    model = model_class(config, tokenizer=NemoTokenizer(str(assets), trust_remote_code=False))
    trainer = io.ModelConnector().nemo_setup(model)
    _materialize(model.module)
    return model, trainer


def _materialize(module: nn.Module) -> None:
    """NeMo builds Transformer Engine's layers on the meta device, where loaded weights would vanish."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                memory.__dict__.update(parameter.__dict__)  # Megatron's marks
                setattr(part, name, memory)
