"""Check weights, tokenizers and data before training, in a few seconds and without a GPU.

Reads the headers of weight files, both tokenizers, and the first rows of each data file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import require_creatable
from nemo_tsdkd.checkpoints.manifest import find_damage, has_manifest
from nemo_tsdkd.checkpoints.model_folder import is_nemo_checkpoint
from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checkpoints.tensor_files import stored_tensors
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError

_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names
_AGAIN = "Download or import the model again."


def check_start(config: TrainConfig, shapes: Mapping[str, ModelShape], deep: bool = False) -> list[str]:
    """Check what `train` reads after its configuration; return descriptions of what could not be checked.

    Args:
        shapes: what `check_setup` returned.
        deep: whether to read the weights and compare them with their manifests' digests, not names and sizes only.

    Raises:
        UserError: the first problem that would stop training before its first step.
    """
    from nemo_tsdkd.data.rows import check_rows  # they import torch, which other users of this module do not need
    from nemo_tsdkd.data.tokenizer import Vocabulary, check_same_tokenizer, load_tokenizer

    require_creatable("run_dir", Path(config.run_dir))
    not_checked = []
    for path in dict.fromkeys((Path(config.student.path), Path(config.teacher.path))):
        check_weights(path, deep)
        if is_nemo_checkpoint(path) and not has_manifest(path):
            not_checked.append(f"the content of {path}, which has no manifest")
    tokenizer = load_tokenizer(config.student.path)
    check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    vocabulary = Vocabulary.of(tokenizer, config.student.path)
    vocabulary.require_rows(**{which: shape.vocab for which, shape in shapes.items()})
    if not check_rows(config.data, tokenizer, vocabulary if config.rollout.lmbda < 1 else None):
        not_checked.append(f"the rows of {config.data.path}, a data set of the hub")
    if config.validation.path is not None:
        from nemo_tsdkd.data.held_out import check_held_out

        if not check_held_out(config, tokenizer):
            not_checked.append(f"the rows of {config.validation.path}, a data set of the hub")
    return not_checked


def check_weights(folder: Path, deep: bool = False) -> None:
    """Check that every weight file of a model folder is complete, by its header; reads tensors only if `deep`.

    Raises:
        UserError: a file is missing, empty, cut short, quantized, or not as the folder's manifest says.
    """
    if has_manifest(folder) and (damage := find_damage(folder, deep=deep)):
        raise UserError(f"{folder}: {damage}. {_AGAIN}")
    if is_nemo_checkpoint(folder):
        weights = folder / "weights"
        files = [weights / ".metadata", weights / "common.pt", *weights.glob("*.distcp")]
        if len(files) < 3 or not all(path.is_file() and path.stat().st_size for path in files):
            raise UserError(f"{weights}: .metadata, common.pt or .distcp files are missing or empty. {_AGAIN}")
        return
    for name, tensor in stored_tensors(folder).items():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{tensor.file}: {name} is {tensor.dtype}: must be one of {', '.join(_FLOATS)}. Give the original "
                "model, not a quantized one."
            )
