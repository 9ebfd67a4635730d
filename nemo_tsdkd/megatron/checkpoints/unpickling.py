"""Restricted unpickling of checkpoints: only the classes below may be named, so that no foreign pickle runs code.

torch.distributed.checkpoint reads `weights/.metadata` with `pickle.load` and a checkpoint's byte entries (Megatron's
sharded objects, such as `_extra_state`) with `torch.load(weights_only=False)`, and Transformer Engine unpickles the
tensors in an `_extra_state` once more. All readers of NeMo, Megatron and torch go through the functions replaced here.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from nemo_tsdkd.config.validation import UserError

_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
# All names in a `.metadata` of torch.distributed.checkpoint or Megatron: records, enumerations and dtypes.
ADMITTED = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((f"{_DCP}.planner", name) for name in ("TensorWriteData", "BytesIOWriteData")),
    (_MCORE, "MCoreMetadata"),
    (_MCORE, "MCoreSavePlan"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}
_FIX = "Take the model from a source you trust, in safetensors if it can be had."


def install() -> None:
    """Put the restricted readers in place, for this process and all libraries in it."""
    # The module uses these two functions only; writing is unchanged.
    filesystem.pickle = SimpleNamespace(load=load_metadata, dump=pickle.dump)  # type: ignore[attr-defined]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    # torch.load's default is safe (common.pt is read with it) unless this variable is set.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise UserError(f"it names {module}.{name}, which no checkpoint's metadata needs and which could run code")
        return super().find_class(module, name)


def load_metadata(file: IO[bytes]) -> Metadata:
    """The object in a `.metadata` file, in place of `pickle.load`.

    Raises:
        UserError: the file is damaged, names a class that is not ADMITTED, or points out of its folder.
    """
    path = getattr(file, "name", ".metadata")
    try:
        metadata = _Unpickler(file).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
    except UserError as error:
        raise UserError(f"{path}: {error}. {_FIX}") from None
    except Exception as error:  # a file that is no pickle can raise anything
        raise UserError(f"{path}: is damaged ({error}). Copy or import the model again.") from error
    if outside := next((name for name in files if Path(name).name != name), None):
        raise UserError(f"{path}: names the file {outside!r}, which is not in its folder. {_FIX}")
    return metadata


def _load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes` with torch's own restricted unpickler.

    `_extra_state` is replaced by an empty tensor: Transformer Engine would unpickle it, and it holds only the history
    of delayed FP8 scaling, which is not used here.
    """
    name = read_item.dest_index.fqn
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # in which Transformer Engine 1.x wrapped its state
            content = torch.load(value, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(f"entry {name!r}", error)) from error
    if "_extra_state" in name:
        content = [torch.empty(0, dtype=torch.uint8)] * len(content)  # Megatron puts a list into every entry
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], content)
    else:
        planner.state_dict[name] = content


@contextmanager
def checkpoint_errors(checkpoint: Path) -> Iterator[None]:
    """Turn errors of the stack about a checkpoint's files into a UserError or OSError.

    Raises:
        UserError: the checkpoint is damaged, incomplete or could run code.
        OSError: the disk's error.
    """
    try:
        yield
    except CheckpointException as error:  # torch derives it from BaseException and hides the cause in it
        _raise_user_error(checkpoint, [cause for cause, _ in error.failures.values()])
        raise
    except pickle.UnpicklingError as error:  # of torch.load(weights_only=True)
        raise UserError(_refusal(f"{checkpoint / 'weights' / 'common.pt'}", error)) from error
    except (CheckpointingException, RuntimeError, OSError) as error:
        _raise_user_error(checkpoint, [error])
        raise


def _refusal(what: str, error: pickle.UnpicklingError) -> str:
    """What torch's restricted unpickler found, taken from its long message."""
    found = next((line.split("GLOBAL ")[1].split()[0] for line in str(error).splitlines() if "GLOBAL " in line), None)
    return f"{what} names {found}, which could run code. {_FIX}" if found else f"{what} is damaged ({error!r:.80})."


def _raise_user_error(checkpoint: Path, causes: list[BaseException]) -> None:
    for cause in causes:
        if isinstance(cause, UserError):
            raise UserError(cause.args[0] if str(checkpoint) in str(cause) else f"{checkpoint}: {cause}") from cause
    for cause in causes:
        if isinstance(cause, FileNotFoundError | CheckpointingException) or "PytorchStreamReader" in str(cause):
            said = " ".join(str(cause).split())
            raise UserError(f"{checkpoint}: is damaged ({said:.200}). Copy or import the model again.") from cause
        if isinstance(cause, OSError):
            raise cause
