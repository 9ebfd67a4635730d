"""What a login node can know before any rank starts: the configuration is sound and the two models allow it.

Reads names and JSON only: no weights, no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.checkpoints.hf_config import check_config
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, is_nemo_checkpoint, require_importable
from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.precision import check_names, check_shapes
from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError, require
from nemo_tsdkd.data.source import check_data
from nemo_tsdkd.verifiers import require_verifier


def check_setup(config: TrainConfig, batch: bool = True) -> dict[str, ModelShape]:
    """Check all that can be checked without a model in memory; return the shape of each model that states one.

    A NeMo checkpoint that was not imported by this package states none; Megatron checks it when it is built.

    Args:
        batch: whether the ranks will share global batches.

    Raises:
        UserError: the first rule that does not hold, as field, value, rule and fix.
    """
    check_fields(config, batch)
    return check_files(config)


def check_files(config: TrainConfig) -> dict[str, ModelShape]:
    """The part of `check_setup` that reads the models' and the data's files. Returns and raises as it does."""
    shapes = {}
    for which, path in (("student", Path(config.student.path)), ("teacher", Path(config.teacher.path))):
        if _require_model(which, path):
            shapes[which] = shape = ModelShape.of_folder(path)
            check_model_fits(shape, config.layout_of(which), which)
            check_length(path, config, which)
            config.objective.validate_vocabulary(shape.vocab)
    check_data(config.data)
    if config.validation.path is not None:
        check_data(config.validation.data(config.data))
    if len(shapes) == 2:
        check_layouts(config, shapes)
    return shapes


def check_layouts(config: TrainConfig, shapes: Mapping[str, ModelShape]) -> None:
    """The part of `check_setup` that needs both models' dimensions alone. Raises UserError as it does."""
    for which, shape in shapes.items():
        check_model_fits(shape, config.layout_of(which), which)
    check_experts(config, **{which: shape.experts for which, shape in shapes.items()})
    check_shapes(config, **shapes)


def check_fields(config: TrainConfig, batch: bool = True) -> None:
    """The part of `check_setup` that reads no file. Raises UserError as it does."""
    from nemo_tsdkd.objective import check_registered  # with torch, which this module's other users may do without

    config.validate(batch)
    check_names(config)
    check_registered(config.objective)
    if config.validation.path is not None:
        require_verifier("validation.verifier", config.validation.verifier)
    _check_loggers(config.loggers)


def _check_loggers(names: Sequence[str]) -> None:
    """Raise UserError where a logger's package is not installed, or W&B has nobody to log in as."""
    for name in names:
        require(
            find_spec(name) is not None,
            "loggers",
            list(names),
            f"the package of {name} is not installed",
            f"pip install 'nemo-tsdkd[{name}]', or take it from the list.",
        )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") in ("online", "run"):
        import wandb

        require(
            bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False),
            "loggers",
            list(names),
            "wandb finds no API key",
            "Set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline and send the run later by `wandb sync`.",
        )


def check_ranks(config: TrainConfig, started: int) -> None:
    """Raise UserError unless as many ranks were started as the layout has."""
    if started != config.parallel.world_size:
        raise UserError(
            f"parallel.num_nodes x parallel.gpus_per_node = {config.parallel.world_size}: but {started} "
            "ranks were started. Start one for each, with srun or `torchrun --nproc-per-node N -m nemo_tsdkd train`."
        )


def check_model_fits(shape: ModelShape, parallel: ParallelConfig, which: str) -> None:
    """Raise UserError unless a model can be cut into TP x PP equal parts.

    Args:
        shape: its dimensions.
        parallel: the layout.
        which: "student" or "teacher", for the message.
    """
    sizes = {"tensor": parallel.tensor_model_parallel_size, "pipeline": parallel.pipeline_model_parallel_size}
    for name, value, direction in (
        ("num_attention_heads", shape.heads, "tensor"),
        ("num_key_value_heads", shape.kv_heads, "tensor"),
        ("intermediate_size", 0 if shape.experts else shape.ffn, "tensor"),  # each expert is whole
        ("num_hidden_layers", shape.layers, "pipeline"),
    ):
        if value % sizes[direction]:
            prefix = "teacher." if which == "teacher" else ""
            field = f"{prefix}parallel.{direction}_model_parallel_size"
            raise UserError(
                f"{field} = {sizes[direction]}: must divide the {which}'s {name} = {value}. Choose a divisor of it."
            )


def check_experts(config: TrainConfig, *, student: int, teacher: int) -> None:
    """Raise UserError for a student that is a mixture of experts, and for expert parallelism that the teacher does not
    allow.

    Args:
        student, teacher: each model's number of experts in a layer; 0: it is dense.
    """
    field, ranks = "teacher.parallel.expert_model_parallel_size", config.teacher.parallel.expert_model_parallel_size
    require(
        not student,
        "student.path",
        config.student.path,
        f"a mixture of {student} experts; only the teacher may be one",
        "Choose a dense student.",
    )
    require(teacher > 0 or ranks == 1, field, ranks, "the teacher is dense, it has no experts", "Leave it out.")
    require(
        teacher % ranks == 0, field, ranks, f"must divide the teacher's {teacher} experts", "Choose a divisor of it."
    )


def check_length(path: Path, config: TrainConfig, which: str) -> None:
    """Raise UserError where sequences may be longer than a model's positions go."""
    inside = HF_ASSETS if is_nemo_checkpoint(path) else ""
    positions = read_json(path / inside / "config.json").get("max_position_embeddings")
    if isinstance(positions, int) and config.data.seq_length > positions:
        raise UserError(
            f"data.seq_length = {config.data.seq_length}: must not exceed the {which}'s max_position_embeddings = "
            f"{positions}. Lower it, or choose a model for longer texts."
        )


def _require_model(which: str, path: Path) -> bool:
    """Raise UserError unless `path` is a model to read; else whether it keeps a config.json, as all do but NeMo
    checkpoints from elsewhere."""
    if is_nemo_checkpoint(path):
        require_safe(path)
        if not (path / HF_ASSETS).is_dir():
            return False
        config = path / HF_ASSETS / "config.json"
        check_config(read_json(config), config)
        return True
    if not path.is_dir():
        raise UserError(
            f"{which}.path = {str(path)!r}: no such folder. Give a local Hugging Face folder or a NeMo checkpoint."
        )
    require_safe(path)
    require_importable(path)
    return True
