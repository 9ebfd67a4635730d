"""Lets Transformer Engine's Python believe that it runs on a Hopper GPU. Every function is one patch and says why."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def before_megatron() -> None:
    """What must stand before anything imports Megatron; torch itself is still as it came."""
    for patch in (_no_compilation, _no_libraries, _no_onnx, _extension, _package):
        patch()


def after_megatron() -> None:
    """What adds to the project's own stand-in for CUDA (`nemo_tsdkd/megatron/cpu.py`), or replaces an answer of it."""
    for patch in (
        _hopper,
        _tensors_are_cuda,
        _cuda_is_available,
        _random_state,
        _coalesced_collectives,
        _requests_waited_for_once,
        _fused_kernels,
    ):
        patch()


def _no_compilation() -> None:
    """Transformer Engine compiles its small functions at their first call: a C++ compiler and minutes, for nothing."""
    torch.compile = lambda model=None, *a, **k: model if model is not None else (lambda f: f)


def _no_libraries() -> None:
    """The package loads cuDNN, NVRTC and its core at import, unless it believes that it is being built."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ.pop("NVTE_RELEASE_BUILD", None)


def _no_onnx() -> None:
    """Export to ONNX imports onnxscript, which nothing here uses."""
    module = types.ModuleType("transformer_engine.pytorch.onnx_extensions")
    module.__getattr__ = lambda name: None  # type: ignore[method-assign]
    sys.modules[module.__name__] = module


def _extension() -> None:
    """The stand-ins under the names of the extensions, Transformer Engine's and Apex's."""
    sys.modules["transformer_engine_torch"] = importlib.import_module("te_stand_in.extension")
    sys.modules["fused_weight_gradient_mlp_cuda"] = importlib.import_module("te_stand_in.apex")


def _package() -> None:
    """The package's loader insists on a library file, and the package hides an ImportError of its own modules."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec and spec.loader, "Transformer Engine's wheel is not on the path"
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")


def _hopper() -> None:
    """Which recipes are allowed, and whether a transposed FP8 operand needs its own copy, follows from the device."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="stand-in H100", total_memory=80 << 30
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.version.cuda = "12.9"


def _tensors_are_cuda() -> None:
    """Transformer Engine's modules assert that a tensor is on the GPU. All others hear the truth."""
    real = torch.Tensor.is_cuda.__get__

    def is_cuda(self: torch.Tensor) -> bool:
        asks = sys._getframe(1).f_globals.get("__name__", "")
        return asks.startswith("transformer_engine.") or real(self)

    torch.Tensor.is_cuda = property(is_cuda)


class _Changed(types.ModuleType):
    """A module with some names changed, for the eyes of one importer."""

    def __init__(self, module: Any, **changes: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(changes, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _cuda_is_available() -> None:
    """Transformer Engine must see CUDA; NeMo, Lightning and the project must not."""
    seen = _Changed(torch, cuda=_Changed(torch.cuda, is_available=lambda: True))
    for name in ("module.base", "attention.dot_product_attention.backends"):
        importlib.import_module(f"transformer_engine.pytorch.{name}").torch = seen


def _random_state() -> None:
    """Its trackers of random states read CUDA generators: here the CPU's."""
    distributed = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=True: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, device=-1, graph_safe=True: torch.set_rng_state(state)


def _coalesced_collectives() -> None:
    """Bytes and scales of FP8 blocks are gathered in one NCCL call: gloo makes one each, all done when it returns."""

    class Done:
        def wait(self) -> None: ...

    @contextlib.contextmanager
    def one_by_one(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Done]:
        yield Done()

    dist._coalescing_manager = one_by_one


def _requests_waited_for_once() -> None:
    """Ring attention waits twice for a request: NCCL returns at once, gloo waits for a second message for ever."""
    ring = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")

    class Once:
        def __init__(self, request: Any) -> None:
            self.request = request

        def wait(self) -> None:
            if self.request is not None:
                self.request.wait()
            self.request = None

    communicate = ring.flash_attn_p2p_communicate
    ring.flash_attn_p2p_communicate = lambda *a, **k: [Once(request) for request in communicate(*a, **k)]


def _fused_kernels() -> None:
    """The project turns fusions off whose kernels a CPU lacks. The stand-ins have Transformer Engine's rotary embedding
    and Apex's accumulating product; what is left are kernels that Transformer Engine's layers do not use."""
    cpu = importlib.import_module("nemo_tsdkd.megatron.cpu")
    cpu.missing_kernels = ("masked_softmax_fusion", "persist_layer_norm", "moe_permute_fusion")
