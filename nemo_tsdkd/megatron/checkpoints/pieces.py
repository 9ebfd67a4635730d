"""The tensors of a NeMo checkpoint one by one: where each lies in it, and which tensors of a Hugging Face folder it is.

All layers of a model are alike, so a Megatron model of one layer says where those of all layers lie, and no rank holds
more of a model than its share.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
_LAYER = "decoder.layers.{}."


def one_layer(config: llm.GPTConfig) -> llm.GPTConfig:
    """The config of the same model with a single layer."""
    config = copy.copy(config)
    config.num_layers = 1
    return config


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint: a parameter, or one half of an MLP's first layer.

    Attributes:
        name: of the parameter in a Megatron model with one layer.
        layer: that it belongs to; None outside of the layers.
        half: 0 or 1; None: all of the parameter.
        place: where it lies in the checkpoint, without data.
    """

    name: str
    layer: int | None
    half: int | None
    place: ShardedTensor

    @property
    def numel(self) -> int:
        return math.prod(self.place.local_shape)

    def filled(self, data: Tensor) -> ShardedTensor:
        """With `data`, as its only copy."""
        return replace(self.place, data=data.view(self.place.local_shape), dtype=data.dtype, replica_id=0)


def pieces_of(gpt: MCoreGPTModel, count: int) -> list[Piece]:
    """All pieces of the checkpoint of a model with `count` layers, as Megatron places them.

    Args:
        gpt: that model with one layer (`one_layer`), in a world without model parallelism.
    """
    pieces = [piece for piece in _pieces(gpt.sharded_state_dict(prefix=PREFIX), 0) if piece.layer is None]
    layer = gpt.decoder.layers[0]
    gpt.decoder.config.num_layers = count
    try:
        for number in range(count):
            layer.layer_number = number + 1
            of_decoder = _pieces(gpt.decoder.sharded_state_dict(prefix=f"{PREFIX}decoder."), number)
            pieces += [piece for piece in of_decoder if piece.layer is not None]
    finally:
        gpt.decoder.config.num_layers = layer.layer_number = 1
    return pieces


def _pieces(parts: Mapping[str, Any], layer: int) -> Iterator[Piece]:
    for key, part in parts.items():
        name = key.removeprefix(PREFIX)
        if "_extra_state" in name:  # empty where nothing is FP8
            continue
        of_layer = name.startswith(_LAYER.format(layer))
        name = name.replace(_LAYER.format(layer), _LAYER.format(0))
        places = part.build() if isinstance(part, ShardedTensorFactory) else [part]
        for half, place in enumerate(places):
            yield Piece(name, layer if of_layer else None, half if len(places) > 1 else None, _without_data(place))


def _without_data(place: ShardedTensor) -> ShardedTensor:
    """The axes of layers and experts become the tensor's own: a tensor with prepended axes cannot be read in part by a
    single rank (Megatron 0.15)."""
    axes = place.prepend_axis_num
    return replace(place, data=None, local_shape=(1,) * axes + tuple(place.local_shape), prepend_axis_num=0)


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


class Conversion:
    """Pieces filled from a Hugging Face folder.

    Args:
        weights: the folder's.
        gpt: Megatron's model with one layer.
        dtype: of the pieces.
    """

    def __init__(self, weights: HFWeights, gpt: MCoreGPTModel, dtype: torch.dtype) -> None:
        self._weights, self._gpt, self._dtype = weights, gpt, dtype
        self._patterns = [
            (re.compile(re.escape(megatron).replace(r"\*", r"(\d+)")), names)
            for megatron, names in source_patterns(gpt).items()
        ]

    def fill(self, piece: Piece) -> ShardedTensor:
        """Raises RuntimeError for a parameter of which Hugging Face has no tensor."""
        names = self._sources(piece)
        parts = [self._weights.read(name, self._dtype) for name in names]
        if len(parts) > 1:
            merge: Any = TransformFns.merge_qkv if parts[0].dim() > 1 else TransformFns.merge_qkv_bias
            parts = [merge(SimpleNamespace(target=self._gpt), *parts)]
        return piece.filled(parts[0])

    def _sources(self, piece: Piece) -> tuple[str, ...]:
        """Hugging Face's names of the tensors in a piece."""
        for pattern, names in self._patterns:
            if found := pattern.fullmatch(piece.name):
                numbers = (piece.layer, *found.groups()[1:])  # of the layer and the expert
                filled = tuple(_numbered(name, numbers) for name in names)
                return filled if piece.half is None else filled[piece.half : piece.half + 1]
        raise RuntimeError(f"{piece.name}: no tensor of a Hugging Face folder is known for this parameter.")


def _numbered(pattern: str, numbers: Sequence[Any]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", str(number), 1)
    return pattern
