"""Precision names: their settings for NeMo and Megatron, and the rules of FP8 kernels. No torch, NeMo or TE on import.

Without Transformer Engine, Megatron accepts any FP8 setting, also misspelt ones, and trains in bf16 without a warning.
So all rules of FP8 kernels are checked here before a model is built.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.config.integers import round_up
from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError


@dataclass(frozen=True)
class Fp8:
    """One FP8 recipe, in Megatron's names."""

    format: str  # hybrid: e4m3 forward, e5m2 gradients; e4m3: everywhere
    recipe: str
    token_multiple: int  # rows of a GEMM operand


BLOCK = 128  # side of a block that fp8_blockwise quantizes at once
# Delayed scaling is not offered: it cannot keep single layers in bf16, and its scales, taken from earlier
# steps' maxima, are never updated under no_grad, so a frozen teacher would keep its initial ones.
FP8 = {
    # Transformer Engine's Float8CurrentScaling and Float8BlockScaling.
    "fp8_tensorwise": Fp8("hybrid", "tensorwise", token_multiple=16),
    # A sequence-parallel rank's rows are gathered in quantized blocks.
    "fp8_blockwise": Fp8("e4m3", "blockwise", token_multiple=BLOCK),
}
NAMES = ("bf16", "fp32", *FP8)
LENGTH_STEP = 256  # on a GPU: attention kernels plan for each new length, which takes a tenth of a second
WEIGHT_MULTIPLE = 16  # both dimensions of a weight: each is the contracted one of the forward or a backward GEMM
BLOCKWISE_CUDA = (12, 9)


def model_settings(name: str, first_last_layers_bf16: bool = True) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for this precision; the head and the loss are outside of its FP8 region.

    Args:
        name: one of NAMES (`check_names`).
        first_last_layers_bf16: keep one layer at either end in bf16 (their number has no effect without the flag).
    """
    import torch

    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    settings: dict[str, Any] = {
        "bf16": name != "fp32",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "fp8": None,
    }
    if name in FP8:
        settings |= {
            "fp8": FP8[name].format,
            "fp8_recipe": FP8[name].recipe,
            "fp8_param": False,  # weights stay bf16, so checkpoints and rollouts read one format
            "first_last_layers_bf16": first_last_layers_bf16,
            "num_layers_at_start_in_bf16": int(first_last_layers_bf16),  # Megatron's default of 1 is 0 in NeMo's plugin
            "num_layers_at_end_in_bf16": int(first_last_layers_bf16),
        }
    return settings


def plugin_settings(name: str, first_last_layers_bf16: bool = True) -> dict[str, Any]:
    """Arguments of NeMo's MegatronMixedPrecision for the trained model: gradients are reduced in fp32."""
    settings = model_settings(name, first_last_layers_bf16)
    settings["precision"] = "bf16-mixed" if settings.pop("bf16") else "32"
    if "fp8_param" in settings:
        settings["fp8_param_gather"] = settings.pop("fp8_param")
    return settings | {"autocast_enabled": False, "grad_reduce_in_fp32": True}


def check_names(config: TrainConfig) -> None:
    """Refuse unknown precisions, delayed scaling (with the reason), and fp32 under context parallelism.

    Raises:
        UserError: naming the field, its value, the rule and the fix.
    """
    for field, name, parallel in _models(config):
        _require_known(field, name)
        if name == "fp32" and (cp := parallel.context_parallel_size) > 1:
            raise UserError(
                f"{field} = 'fp32': Transformer Engine's attention, which alone works across ranks, takes 16 bits, and "
                f"the model's context_parallel_size is {cp}. Use bf16, or a size of 1."
            )


def _models(config: TrainConfig) -> tuple[tuple[str, str, ParallelConfig], ...]:
    """For student and teacher: the precision's field, its value, the layout."""
    return (
        ("precision.name", config.precision.name, config.parallel),
        ("teacher.precision", config.teacher.precision, config.teacher_parallel),
    )


def check_shapes(config: TrainConfig, student: ModelShape, teacher: ModelShape) -> None:
    """Refuse dimensions and token counts that the FP8 kernels of `config` cannot multiply, and models with too few
    layers for an FP8 layer. Checks nothing for bf16 and fp32.

    Raises:
        UserError: naming the field, its value, the rule and the fix.
    """
    for field, name, shape, parallel, rows in (
        ("precision.name", config.precision.name, student, config.parallel, config.micro_batch_size),
        (
            "teacher.precision",
            config.teacher.precision,
            teacher,
            config.teacher_parallel,
            config.teacher.micro_batch_size,
        ),
    ):
        if name not in FP8:
            continue
        tp = parallel.tensor_model_parallel_size
        for what, width in (
            ("hidden size", shape.hidden),
            ("QKV width on a rank", (shape.q_width + 2 * shape.kv_width) // tp),
            ("attention width on a rank", shape.q_width // tp),
            ("MLP width on a rank", 0 if shape.experts else shape.ffn // tp),
            ("expert's width", shape.expert_ffn),  # an expert is whole, whatever the TP
        ):
            if width % WEIGHT_MULTIPLE:
                raise UserError(
                    f"{field} = {name!r}: FP8 needs dimensions that are multiples of {WEIGHT_MULTIPLE}, but the "
                    f"{what} is {width} at TP {tp}. Lower parallel.tensor_model_parallel_size or use bf16."
                )
        if name == "fp8_blockwise" and parallel.sequence_parallel and shape.hidden % BLOCK:
            raise UserError(
                f"{field} = {name!r}: sequence parallelism gathers blocks of {BLOCK}, but the hidden size is "
                f"{shape.hidden}. Use fp8_tensorwise."
            )
        multiple = token_multiple(parallel, name)
        if config.data.seq_length * rows % multiple:
            step = multiple // math.gcd(multiple, rows)
            raise UserError(
                f"data.seq_length = {config.data.seq_length}: {name!r} in {field} needs the tokens of a micro-batch "
                f"({rows} x seq_length) in multiples of {multiple}. Use {round_up(config.data.seq_length, step)}."
            )
        if config.precision.first_last_layers_bf16 and shape.layers <= 2:
            raise UserError(
                f"precision.first_last_layers_bf16 = True: of the {shape.layers} layers of the model with {field} = "
                f"{name!r} it leaves none to FP8. Set it to false, or use bf16."
            )


def token_multiple(parallel: ParallelConfig, name: str) -> int:
    """What a micro-batch's token count (rows x padded length) must be a multiple of under precision `name`.

    Each context-parallel rank multiplies its share of the tokens; with sequence parallelism each tensor-parallel
    rank quantizes its own rows before they are gathered.
    """
    ranks = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    return ranks * (FP8[name].token_multiple if name in FP8 else 1)


def pad_to_multiple(config: TrainConfig, on_gpu: bool) -> int:
    """The multiple to which the student's rows are padded, for the layout's shards, the kernels and LENGTH_STEP.
    In one layout the teacher reads the same padded rows."""
    multiple = _length_multiple(config.parallel, config.precision.name, on_gpu)
    return math.lcm(multiple, teacher_pad_to_multiple(config, on_gpu) if config.one_layout else 1)


def teacher_pad_to_multiple(config: TrainConfig, on_gpu: bool) -> int:
    """The same for the teacher's rows."""
    return _length_multiple(config.teacher_parallel, config.teacher.precision, on_gpu)


def _length_multiple(parallel: ParallelConfig, name: str, on_gpu: bool) -> int:
    return math.lcm(LENGTH_STEP if on_gpu else 1, parallel.pad_to_multiple, token_multiple(parallel, name))


def check_engine(config: TrainConfig) -> None:
    """Refuse FP8, context and sequence parallelism where Transformer Engine, CUDA or the GPU cannot run them.

    Raises:
        UserError: naming the field, its value, the rule and the fix.
    """
    import torch

    for prefix, parallel in (("", config.parallel), ("teacher.", config.teacher_parallel)):
        if parallel.sequence_parallel and torch.cuda.is_available():  # on the CPU, cpu.py replaces the norm
            _require_engine(f"{prefix}parallel.sequence_parallel = True", "Megatron's own norm has none", "false")
        if (cp := parallel.context_parallel_size) > 1:
            _require_engine(f"{prefix}parallel.context_parallel_size = {cp}", "Megatron's own attention has none", "1")
    for field, name, _ in _models(config):
        if name not in FP8:
            continue
        _require_engine(f"{field} = {name!r}", "Megatron would train bf16 without saying so", "bf16")
        cuda = tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2])
        if torch.cuda.get_device_capability() < (9, 0):
            raise UserError(f"{field} = {name!r}: needs a Hopper GPU (compute capability 9.0) or newer. Use bf16.")
        if name == "fp8_blockwise" and cuda < BLOCKWISE_CUDA:
            raise UserError(f"{field} = {name!r}: needs CUDA 12.9, found {torch.version.cuda}. Use fp8_tensorwise.")


def _require_engine(setting: str, why: str, instead: str) -> None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        raise UserError(
            f"{setting}: needs Transformer Engine, which does not import ({error}); {why}. "
            f"Run in the image of docs/cluster.md, step 1, or use {instead}."
        ) from None


def _require_known(field: str, name: str) -> None:
    if name in NAMES:
        return
    why = "must be one of " + ", ".join(NAMES)
    if "delayed" in name:
        why = "delayed scaling is not offered: no layer could stay in bf16, and a frozen teacher's scales never update"
    raise UserError(f"{field} = {name!r}: {why}. Use fp8_tensorwise on Hopper, or bf16.")
