"""The tensors of a NeMo checkpoint one by one: where each lies in it, and which tensors of a Hugging Face folder it is.

All layers of a model are alike, so a Megatron model of one layer tells where those of all layers lie. No rank holds
more of a model than its share.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from nemo.collections import llm
from nemo.lightning.io.state import TransformFns
from safetensors import safe_open
from torch import Tensor

from nemo_tsdkd.checkpoints.tensor_files import StoredTensor, stored_tensors
from nemo_tsdkd.megatron.checkpoints.hf import source_patterns

PREFIX = "module."  # NeMo's checkpoints hold the model under this name, beside optimizer state
_LAYER = "decoder.layers.0."


def one_layer(config: llm.GPTConfig) -> llm.GPTConfig:
    """The config of the same model with a single layer."""
    config = copy.copy(config)
    config.num_layers = 1
    return config


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint.

    Attributes:
        name: of the parameter in a Megatron model with one layer.
        layer: that it belongs to; None outside of the layers.
        place: where it lies in the checkpoint, without data.
        sources: Hugging Face's names of the tensors that it holds.
    """

    name: str
    layer: int | None
    place: ShardedTensor
    sources: tuple[str, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.place.local_shape)

    def filled(self, data: Tensor) -> ShardedTensor:
        """With `data`, as its only copy."""
        return replace(self.place, data=data.view(self.place.local_shape), dtype=data.dtype, replica_id=0)


def pieces_of(gpt: MCoreGPTModel, layers: Sequence[int], count: int) -> list[Piece]:
    """The pieces of the given layers, and those outside of the layers.

    Args:
        gpt: a Megatron model with one layer (`one_layer`), in a world without model parallelism.
        layers: numbers of layers.
        count: the model's layers.
    """
    pieces = []
    for key, part in gpt.sharded_state_dict(prefix=PREFIX).items():
        name = key.removeprefix(PREFIX)
        if "_extra_state" in name:  # empty where nothing is FP8
            continue
        places = part.build() if isinstance(part, ShardedTensorFactory) else [part]
        for layer in layers if name.startswith(_LAYER) else (None,):
            sources = _sources(gpt, name, layer)
            groups = [(source,) for source in sources] if len(places) > 1 else [sources]
            for place, group in zip(places, groups, strict=True):
                pieces.append(Piece(name, layer, _moved(place, layer, count), group))
    return pieces


def _sources(gpt: MCoreGPTModel, name: str, layer: int | None) -> tuple[str, ...]:
    """Hugging Face's names of what a parameter of a one-layer model is in layer `layer`."""
    for pattern, sources in source_patterns(gpt).items():
        if found := re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name):
            numbers = [str(number) for number in (layer, *found.groups()[1:])] if found.groups() else []
            return tuple(_numbered(source, numbers) for source in sources)
    raise RuntimeError(f"{name}: no tensor of a Hugging Face folder is known for this parameter.")


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _moved(place: ShardedTensor, layer: int | None, count: int) -> ShardedTensor:
    """From the only layer of one to layer `layer` of `count`; layers lie one behind the other along the first axis.

    The axes of layers and experts are the tensor's own here, not prepended ones: a tensor with prepended axes cannot
    be read in part by a single rank (Megatron 0.15).
    """
    axes = place.prepend_axis_num
    place = replace(place, data=None, local_shape=(1,) * axes + place.local_shape, prepend_axis_num=0)
    if layer is None:
        return place
    shape, offset, parts = place.global_shape, place.global_offset, place.axis_fragmentations
    assert axes and shape[0] == parts[0] == 1, place
    return replace(
        place,
        global_shape=(count, *shape[1:]),
        global_offset=(layer, *offset[1:]),
        axis_fragmentations=(count, *parts[1:]),
    )


def share_of(pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """The pieces of one of `ranks` ranks, which hold about the same number of parameters: the largest first, each to
    the rank with the fewest so far."""
    held, shares = [0] * ranks, [[] for _ in range(ranks)]
    for piece in sorted(pieces, key=lambda piece: -piece.numel):
        at = held.index(min(held))
        held[at] += piece.numel
        shares[at].append(piece)
    return shares[rank]


class HFWeights:
    """The tensors of a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._stored: dict[str, StoredTensor] = stored_tensors(folder)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in memory of its own."""
        with safe_open(self._stored[name].file, framework="pt") as content:  # closed, it leaves no page mapped
            return content.get_tensor(name).to(dtype, copy=True)

    def fill(self, piece: Piece, gpt: MCoreGPTModel, dtype: torch.dtype) -> ShardedTensor:
        """A piece with its data; `gpt` says how q, k and v lie in one tensor."""
        parts = [self.read(name, dtype) for name in piece.sources]
        if len(parts) > 1:
            merge: Any = TransformFns.merge_qkv if parts[0].dim() > 1 else TransformFns.merge_qkv_bias
            parts = [merge(SimpleNamespace(target=gpt), *parts)]
        return piece.filled(parts[0])
