"""Translate folders that transformers 5 wrote for transformers 4, which NeMo needs.

transformers 4 ignores their RoPE settings and their number of experts without a warning and cannot read their
tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checkpoints.hf_config import EXPERTS, number_of_experts, rope

AS_WRITTEN = "as_written."  # prefix of the original of a translated file


def translate_assets(folder: Path) -> None:
    """Rewrite the assets of a Hugging Face folder that transformers 4 reads wrongly; keep the originals beside them.

    Raises:
        UserError: config.json asks for a rotary embedding that the models do not have.
    """
    for name, content in _translations(folder).items():
        (folder / name).rename(folder / f"{AS_WRITTEN}{name}")
        write_json(folder / name, content)


@contextmanager
def transformers4_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that transformers 4 reads correctly: `folder`, or translations and links to its other files.

    Raises:
        UserError: config.json asks for a rotary embedding that the models do not have.
    """
    if not (translations := _translations(folder)):
        yield folder
        return
    with TemporaryDirectory() as staging:
        for path in folder.iterdir():
            if path.name not in translations:
                Path(staging, path.name).symlink_to(path.resolve())
        for name, content in translations.items():
            write_json(Path(staging, name), content)
        yield Path(staging)


def _translations(folder: Path) -> dict[str, dict[str, Any]]:
    """The new content of each file that transformers 4 reads wrongly."""
    new = {}
    for name, translated in (("config.json", _config), ("tokenizer_config.json", _tokenizer_config)):
        path = folder / name
        if path.is_file() and (content := translated(read_json(path), path)) != read_json(path):
            new[name] = content
    return new


def _config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if (experts := number_of_experts(config, path)) is not None:
        config = {name: value for name, value in config.items() if name not in EXPERTS} | {EXPERTS[0]: experts}
    if config.get("rope_parameters") is None:
        return config
    known = rope(config, path)
    scaling = {"rope_type": "llama3", **asdict(known.scaling)} if known.scaling else None
    rest = {name: value for name, value in config.items() if name not in ("rope_parameters", "partial_rotary_factor")}
    return rest | {"rope_theta": known.theta, "rope_scaling": scaling}


def _tokenizer_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    new = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    return new
