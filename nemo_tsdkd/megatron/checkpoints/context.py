"""The model config in a NeMo checkpoint's `context/io.json`, a graph of Python names, read without running any code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
from fiddle._src.config import BuildableTraverserMetadata
from fiddle._src.experimental import serialization
from megatron.core import activations
from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import default_layer_spec
from torch.nn import functional

from nemo_tsdkd.config.validation import UserError

_CONFIGS = "nemo.collections.llm.gpt.model."  # NeMo's GPT configs are in these modules, besides other code
_NODES = {  # allowed types of the graph's objects
    ("fiddle._src.config", "Config"): fdl.Config,
    ("fiddle._src.config", "BuildableTraverserMetadata"): BuildableTraverserMetadata,
    ("builtins", "tuple"): tuple,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
}
_VALUES = {  # allowed values of a config's fields, besides numbers, strings and dtypes
    ("torch.nn.functional", "silu"): functional.silu,
    ("torch.nn.functional", "gelu"): functional.gelu,
    ("torch._C._nn", "gelu"): functional.gelu,
    ("torch.nn.functional", "relu"): functional.relu,
    ("megatron.core.activations", "squared_relu"): activations.squared_relu,
    ("megatron.core.activations", "quick_gelu"): activations.quick_gelu,
    ("megatron.core.activations", "fast_gelu"): activations.fast_gelu,
    (f"{_CONFIGS}base", "default_layer_spec"): default_layer_spec,
    **{("megatron.core.transformer.enums", f"AttnBackend.{value.name}"): value for value in AttnBackend},
}
_ROOT = "<root>.model.config"
_FIX = "Import the model again with `nemo-tsdkd import`, from a source you trust."


class _NeMoConfigsOnly(serialization.PyrefPolicy):
    def allows_import(self, module: str, symbol: str) -> bool:
        is_dtype = module == "torch" and isinstance(getattr(torch, symbol, None), torch.dtype)
        return is_dtype or (module, symbol) in _NODES | _VALUES or module.startswith(_CONFIGS)

    def allows_value(self, value: Any) -> bool:
        if isinstance(value, torch.dtype) or any(value is known for known in (_NODES | _VALUES).values()):
            return True
        return isinstance(value, type) and issubclass(value, llm.GPTConfig)


def read_gpt_config(checkpoint: Path) -> llm.GPTConfig:
    """NeMo's config of the model in a checkpoint that this package did not write.

    Raises:
        UserError: no such file, no model config in it, or one that names anything but NeMo's GPT configs, activation
            functions and dtypes.
    """
    path = checkpoint / "context" / "io.json"
    try:
        graph = json.loads(path.read_text())
        objects = graph["objects"]
        key = next(key for key, value in objects.items() if _ROOT in value.get("paths", ()))
        # Not needed here; NeMo would load it from any path that it names.
        objects[key]["items"] = [
            [name, {"type": "leaf", "value": None} if "generation_config" in name else value]
            for name, value in objects[key]["items"]
        ]
        for kind in _node_types(objects[key], objects):
            if kind not in _NODES:
                raise UserError(f"{path}: constructs {'.'.join(kind)}, not a NeMo configuration. {_FIX}")
        graph["root"] = {"type": "ref", "key": key}
        config = fdl.build(serialization.Deserialization(graph, _NeMoConfigsOnly()).result)
    except serialization.PyrefPolicyError as error:
        raise UserError(f"{path}: names {error.module}.{error.symbol}, which could run code. {_FIX}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a complete NeMo checkpoint.") from error
    except UserError:
        raise
    except Exception as error:  # JSON that is no graph, a graph that is no config, arguments that the config lacks
        raise UserError(f"{path}: holds no model config that this NeMo can read ({error!r:.120}). {_FIX}") from error
    if not isinstance(config, llm.GPTConfig):
        raise UserError(f"{path}: {_ROOT} is a {type(config).__name__}, not a GPT config. {_FIX}")
    return config


def _node_types(value: Any, objects: dict[str, Any], seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """(module, name) of every object of the graph that is reached from `value`."""
    seen = set() if seen is None else seen
    if isinstance(value, list):
        for item in value:
            yield from _node_types(item, objects, seen)
    elif isinstance(value, dict) and isinstance(value["type"], dict):
        yield value["type"]["module"], value["type"]["name"]
        yield from _node_types([value["items"], value["metadata"]], objects, seen)
    elif isinstance(value, dict) and value["type"] == "ref" and value["key"] not in seen:
        seen.add(value["key"])
        yield from _node_types(objects[value["key"]], objects, seen)
