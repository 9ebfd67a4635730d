"""Training checkpoints: what is in one, when it counts, and how a run goes on from it.

`checkpoints/step_N` holds NeMo's distributed checkpoint (student, optimizer, schedule, loops, consumed samples), the
source's config and tokenizer, and each rank's random state. Its manifest comes last: `integrity.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_tsdkd.config import CheckpointConfig
from nemo_tsdkd.folders import HF_ASSETS, copy_assets
from nemo_tsdkd.integrity import describe, newest_whole, remove, retain, seal, step_folder


def save(trainer: pl.Trainer, run_dir: Path, source: Path, config: CheckpointConfig) -> None:
    """Write, prove and declare the checkpoint of this step; then the old ones may go. Collective.

    Args:
        source: the imported student the run began with, for its config and tokenizer.
    """
    step, rank, world_size = trainer.global_step, dist.get_rank(), dist.get_world_size()
    folder = step_folder(run_dir, step)
    if rank == 0:
        remove(folder)  # what a killed save of this step left
    dist.barrier()
    trainer.save_checkpoint(folder)
    random_states = folder / "random"
    random_states.mkdir(exist_ok=True)
    torch.save(random_state(), random_states / f"rank_{rank}_of_{world_size}.pt")
    if rank == 0:
        copy_assets(source / HF_ASSETS, folder / HF_ASSETS)
    dist.barrier()
    entries: list[Any] = [None] * world_size
    dist.all_gather_object(entries, describe(folder, rank, world_size))
    if rank == 0:
        seal(folder, {name: entry for part in entries for name, entry in part.items()})
        retain(run_dir, config.keep_last, config.keep_every)
        (run_dir / "last_step").write_text(f"{step}\n")  # the job script sees progress by it
    dist.barrier()


def checkpoint_to_resume(run_dir: Path) -> Path | None:
    """The newest whole checkpoint, the same on every rank: rank 0 reads and proves it."""
    found: list[Path | None] = [newest_whole(run_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def random_state() -> dict[str, Any]:
    """Every random generator of this rank, in types that `torch.load(weights_only=True)` accepts."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tensor_parallel": get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(checkpoint: Path) -> None:
    """Set this rank's generators as they were; on another number of ranks they stay as seeded."""
    path = checkpoint / "random" / f"rank_{dist.get_rank()}_of_{dist.get_world_size()}.pt"
    if not path.is_file():
        return
    state = torch.load(path, weights_only=True)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tensor_parallel"])
