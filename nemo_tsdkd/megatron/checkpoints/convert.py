"""Convert checkpoints from one format to the other. Each function builds NeMo's trainer and a world of one rank: it
needs its own process."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer as NemoTokenizer
from nemo.lightning import io
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.completeness import require_complete
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, copy_assets, restore_assets
from nemo_tsdkd.checkpoints.transformers5 import translate_assets
from nemo_tsdkd.distributed.groups import from_rank_zero
from nemo_tsdkd.distributed.progress import on_rank_zero
from nemo_tsdkd.megatron.checkpoints.hf import CLASSES, config_from_hf, to_hf
from nemo_tsdkd.megatron.checkpoints.load import gpt_config, load_weights
from nemo_tsdkd.megatron.checkpoints.pieces import Conversion, HFWeights, one_layer, pieces_of, share_of
from nemo_tsdkd.megatron.checkpoints.proof import require_equal_logits


def import_hf(source: Path, output: Path | None) -> None:
    """Write the NeMo checkpoint of a Hugging Face folder into `output`. Call it on any number of ranks: each reads its
    share of the tensors, one by one, and writes it.

    Args:
        output: rank 0's counts.

    Raises:
        RuntimeError: the two models' logits differ.
    """
    with TemporaryDirectory() as staging:
        assets = Path(staging, HF_ASSETS.name)
        copy_assets(source, assets)
        translate_assets(assets)
        config = config_from_hf(assets)
        if not (assets / "generation_config.json").is_file():
            config.generation_config.save_pretrained(assets)
        if torch.cuda.is_available():  # each rank of a node proves some layers on its own GPU
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        model, trainer = _unloaded_model(config, assets, single_layer=True)
        folder = Path(from_rank_zero(lambda: str(output)))
        pieces = pieces_of(model.module, config.num_layers)
        conversion = Conversion(HFWeights(source), model.module.to("meta"), config.params_dtype)
        share = share_of(pieces, dist.get_rank(), dist.get_world_size())
        tensors = {}
        with on_rank_zero(dist.get_rank(), "tensor", len(share), only_long=True) as display:
            for i, piece in enumerate(share):
                tensors[str(i)] = conversion.fill(piece)
                if display:
                    display.show(i + 1, "read")

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:  # called by NeMo's trainer, which adds the rest
            checkpoint["sharded_state_dict"] = dict(tensors)

        model.on_save_checkpoint = on_save_checkpoint
        io.ModelConnector().nemo_save(folder, trainer)
        tensors.clear()
        require_equal_logits(source, folder, config, assets)


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
    del model
    require_equal_logits(output, checkpoint, config, assets)


def _unloaded_model(config: llm.GPTConfig, assets: Path, single_layer: bool = False) -> tuple[llm.GPTModel, Any]:
    """NeMo's model with the trainer that can save it; with `single_layer`, built with one layer."""
    _, model_class = CLASSES[read_json(assets / "config.json")["model_type"]]
    model = model_class(config, tokenizer=NemoTokenizer(str(assets), trust_remote_code=False))
    if single_layer:
        model.config = one_layer(config)
    strategy = nl.MegatronStrategy(ckpt_save_optimizer=False, always_save_context=True, ckpt_async_save=False)
    trainer = nl.Trainer(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy)
    io.ModelConnector().nemo_setup(model, trainer)
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
