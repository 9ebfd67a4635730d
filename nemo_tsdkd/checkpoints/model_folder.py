"""Model folders: which kind one is, whether it can be imported, and a key of its content. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import xxhash

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.hf_config import check_config
from nemo_tsdkd.checkpoints.manifest import MANIFEST, digests
from nemo_tsdkd.checkpoints.transformers5 import AS_WRITTEN
from nemo_tsdkd.config.validation import UserError

# Where our NeMo checkpoints keep the source's config, tokenizer and chat template: NeMo copies a tokenizer's folder
# into its context under the folder's own name.
HF_ASSETS = Path("context", "huggingface")
_ASSET_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".txt"}
_IMPORT_VERSION = b"2"  # raise it when the import of the same source changes, or is refused


def is_nemo_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds weights in Megatron's distributed format."""
    return (folder / "weights" / "metadata.json").is_file()


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` holds a Hugging Face model."""
    return (folder / "config.json").is_file()


def require_importable(folder: Path) -> None:
    """Raise UserError unless `folder` is a Hugging Face model that can be imported without running its code."""
    if not is_hf_folder(folder):
        raise UserError(f"{folder}: not a Hugging Face model, it has no config.json. Give the model's local folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        rule = "its weights are a pickle (.bin), which could run code" if pickled else "it has no .safetensors file"
        fix = 'AutoModelForCausalLM.from_pretrained("SOURCE").save_pretrained("OUTPUT")'
        raise UserError(f"{folder}: {rule}. Save it as safetensors where you trust the source: {fix}.")
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise UserError(
            f"{folder}/config.json: auto_map asks to run the folder's own code, which is never done. "
            "Give a model of transformers' own classes."
        )
    check_config(config, folder / "config.json")


def content_key(folder: Path) -> str:
    """Name for the import of a Hugging Face folder: its own name and a digest of all bytes that the result depends on.

    Two training states of one model differ in weights only, not in names or sizes, so all weights are read.
    """
    paths = sorted([*folder.glob("*.safetensors"), *_assets(folder)])
    state = xxhash.xxh3_128(_IMPORT_VERSION)
    for path, value in zip(paths, digests(paths), strict=True):
        state.update(f"{path.name}\0{value}\n".encode())
    return f"{folder.resolve().name}-{state.hexdigest()[:16]}"


def copy_assets(source: Path, target: Path) -> None:
    """Copy a Hugging Face folder's config, tokenizer, chat template and generation config, but no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for path in _assets(source):
        shutil.copyfile(path, target / path.name)


def restore_assets(assets: Path, target: Path) -> None:
    """Copy a checkpoint's assets as the model's author wrote them."""
    copy_assets(assets, target)
    for path in target.glob(f"{AS_WRITTEN}*"):
        path.rename(target / path.name.removeprefix(AS_WRITTEN))


def _assets(folder: Path) -> list[Path]:
    """Files beside the weights, without the index of the shards, which an export writes again."""
    return [
        p
        for p in sorted(folder.iterdir())
        if p.is_file() and p.suffix in _ASSET_SUFFIXES and p.name != MANIFEST and not p.name.endswith(".index.json")
    ]
