"""Safety of model folders from other sources: no code, no links out of the folder. Reads names and JSON; no torch."""

from __future__ import annotations

from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS, is_nemo_checkpoint
from nemo_tsdkd.config.validation import UserError

# Libraries of the stack unpickle these files, or load another model, as soon as they find them.
_REFUSED = {
    "modelopt_state": "ModelOpt's state is a pickle, which could run code",
    "modelopt_state.pth": "ModelOpt's state is a pickle, which could run code",
    "adapter_config.json": "it holds an adapter, not a model",
}
_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"}


def require_safe(folder: Path) -> None:
    """Check that reading a model folder runs no code and reads no file outside of it.

    Raises:
        UserError: a link that leads out of the folder, a pickle, an adapter, a quantized model, or another format of
            Megatron's checkpoints than torch_dist.
    """
    nemo = is_nemo_checkpoint(folder)
    for path in folder.rglob("*") if nemo else folder.iterdir():
        _require_inside(path, folder)
        if path.name in _REFUSED:
            raise UserError(f"{path}: {_REFUSED[path.name]}. Merge or export it to a plain model first.")
    if nemo:
        _require_torch_dist(folder / "weights" / "metadata.json")
    config = folder / (HF_ASSETS if nemo else "") / "config.json"
    if config.is_file() and (method := read_json(config).get("quantization_config")) is not None:
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise UserError(
            f"{config}: quantization_config ({name}): quantized weights cannot be trained or imported. Give the "
            "original model, or dequantize it (transformers: model.dequantize())."
        )


def _require_inside(path: Path, folder: Path) -> None:
    """A link may point to a file of the folder; in Hugging Face's cache, where all files of a snapshot are links, also
    to one of the model's blobs."""
    if not path.is_symlink():
        return
    target, inside = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in inside):
        raise UserError(f"{path}: is a link to {target}, outside of the model's folder. Put the file itself there.")


def _require_torch_dist(path: Path) -> None:
    stated = read_json(path)
    for name, expected in _FORMAT.items():
        if stated.get(name) != expected:
            raise UserError(
                f"{path}: {name} = {stated.get(name)!r}: must be {expected!r}. Convert the checkpoint with the "
                "Megatron-core that wrote it, or import the model again."
            )
