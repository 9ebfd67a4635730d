"""Transformer Engine on the CPU: the Python of its released wheel over a stand-in of its C++ extension.

Transformer Engine 2.11.0 is 30,000 lines of Python (modules, recipes, quantized tensors, context-parallel attention,
FusedAdam) over an extension of CUDA kernels. `extension/` computes in plain torch what those kernels compute for a
dense GPT on a Hopper GPU; `patches.py` lets the Python above believe that it runs on one; `wheel.py` fetches it.

What a green test over it means: **wiring** (which module, recipe, quantizer, group and flag is used where), **recipe**
(formats, scales, which tensors are FP8, when weights are quantized anew), **layouts** (sequence- and context-parallel
shards, column-wise copies, padding rules) and checkpoints are right, in the real code of Megatron, NeMo and Transformer
Engine. FP8 data are real: `torch.float8_*` bytes, their scales by the kernels' rule; products are taken in fp32 of the
dequantized values. It means nothing for kernels (how cuBLAS and cuDNN accumulate, which plan they take), NCCL, streams,
memory or speed: those only a GPU can tell.

The rules of Hopper that the stand-in enforces come from the sources of release v2.11 of NVIDIA/TransformerEngine, named
where they are checked. What it does not model raises `NotModelled`; nothing is computed approximately in silence.
"""

import importlib
from pathlib import Path


class NotModelled(NotImplementedError):
    """The stand-in was asked for something that it does not compute."""


class KernelError(RuntimeError):
    """A Hopper GPU would refuse this call."""


def require(condition: bool, rule: str) -> None:
    """Raise KernelError unless what the kernels require holds."""
    if not condition:
        raise KernelError(f"transformer_engine_torch: {rule}")


def modelled(condition: bool, what: str) -> None:
    """Raise NotModelled unless the call is one that the stand-in computes."""
    if not condition:
        raise NotModelled(f"the stand-in of transformer_engine_torch does not model {what}")


def start_ranks() -> None:
    """From here on, `ranks.run_ranks` starts ranks with Transformer Engine. Raises `wheel.Unavailable`."""
    importlib.import_module("te_stand_in.wheel").fetch()
    engine = Path(__file__).parents[1]
    path = [engine, engine.parent, engine.parents[1]]
    importlib.import_module("ranks").start_anew(["torch", "te_stand_in.preload"], path)


def require_active() -> None:
    """Fail unless this rank came from the fork server with Transformer Engine: it says nothing of a failed import."""
    importlib.import_module("te_stand_in.preload")
    assert importlib.import_module("nemo.collections.llm.gpt.model.base").HAVE_TE
