"""Load models: find or import the NeMo checkpoint of a path, read its GPT config, load its weights in any layout."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections import llm

import nemo_tsdkd.megatron.cpu as cpu
from nemo_tsdkd.checkpoints.completeness import shorten_names
from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.checkpoints.manifest import find_damage, has_manifest
from nemo_tsdkd.checkpoints.model_folder import (
    HF_ASSETS,
    content_key,
    is_hf_folder,
    is_nemo_checkpoint,
    require_importable,
)
from nemo_tsdkd.config.validation import HostError, UserError
from nemo_tsdkd.distributed.groups import from_rank_zero
from nemo_tsdkd.distributed.launch import environment_outside
from nemo_tsdkd.megatron.checkpoints.context import read_gpt_config
from nemo_tsdkd.megatron.checkpoints.hf import config_from_hf
from nemo_tsdkd.megatron.checkpoints.unpickling import checkpoint_errors

logger = logging.getLogger(__name__)

_PREFIX = "module."  # NeMo's checkpoints hold the model under this name, beside optimizer state


def resolve(path: str | Path, cache_dir: Path) -> Path:
    """The NeMo checkpoint for a model path: itself, or the import of a Hugging Face folder.

    Call it on every rank of a job, in its process group. Rank 0 imports once, in a child process (NeMo builds a
    world of one rank for it), into `cache_dir` on a file system that all ranks share, under a key of the content.

    Raises:
        UserError: `path` is neither kind of folder, could run code, is not as its manifest says, or is a Hugging Face
            folder that cannot be imported or lacks weights.
        HostError: the disk for the import is full.
        RuntimeError: the import failed; every rank raises it.
    """
    folder = Path(path)
    if is_nemo_checkpoint(folder):
        require_safe(folder)
        _require_undamaged(folder)
        return folder
    if not is_hf_folder(folder):
        fix = "Give a local Hugging Face folder (config.json, *.safetensors) or a NeMo checkpoint folder"
        raise UserError(f"{folder}: {'no model in it' if folder.is_dir() else 'no such folder'}. {fix}.")
    require_safe(folder)
    require_importable(folder)
    checkpoint = Path(from_rank_zero(lambda: str(_import_once(folder, cache_dir))))
    _wait_for_folder(checkpoint)
    _require_undamaged(checkpoint)
    return checkpoint


def find_damage_on_all_ranks(checkpoint: Path) -> str | None:
    """`find_damage` of all files, each rank reading a share of them. Collective."""
    if not dist.is_initialized():
        return find_damage(checkpoint)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(checkpoint, dist.get_rank(), len(found)))
    return next((damage for damage in found if damage), None)


def _require_undamaged(checkpoint: Path) -> None:
    if not has_manifest(checkpoint):
        log = logger.warning if int(os.environ.get("RANK", "0")) == 0 else logger.debug
        log("%s has no manifest: its weights cannot be checked for damage.", checkpoint)
    elif damage := find_damage_on_all_ranks(checkpoint):
        raise UserError(f"{checkpoint}: {damage}. Remove it and import the model again.")


def gpt_config(checkpoint: Path) -> llm.GPTConfig:
    """NeMo's GPT config of a checkpoint, `vocab_size` without padding.

    An import of ours keeps the source's `config.json`, and the config is derived from that. For any other NeMo
    checkpoint it is read from the context, which may name NeMo's configs only.

    Raises:
        UserError: the checkpoint is damaged, or could run code, or its embedding is shorter than its vocabulary.
    """
    assets = checkpoint / HF_ASSETS
    config = config_from_hf(assets) if assets.is_dir() else read_gpt_config(checkpoint)
    embedding = _stored_tensors(checkpoint)[f"{_PREFIX}embedding.word_embeddings.weight"]
    if config.vocab_size is not None and embedding.global_shape[0] < config.vocab_size:
        raise UserError(
            f"{checkpoint}: its embedding has {embedding.global_shape[0]} rows, but its config a vocabulary of "
            f"{config.vocab_size}: rows would be missing. Import the model again."
        )
    dtype = embedding.dtype
    config.params_dtype, config.bf16, config.fp16 = dtype, dtype == torch.bfloat16, dtype == torch.float16
    for fusion in cpu.missing_kernels:
        setattr(config, fusion, False)
    return config


def load_weights(module: MCoreGPTModel, checkpoint: Path) -> None:
    """Fill a built GPT chunk from a NeMo checkpoint; collective over all ranks of Megatron's current parallel state.

    Each rank reads only its slices of the weights, from any layout, and no optimizer state. Rows of the embedding
    and the head beyond those in the file become zero; surplus rows of the file are ignored.

    Raises:
        UserError: the checkpoint and the model do not have the same parameters, or one has another shape.
    """
    assert not any(p.is_meta for p in module.parameters()), "weights loaded into the meta device are lost"
    needed = module.sharded_state_dict(prefix=_PREFIX)
    _require_shapes(needed, checkpoint)
    with checkpoint_errors(checkpoint):
        state, missing, unexpected = dist_checkpointing.load(
            needed,
            str(checkpoint / "weights"),
            strict=StrictHandling.RETURN_ALL,
        )
    # Transformer Engine's extra state is empty where nothing is FP8, and absent from imports made without it.
    missing = {k for k in missing if k.startswith(_PREFIX) and "_extra_state" not in k}
    unexpected = {k for k in unexpected if "_extra_state" not in k}
    if missing or unexpected:
        raise UserError(
            f"{checkpoint}: not this model's weights. In the file only: {shorten_names(sorted(missing)) or 'nothing'}; "
            f"in the model only: {shorten_names(sorted(unexpected)) or 'nothing'}. Import the model again."
        )
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    absent, _ = module.load_state_dict(weights, strict=False)
    assert all("_extra_state" in key for key in absent), absent


def frozen_model(config: llm.GPTConfig, checkpoint: Path) -> MCoreGPTModel:
    """This rank's shard of a model without gradients: weights loaded, in `config.params_dtype`, on the device.

    Args:
        config: its parallel sizes, padded vocabulary and dtypes set.
    """
    model = config.configure_model(tokenizer=None)
    load_weights(model, checkpoint)
    return model.to(device=torch.cuda.current_device(), dtype=config.params_dtype).eval().requires_grad_(False)


def load_head(config: llm.GPTConfig, checkpoint: Path, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """The output weight `[V/TP, H]` of a checkpoint's model by the ranks of `tp_group`; collective over all ranks.

    Args:
        config: of the model, its padded vocabulary and dtype set. Rows beyond those in the file are zero.

    Raises:
        UserError: the checkpoint is damaged.
    """
    tied = config.share_embeddings_and_output_weights
    name = _PREFIX + ("embedding.word_embeddings.weight" if tied else "output_layer.weight")
    shape = config.vocab_size // tp_group.size(), config.hidden_size
    weight = torch.zeros(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
    shard = ShardedTensor.from_rank_offsets(
        name, weight, (0, tp_group.rank(), tp_group.size()), replica_id=dist.get_rank(), allow_shape_mismatch=True
    )
    # Ranks outside of `tp_group` read the same shards, so ownership of shards is not checked.
    with checkpoint_errors(checkpoint):
        state = dist_checkpointing.load({"head": shard}, str(checkpoint / "weights"), validate_access_integrity=False)
    return state["head"]


def _require_shapes(needed: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where a stored tensor is not of the model's shape; embedding and head may differ in rows."""
    stored = _stored_tensors(checkpoint)
    for part in needed.values():
        tensors = nested_values(part.build()) if isinstance(part, ShardedTensorFactory) else [part]
        for tensor in tensors:
            if not isinstance(tensor, ShardedTensor) or tensor.key not in stored:
                continue
            rows = 1 if tensor.allow_shape_mismatch else 0
            found, shape = list(stored[tensor.key].global_shape[rows:]), list(tensor.global_shape[rows:])
            if found != shape:
                raise UserError(
                    f"{checkpoint}: {tensor.key} has the shape {found}, but the model's has {shape}"
                    f"{', rows aside' if rows else ''}. Import the model again."
                )


def _stored_tensors(checkpoint: Path) -> dict:
    with checkpoint_errors(checkpoint):
        return dist_checkpointing.load_tensors_metadata(str(checkpoint / "weights"))


def _import_once(folder: Path, cache_dir: Path) -> Path:
    checkpoint = cache_dir / content_key(folder)
    if not checkpoint.is_dir():
        command = [sys.executable, "-m", "nemo_tsdkd", "import", "--source", str(folder), "--output", str(checkpoint)]
        child = subprocess.run(
            command, env=environment_outside(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if not is_nemo_checkpoint(checkpoint):
            said = child.stderr.strip().rpartition("nemo-tsdkd: error: ")[2]
            kind = {2: UserError, 1: HostError}.get(child.returncode) if said != child.stderr.strip() else None
            if kind:
                raise kind(said)
            tail = "\n".join(child.stderr.splitlines()[-20:])
            raise RuntimeError(f"{folder}: the import failed (exit status {child.returncode}):\n{tail}")
    return checkpoint


def _wait_for_folder(checkpoint: Path, seconds: float = 60) -> None:
    """Network file systems show another node's rename with a delay."""
    deadline = time.monotonic() + seconds
    while not is_nemo_checkpoint(checkpoint):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{checkpoint}: imported by rank 0, not seen here. Put run_dir on a shared file system.")
        time.sleep(0.2)
