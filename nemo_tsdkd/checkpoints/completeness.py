"""Whether a Hugging Face folder holds exactly the tensors of its architecture, each in its shape.

transformers initializes missing tensors and ignores unknown ones, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_tsdkd.checkpoints.tensor_files import StoredTensor, stored_tensors
from nemo_tsdkd.checkpoints.transformers5 import transformers4_folder
from nemo_tsdkd.config.validation import UserError

Shapes = Mapping[str, tuple[int, ...]]
_DTYPES = ("F32", "BF16", "F16")
_NAMED = 3  # names in a message before "and N more"
# Written by old versions for each layer; transformers computes it from config.json.
_DERIVED = ".rotary_emb.inv_freq"


def require_complete(folder: Path) -> None:
    """Raise UserError unless a Hugging Face folder holds its architecture's tensors, as fp32, bf16 or fp16.

    The architecture is transformers' own model of the folder's config.json, built on the meta device. Of the weights
    only headers are read, and the head if it is stored although config.json ties it.
    """
    found = {name: tensor for name, tensor in stored_tensors(folder).items() if not name.endswith(_DERIVED)}
    expected, tied = architecture(folder)
    for name, first in tied.items():
        if name in found and first in found:
            _require_equal(found.pop(name), name, found[first], first)
    require_same_tensors(folder, expected, {name: tensor.shape for name, tensor in found.items()})
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}: must be one of {', '.join(_DTYPES)}. "
                "Give the model before its quantization."
            )


def architecture(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors of transformers' model for a folder's config.json; and tied names, each with the
    name of the tensor it shares."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with transformers4_folder(folder) as translated, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(translated))
    names: dict[int, str] = {}
    shapes, tied = {}, {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(tensor), name)
        if first == name:
            shapes[name] = tuple(tensor.shape)
        else:
            tied[name] = first
    return shapes, tied


def require_same_tensors(where: Path, expected: Shapes, found: Shapes) -> None:
    """Raise UserError that names tensors missing from `found`, surplus in it, or of another shape.

    Args:
        where: folder of the weights, for messages.
        expected: shapes of config.json's model, by name.
        found: shapes of the weights, by name.
    """
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: missing from its weights: {shorten_names(missing)}. Copy or save the whole model again."
        )
    fix = "Give the config.json that belongs to the weights."
    if surplus := [name for name in found if name not in expected]:
        raise UserError(f"{where}: in its weights, but in no model of its config.json: {shorten_names(surplus)}. {fix}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            rule = f"must be {list(shape)} by its config.json"
            raise UserError(f"{where}: {name} has the shape {list(found[name])}: {rule}. {fix}")


def shorten_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _require_equal(stored: StoredTensor, name: str, other: StoredTensor, other_name: str) -> None:
    from safetensors import safe_open

    with safe_open(stored.file, framework="pt") as one, safe_open(other.file, framework="pt") as two:
        if stored.shape != other.shape or not bool((one.get_tensor(name) == two.get_tensor(other_name)).all()):
            raise UserError(
                f"{stored.file}: {name} is not {other_name}, though config.json ties the two. "
                "Set tie_word_embeddings to false, or leave the tensor out."
            )
