"""What `torch.compile` makes of a function for an H100, found out without a GPU.

The function is compiled for real, from fake tensors on "cuda", up to the code that would be loaded; then Triton
compiles each kernel of it for sm_90 and NVIDIA's assembler says what registers it takes. Only the questions that
torch and Triton ask a device are answered here, with an H100's figures. These are private interfaces: of torch as
constraints-cpu.txt has it, of Triton as pyproject.toml's extra `compile`. A new release of either may want this file
changed; nothing of the package depends on it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers
from triton import knobs
from triton.backends.compiler import GPUTarget

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
PROPERTIES = hints.DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=H100.multi_processor_count,
    cc=90,
    major=9,
    regs_per_multiprocessor=H100.regs_per_multiprocessor,
    max_threads_per_multi_processor=H100.max_threads_per_multi_processor,
    warp_size=32,
)


class Driver:
    """The part of Triton's driver that compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def h100() -> Iterator[None]:
    """torch and Triton believe that this machine has one."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    with ExitStack() as stack:
        for target, name, answer in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "get_device_properties", lambda *_: H100),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "_exchange_device", lambda *_: 0),
            (torch.cuda, "_maybe_exchange_device", lambda *_: 0),
            (torch.cuda, "get_rng_state", lambda *_: torch.empty(0)),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: H100)),
            (scheduler, "has_triton", lambda: True),  # its own answer is kept from before
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (hints.DeviceProperties, "create", classmethod(lambda *_: PROPERTIES)),
        ):
            stack.enter_context(mock.patch.object(target, name, answer))
        try:
            yield
        finally:
            triton.runtime.driver._active = before


class _Generated(Exception):
    pass


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    spilled: int  # bytes moved to local memory and back


def kernels(call: Callable[..., object], *args: object) -> list[list[Kernel]]:
    """The kernels of `generated_code(call, *args)`, each in all the forms of which a GPU would choose one by time."""
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        code = generated_code(call, *args)
        sources = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", code, re.S)
        body = re.sub("#.*", "", code[code.index("def call(") :])
        launches = re.findall(r"\w+\.run\(|extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(", body)
        assert sources and len(launches) == len(sources), launches
        return [_forms(name, source) for name, source in sources]


def generated_code(call: Callable[..., object], *args: object) -> str:
    """The module that torch.compile writes for call(*args) if args were on a GPU; args are fake tensors of a CPU.

    They move to "cuda" in the graph, after it is free of operators that overwrite: those torch refuses to imitate
    where it is built without CUDA.
    """
    found: list[str] = []

    def moved(graph: torch.fx.GraphModule, inputs: list, *rest, **options):
        with detect_fake_mode(inputs):
            inputs = [_like(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
        with h100():
            return generate(graph, inputs, *rest, **options)

    def stop(code: str) -> None:
        found.append(code)
        raise _Generated

    generate = compile_fx.fx_codegen_and_compile
    torch._dynamo.reset()
    with (
        mock.patch.object(compile_fx, "fx_codegen_and_compile", moved),
        mock.patch.object(GraphLowering, "save_output_code", stop),
        inductor_config.patch(compile_threads=1),
    ):
        try:
            call(*args)
        except Exception:
            if not found:
                raise
    return found[0]


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=torch.device("cuda", 0))


def _forms(name: str, source: str) -> list[Kernel]:
    with h100(), inductor_config.patch(use_static_cuda_launcher=False):
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        return [Kernel(name, *_assembled(result.kernel.asm["ptx"])) for result in kernel.compile_results]


def _assembled(ptx: str) -> tuple[int, int]:
    command = [knobs.nvidia.ptxas_blackwell.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "/dev/stdin"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers and spilled, said
    return int(registers[1]), int(spilled[1]) + int(spilled[2])
