"""What a login node can know before any rank starts: the configuration is sound and the two models allow it.

Reads names and JSON only: no weights, no torch, no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tsdkd.config import ParallelConfig, TrainConfig
from nemo_tsdkd.folders import HF_ASSETS, is_nemo_checkpoint, read_json, require_importable
from nemo_tsdkd.memory import ModelShape
from nemo_tsdkd.precision import check_names, check_shapes


def check_setup(config: TrainConfig, batch: bool = True) -> dict[str, ModelShape]:
    """Check all that can be checked without a model in memory; return the shape of each model that states one.

    A NeMo checkpoint that was not imported by this package states none; Megatron checks it when it is built.

    Args:
        batch: whether the ranks will share global batches.

    Raises:
        ValueError: the first rule that does not hold, as field, value, rule and fix.
    """
    config.validate(batch)
    check_names(config)
    shapes = {}
    for which, path in (("student", Path(config.student.path)), ("teacher", Path(config.teacher.path))):
        hf_config = _hf_config(which, path)
        if hf_config is not None:
            check_model_fits(hf_config, config.parallel, which)
            config.objective.validate(vocab_size=hf_config["vocab_size"])
            shapes[which] = ModelShape.of_folder(path)
    if len(shapes) == 2:
        check_shapes(config, **shapes)
    return shapes


def check_ranks(config: TrainConfig, started: int) -> None:
    """Raise ValueError unless as many ranks were started as the layout has."""
    if started != config.parallel.world_size:
        raise ValueError(
            f"parallel.num_nodes x parallel.gpus_per_node = {config.parallel.world_size}: but {started} "
            "ranks were started. Start one for each, with srun or `torchrun --nproc-per-node N -m nemo_tsdkd train`."
        )


def check_model_fits(hf_config: Mapping[str, Any], parallel: ParallelConfig, which: str) -> None:
    """Raise ValueError unless a model can be cut into TP x PP equal parts.

    Args:
        hf_config: contents of its Hugging Face config.json.
        parallel: the layout.
        which: "student" or "teacher", for the message.
    """
    sizes = {"tensor": parallel.tensor_model_parallel_size, "pipeline": parallel.pipeline_model_parallel_size}
    heads = hf_config["num_attention_heads"]
    for name, value, direction in (
        ("num_attention_heads", heads, "tensor"),
        ("num_key_value_heads", hf_config.get("num_key_value_heads", heads), "tensor"),
        ("intermediate_size", hf_config["intermediate_size"], "tensor"),
        ("num_hidden_layers", hf_config["num_hidden_layers"], "pipeline"),
    ):
        if value % sizes[direction]:
            field = f"parallel.{direction}_model_parallel_size"
            raise ValueError(
                f"{field} = {sizes[direction]}: must divide the {which}'s {name} = {value}. Choose a divisor of it."
            )


def _hf_config(which: str, path: Path) -> dict[str, Any] | None:
    """A model's config.json; None for a NeMo checkpoint without one."""
    if is_nemo_checkpoint(path):
        assets = path / HF_ASSETS
        return read_json(assets / "config.json") if assets.is_dir() else None
    if not path.is_dir():
        raise ValueError(
            f"{which}.path = {str(path)!r}: no such folder. Give a local Hugging Face folder or a NeMo checkpoint."
        )
    require_importable(path)
    return read_json(path / "config.json")
