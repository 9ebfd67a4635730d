"""The single checks of `nemo-tsdkd preflight`: versions, GPU, shared folder, network. No NeMo, no Megatron."""

from __future__ import annotations

import os
import secrets
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.memory import GIB, RESERVE, per_stage, teacher_per_gpu
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed.launch import Launch
from nemo_tsdkd.reporting.provenance import version_of

# Another release of these than pyproject.toml asks for fails at once or after hours, or trains something else.
DECISIVE = ("torch", "nemo_toolkit", "megatron-core", "numpy", "transformers", "lightning")
BUSY = 2 * GIB  # our own context is half a GiB; more in use before we start is another process
PROBE_ELEMENTS = {"nccl": 2**24, "gloo": 2**16}  # fp32 elements of an all-reduce


def check_versions() -> None:
    """Raise UserError unless the stack is what the installed package's own requirements ask for."""
    try:
        requirements = [Requirement(text) for text in requires("nemo-tsdkd") or ()]
    except PackageNotFoundError:
        raise UserError(
            "nemo-tsdkd is on Python's path, but not installed: its requirements cannot be read. "
            "Install it with pip install --no-deps --editable FOLDER."
        ) from None
    for needed in requirements:
        found = version_of(needed.name)
        # A container's torch is a pre-release by its name (2.10.0a0+...).
        if needed.name in DECISIVE and (found == "absent" or not needed.specifier.contains(found, prereleases=True)):
            raise UserError(f"{needed.name} is {found}, but must be {needed.specifier}: docs/cluster.md, step 1.")


def check_gpu(place: Launch, gpus_per_node: int, allow_cpu: bool) -> None:
    """Raise UserError unless this rank has a GPU of its own that nobody uses."""
    import torch

    if not torch.cuda.is_available():
        if allow_cpu:
            return
        raise UserError("torch sees no CUDA device. Check nvidia-smi on the node; --allow-cpu trains on the CPU.")
    if torch.cuda.device_count() < gpus_per_node:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible, parallel.gpus_per_node is {gpus_per_node}. "
            "Ask for more or lower it: docs/cluster.md, settings."
        )
    free, total = torch.cuda.mem_get_info(place.local_rank)
    if total - free > BUSY:
        raise UserError(
            f"GPU {place.local_rank} already has {(total - free) / GIB:.1f} GiB in use. "
            "Find the left-over process with nvidia-smi, or exclude the node with sbatch --exclude."
        )


def check_gpu_memory(config: TrainConfig, shapes: dict[str, ModelShape]) -> None:
    """Raise UserError if the weights, gradients and optimizer states alone are larger than this rank's GPU."""
    import torch

    if len(shapes) < 2 or not torch.cuda.is_available():
        return
    need = max(stage.weights for stage in per_stage(config, **shapes))
    have = torch.cuda.mem_get_info()[1]
    if config.teacher.nodes:  # one node may hold either model
        need = max(need, teacher_per_gpu(config, **shapes) - RESERVE)
    if need > have:
        raise UserError(
            f"weights, gradients and optimizer need {need / GIB:.1f} GiB a GPU, it has {have / GIB:.1f}. "
            "Raise TP or PP, or add nodes."
        )


class SharedFolder:
    """A file in the run folder that every node must see, and one from every node that rank 0 must see.

    `wait` is in seconds: a network file system may show a new file to the other nodes only after a while.
    """

    def __init__(self, run_dir: str, place: Launch, store: Any, wait: float) -> None:
        attempt = f"{os.environ.get('SLURM_JOB_ID', 'local')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self.folder = Path(run_dir, f".preflight-{attempt}")
        self.place, self.store, self.wait = place, store, wait

    def show(self) -> None:
        """Rank 0 writes the file; the first rank of every other node finds it and answers."""
        if self.place.rank == 0:
            token = secrets.token_hex(8)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "rank_0").write_text(token)
            self.store.set("rank_0", token)
        elif self.place.local_rank == 0:
            token = self.store.get("rank_0").decode()
            if not _appears(self.folder / "rank_0", token, self.wait):
                raise UserError(f"{self.folder.parent}: rank 0's file is not seen. run_dir must be on a shared disk.")
            (self.folder / str(self.place.node)).write_text(token)

    def check_answers(self, nodes: list[str]) -> None:
        """On rank 0, after every node has answered: raise UserError naming the nodes whose file is not there."""
        token = (self.folder / "rank_0").read_text()
        blind = [name for i, name in enumerate(nodes) if i > 0 and not _appears(self.folder / str(i), token, self.wait)]
        if blind:
            raise UserError(f"{self.folder.parent}: files of {', '.join(blind)} are not seen. Check their mounts.")

    def remove(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


class Network:
    """All-reduces inside each node, over all nodes, and over gloo, each checked by its sum."""

    def __init__(self, place: Launch, gpus_per_node: int) -> None:
        self.place, self.gpus_per_node = place, gpus_per_node

    def connect(self, store: Any, timeout: Any) -> None:
        import torch
        import torch.distributed as dist

        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._device = f"cuda:{self.place.local_rank}" if backend == "nccl" else "cpu"
        self._elements = PROBE_ELEMENTS[backend]
        size = self.place.world_size
        dist.init_process_group(backend, store=store, rank=self.place.rank, world_size=size, timeout=timeout)
        starts = range(0, size, self.gpus_per_node)
        groups = [dist.new_group(list(range(s, s + self.gpus_per_node))) for s in starts]
        self._node_group = groups[self.place.rank // self.gpus_per_node]
        self._gloo = dist.new_group(backend="gloo", timeout=timeout)

    def inside_node(self) -> None:
        self._all_reduce(self._node_group, self.gpus_per_node)

    def over_nodes(self) -> None:
        self._all_reduce(None, self.place.world_size)

    def between_hosts(self) -> None:
        """Gloo, over which ranks wait for each other and Megatron saves."""
        self._all_reduce(self._gloo, self.place.world_size, "cpu", PROBE_ELEMENTS["gloo"])

    def _all_reduce(self, group: Any, size: int, device: str | None = None, elements: int | None = None) -> None:
        import torch
        import torch.distributed as dist

        x = torch.ones(elements or self._elements, device=device or self._device)
        dist.all_reduce(x, group=group)
        if not bool((x == size).all()):
            raise UserError(f"an all-reduce of ones over {size} ranks gave {x.min().item()} to {x.max().item()}.")


def _appears(path: Path, content: str, wait: float) -> bool:
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False
