"""What a Hugging Face folder's safetensors files hold: names, dtypes and shapes, read from their headers. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.config.validation import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `dtype` in safetensors' spelling (F32, BF16, F16, F8_E4M3 ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that a Hugging Face folder holds, by its name. Reads headers only, whatever the model's size.

    Raises:
        UserError: a file is absent, cut off or no safetensors file, or the index and the files disagree.
    """
    index = _index(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in _headers(file):
            if name in tensors:
                raise UserError(f"{file}: holds {name}, as {tensors[name].file.name} does. Save the model again.")
            if index is not None and index.get(name) != file.name:
                raise UserError(f"{file}: holds {name}, which {INDEX} does not list there. Save the model again.")
            tensors[name] = tensor
    for name, file_name in (index or {}).items():
        if name not in tensors:
            raise UserError(f"{folder / file_name}: does not hold {name}, which {INDEX} lists. Save the model again.")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads of a folder: model.safetensors, or else those that the index names.

    Raises:
        UserError: neither is there, or a file that the index names is not.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (index := _index(folder)) is None:
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}. Save the model with transformers.")
    files = [folder / name for name in sorted(set(index.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{file}: is named in {INDEX}, but not in the folder. Copy the whole model.")
    return files


def _index(folder: Path) -> dict[str, str] | None:
    """The index's file for each tensor; None where the folder has one file, beside which an index does not count."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{folder / INDEX}: its weight_map must name a file for each tensor. Save the model again.")
    return files


def _headers(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(file, framework="np") as content:  # it also holds the header to the file's length
            for name in content.keys():  # noqa: SIM118 (no dict)
                part = content.get_slice(name)
                yield name, StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}). Copy or save it again.") from error
