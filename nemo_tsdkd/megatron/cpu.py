"""Lets real NeMo and Megatron code run on gloo where there is no GPU; does nothing where there is one.

WITHOUT A GPU, IMPORTING `nemo_tsdkd.megatron` CHANGES TORCH FOR THE WHOLE PROCESS: `torch.zeros` and the other
factories, `Tensor.to`, `Tensor.type`, `torch.compile`, `torch.cuda`, `torch.distributed.barrier`, and parts of Megatron
and NeMo. A line of the log says so. TSDKD_PATCH_TORCH=0 in the environment leaves all of them as they are; Megatron
then fails at its first CUDA call. `nemo_tsdkd.objective` and all other folders patch nothing.

Megatron names `torch.cuda` in hundreds of places. `install()` maps them to the CPU, so that the tests and the demo run
the production code. Every function below is one patch and says why it is needed; `install_nemo()` holds those that need
NeMo imported first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)
SWITCH = "TSDKD_PATCH_TORCH"
_installed = False
# Fields of Megatron's TransformerConfig that ask for CUDA kernels; off in every model while the stand-in is active.
missing_kernels: tuple[str, ...] = ()
_CUDA_KERNELS = (
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "bias_activation_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
)


def install() -> bool:
    """Map CUDA to the CPU once per process. Returns whether the stand-in is active."""
    global _installed, missing_kernels
    if _installed or torch.cuda.is_available() or os.environ.get(SWITCH) == "0":
        return _installed
    _installed, missing_kernels = True, _CUDA_KERNELS
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it for sequence parallelism
    # Megatron's jit_fuser compiles at import: without a GPU that costs a C++ compiler and minutes, for nothing.
    torch.compile = lambda model=None, *a, **k: model if model is not None else (lambda f: f)
    import megatron.core.tensor_parallel.random  # noqa: F401  before torch.cuda is patched: it inspects the real one

    for patch in (
        _factories,
        _moves,
        _tensor_types,
        _device_queries,
        _streams,
        _random_state,
        _barrier,
        _checkpoint_queue,
        _local_norm,
        _experts,
        _adam_state,
    ):
        patch()
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "No CUDA device: torch is patched in this process (torch.cuda, torch.zeros, Tensor.to, torch.compile and "
            "others) so that Megatron and NeMo run on the CPU with gloo. %s=0 leaves torch unchanged.",
            SWITCH,
        )
    return True


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)  # an int names a CUDA device


def _on_cpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: device="cuda" becomes the CPU, pinned memory ordinary memory."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return fn(*args, **kwargs)

    return wrapper


def _always(value: Any) -> Callable[..., Any]:
    """A new function on every call: torch._dynamo rejects one object under two names."""
    return lambda *args, **kwargs: value


def _factories() -> None:
    """Megatron allocates its buffers with device="cuda" or torch.cuda.current_device()."""
    from torch.utils import _device

    _device._device_constructors()  # torch remembers the originals, which `with torch.device("meta")` looks out for
    names = (
        "tensor as_tensor empty zeros ones full rand randn randint randperm arange linspace eye empty_like "
        "zeros_like ones_like full_like rand_like randn_like empty_strided scalar_tensor"
    )
    for name in names.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in "new_empty new_zeros new_ones new_full new_tensor".split():
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))


def _moves() -> None:
    """.cuda(), .to("cuda") and pin_memory() keep the tensor where it is."""

    def to(original: Callable[..., Any]) -> Callable[..., Any]:
        original = _on_cpu(original)

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args and not isinstance(args[0], torch.Tensor | torch.dtype) and _is_cuda(args[0]):
                args = ("cpu", *args[1:])
            return original(self, *args, **kwargs)

        return wrapper

    torch.Tensor.to, torch.nn.Module.to = to(torch.Tensor.to), to(torch.nn.Module.to)
    torch.Tensor.cuda = torch.nn.Module.cuda = torch.Tensor.pin_memory = lambda self, *a, **k: self
    torch.Tensor.record_stream = lambda self, *a, **k: None


def _tensor_types() -> None:
    """Megatron's optimizers compare tensor.type() with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_


def _device_queries() -> None:
    """Questions about the device get the answers of one idle A100-class GPU; memory figures are zero."""
    answers = {
        "current_device": torch.device("cpu"),
        "device_count": 1,
        "get_device_capability": (8, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "memory_stats": {},
        "mem_get_info": (8 << 30, 8 << 30),
    }
    for name in "set_device synchronize empty_cache ipc_collect reset_peak_memory_stats manual_seed_all".split():
        answers[name] = None
    for name in "memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split():
        answers[name] = 0
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))


class _Stream:
    """Stands for torch.cuda.Stream and Event: the CPU has one stream, always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    synchronize = wait = wait_event = wait_stream = record = _nothing


def _streams() -> None:
    """DDP, the schedules and checkpointing order their work with streams and events."""
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *a, **k: _Stream()
    torch.cuda.stream = torch.cuda.device = lambda *a: contextlib.nullcontext()


def _random_state() -> None:
    """Megatron's RNG tracker forks CUDA generators: here it forks the CPU's, which it would warn of at every fork."""
    import megatron.core.tensor_parallel.random as tracker

    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _barrier() -> None:
    """gloo rejects the device_ids that NeMo passes."""
    original = torch.distributed.barrier
    torch.distributed.barrier = lambda group=None, async_op=False, device_ids=None: original(group, async_op)


def _checkpoint_queue() -> None:
    """Megatron starts a manager server per rank and save; killed ranks leave orphans. A forked queue has none."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    class ResultsQueue:
        def __init__(self) -> None:
            queue = multiprocessing.get_context("fork").Queue()
            self.put, self.get_nowait = queue.put, functools.partial(queue.get, timeout=60)

    def results_queue() -> ResultsQueue:
        filesystem_async._results_queue = filesystem_async._results_queue or ResultsQueue()
        return filesystem_async._results_queue

    filesystem_async._get_write_results_queue = results_queue


def _local_norm() -> None:
    """The norm of the spec without Transformer Engine refuses sequence parallelism, which needs only a mark."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = plain.persist_layer_norm = False
        norm = original(cls, plain, hidden_size, eps, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # its gradient is summed over TP
        return norm

    WrappedTorchNorm.__new__ = new


def _experts() -> None:
    """The router looks for a function of Transformer Engine's that was never imported without it; and the sizes of an
    all-to-all become lists only where they come from a GPU: gloo takes no tensors for them."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    token_dispatcher.maybe_move_tensor_to_cpu = sizes


def _adam_state() -> None:
    """torch's Adam, without Transformer Engine and Apex, has no state before its first step and keeps `step` as a
    tensor: the distributed optimizer's state_dict() asserts on the first and its loading forgets, or shares, the
    second. FusedAdam keeps no step in its state and needs none of this."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE:
        return
    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def full_state_dict(self: Any) -> Any:
        if not self.is_stub_optimizer and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    self.optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        return state_dict(self)

    def set_own_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    DistributedOptimizer.state_dict = full_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_own_states


def install_nemo() -> None:
    """The patches on NeMo itself; call after importing it."""
    if _installed:
        _checkpoint_devices()
        _progress_printer()
        _reported_device()


def _checkpoint_devices() -> None:
    """NeMo asserts torch.cuda.is_initialized() before it moves loaded tensors to the GPU."""
    import nemo.lightning.io.pl as io_pl

    io_pl._fix_tensors_device = lambda checkpoint: checkpoint


def _progress_printer() -> None:
    """Rank 0 alone joins an all-gather of timers: NCCL's is lazy, gloo's hangs."""
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    ProgressPrinter.log_megatron_timers = lambda self, timers: None


def _reported_device() -> None:
    """Lightning counts devices to say whether there is a GPU, and the stand-in has one."""
    from lightning.pytorch.accelerators.cuda import CUDAAccelerator

    CUDAAccelerator.is_available = staticmethod(lambda: False)
