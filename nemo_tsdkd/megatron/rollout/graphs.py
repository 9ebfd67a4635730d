"""CUDA graphs of decode steps: a step is thousands of small kernels, whose launches take longer than their work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nemo_tsdkd.distributed.vocab_parallel import group_size

logger = logging.getLogger(__name__)
Region = Callable[[], None]  # device work on fixed tensors, without values from or for the host
Capture = Callable[[Region], Region]  # from a region to a function that repeats its device work
_warned: set[str] = set()


class CudaCapture:
    """Captures regions into CUDA graphs that share one memory pool: they never run at the same time, and no tensor of
    the pool is used after its region."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, region: Region) -> Region:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks for the state of earlier work from its own thread meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            region()
        return graph.replay


def why_eager(device: torch.device, tp_group: ProcessGroup | None) -> str | None:
    """Why no CUDA graph can be captured, as text; None if one can."""
    if device.type != "cuda":
        return "the model is not on a CUDA device"
    if group_size(tp_group) > 1 and dist.get_backend(tp_group) != dist.Backend.NCCL:
        return f"the tensor-parallel group's backend is {dist.get_backend(tp_group)}, and only NCCL's can be captured"
    return None


def new_capture(mode: str, device: torch.device, tp_group: ProcessGroup | None) -> Capture | None:
    """The capture for `rollout.cuda_graphs = mode`; None: regions run eagerly."""
    if mode == "off":
        return None
    reason = why_eager(device, tp_group)
    if reason:
        if not dist.is_initialized() or dist.get_rank() == 0:  # the reason is the same on every rank
            warn_once(reason)
        return None
    return CudaCapture()


def warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("rollouts decode without CUDA graphs: %s", reason)


class Regions:
    """Runs repeated regions, each with a key: the first time eagerly, which initializes cuBLAS and NCCL; then as a
    graph replay, if there is a `capture`."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self.runs: dict[Hashable, int] = {}  # how often each key has run
        self._replays: dict[Hashable, Region] = {}

    @property
    def captured(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable, region: Region) -> None:
        self.runs[key] = self.runs.get(key, 0) + 1
        if key in self._replays or (self.runs[key] > 1 and self._captured(key, region)):
            self._replays[key]()
        else:
            region()

    def _captured(self, key: Hashable, region: Region) -> bool:
        if self._capture is None:
            return False
        try:
            self._replays[key] = self._capture(region)
        except RuntimeError as error:  # CUDA's and NCCL's; nothing of the region has run
            warn_once(f"capturing {key} failed ({str(error).splitlines()[0]})")
            self._capture = None
            self._replays.clear()
            return False
        return True

    def clear(self) -> None:
        """Drop every graph: its inputs have moved, or its memory is needed."""
        self._replays.clear()
        self.runs.clear()
