"""Training checkpoints: what one holds, when it counts, and how a run resumes from it.

`checkpoints/step_N` holds NeMo's distributed checkpoint (student, optimizer, schedule, loops, consumed samples), the
source's context (config, tokenizer), and each rank's random state. Its manifest comes last: `checkpoints/manifest.py`.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_tsdkd.checkpoints.atomic import write_atomically
from nemo_tsdkd.checkpoints.best import Scores
from nemo_tsdkd.checkpoints.manifest import (
    checkpoint_folders,
    files_to_list,
    first_complete,
    manifest_entries,
    step_folder,
)
from nemo_tsdkd.checkpoints.retention import begin_checkpoint, finish_checkpoint, remove_old_checkpoints
from nemo_tsdkd.checkpoints.run_lock import Claim, lock
from nemo_tsdkd.checkpoints.run_record import RunRecord
from nemo_tsdkd.checkpoints.start_over import FINISHED, LAST_STEP
from nemo_tsdkd.config.schema import CheckpointConfig
from nemo_tsdkd.distributed.groups import from_rank_zero
from nemo_tsdkd.distributed.signals import STOP_SIGNALS
from nemo_tsdkd.megatron.checkpoints.load import find_damage_on_all_ranks


def start_results_process() -> None:
    """Start the process that Megatron's saving processes report to, with the stop signals blocked.

    A cluster may send a stop signal to every process of the job. This process must survive it, or nothing can be saved;
    if it were started at the first save, the signal would end it.
    """
    for start in (resource_tracker.ensure_running, filesystem_async._get_write_results_queue):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # twice, since ensure_running unblocks SIGTERM
        try:
            start()  # a new process inherits the blocked signals
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def lock_run(run_dir: Path) -> Iterator[Claim]:
    """Hold the run's lock, by rank 0. Collective.

    Raises:
        UserError: on every rank, if another living process holds it.
    """
    with ExitStack() as stack:
        yield from_rank_zero(lambda: stack.enter_context(lock(run_dir)))


def find_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint, and what is wrong with each newer one. The same on every rank; collective.

    Rank 0 lists the checkpoints, and each rank reads a share of the files: one alone would read for minutes.
    """
    damaged: dict[Path, str] = {}

    def damage_of(folder: Path) -> str | None:
        damage = find_damage_on_all_ranks(folder)
        if damage:
            damaged[folder] = damage
        return damage

    return first_complete(from_rank_zero(lambda: checkpoint_folders(run_dir)[::-1]), damage_of), damaged


@dataclass(frozen=True, kw_only=True)
class RunCheckpoints:
    """The checkpoints of one run. Has no changing state, because NeMo copies it with the callback."""

    run_dir: Path
    settings: CheckpointConfig
    claim: Claim
    record: RunRecord

    def save(self, trainer: pl.Trainer, source: Path, *, wait: bool, scores: Scores | None = None) -> None:
        """Write the checkpoint of the trainer's step, then its manifest, then remove old checkpoints. Collective.

        With `async_save` the files are written during the following steps; NeMo's callback finds when all ranks are
        done.

        Args:
            source: the imported student the run began with; its context (config, tokenizer) goes into the checkpoint.
            wait: return when the checkpoint is complete, even with `async_save`.
            scores: of the validations up to this step.
        """
        io, step = trainer.strategy.checkpoint_io, trainer.global_step
        folder = step_folder(self.run_dir, step)
        if self.settings.async_save:
            io.maybe_finalize_save_checkpoint(blocking=True)  # one unfinished checkpoint at a time
        if dist.get_rank() == 0:
            begin_checkpoint(self.run_dir, step, self.record)
            shutil.copytree(source / "context", folder / "context")
            (folder / "random").mkdir()
            if scores:
                scores.write(folder)
        dist.barrier()
        torch.save(random_state(), _random_file(folder))
        finish = partial(self._finish, step)
        trainer.save_checkpoint(folder, storage_options={"finalize_fn": finish} if self.settings.async_save else None)
        if not self.settings.async_save:
            finish()
        elif wait:
            io.maybe_finalize_save_checkpoint(blocking=True)

    def _finish(self, step: int) -> None:
        """Write the manifest, once all ranks have written their files; then remove old checkpoints. Collective.

        Raises:
            UserError: on every rank, if another process has taken the run over meanwhile.
        """
        folder, rank, world_size = step_folder(self.run_dir, step), dist.get_rank(), dist.get_world_size()
        dist.barrier()
        names = from_rank_zero(lambda: self._files_to_list(folder))
        entries: list[Any] = [None] * world_size
        dist.all_gather_object(entries, manifest_entries(folder, names[rank::world_size]))
        if rank == 0:
            finish_checkpoint(folder, {name: entry for part in entries for name, entry in part.items()})
            keep = self.settings
            remove_old_checkpoints(self.run_dir, step, self.record.run, keep.keep_last, keep.keep_every, keep.keep_best)
            write_atomically(self.run_dir / LAST_STEP, f"{step}\n".encode())  # the job script reads progress from it
        dist.barrier()

    def _files_to_list(self, folder: Path) -> list[str]:
        self.claim.require_held()
        return files_to_list(folder)


def mark_finished(run_dir: Path) -> None:
    """Write `FINISHED`: a job that finds it does not run again."""
    (run_dir / FINISHED).touch()


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
    path = _random_file(checkpoint)
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


def _random_file(checkpoint: Path) -> Path:
    return checkpoint / "random" / f"rank_{dist.get_rank()}_of_{dist.get_world_size()}.pt"
