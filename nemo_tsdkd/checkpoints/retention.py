"""Which checkpoints a run may remove: its own that it no longer needs, never through a link.

Every checkpoint names its run in `run.json`; while it is being written or removed it also holds the file `unfinished`.
A damaged checkpoint is renamed and kept. So is a folder with the name of a new checkpoint, unless it is this run's
unfinished one.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import sync
from nemo_tsdkd.checkpoints.best import best_of
from nemo_tsdkd.checkpoints.manifest import (
    MANIFEST,
    UNFINISHED,
    checkpoint_folders,
    has_manifest,
    step_folder,
    step_of,
    write_manifest,
)
from nemo_tsdkd.checkpoints.run_record import RECORD, RunRecord

logger = logging.getLogger(__name__)


def begin_checkpoint(run_dir: Path, step: int, record: RunRecord) -> Path:
    """Remove unfinished checkpoints and create the folder for that of `step`. Call it on one rank, between saves."""
    for folder in _checkpoints_of(run_dir, record.run):
        if _is_unfinished(folder):
            _remove(folder)
    if os.path.lexists(folder := step_folder(run_dir, step)):
        set_aside(folder)
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    record.write(folder)
    return folder


def finish_checkpoint(folder: Path, entries: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest; from then on the checkpoint counts. Call it on one rank, with the entries of all ranks."""
    write_manifest(folder, entries)
    (folder / UNFINISHED).unlink(missing_ok=True)


def remove_old_checkpoints(
    run_dir: Path, saved: int, run: str, keep_last: int, keep_every: int = 0, keep_best: bool = False
) -> None:
    """Remove this run's checkpoints but the `keep_last` newest up to the just `saved` step, each `keep_every`-th step's
    and, with `keep_best`, the one with the best validation."""
    counted = [f for f in _checkpoints_of(run_dir, run) if has_manifest(f) and step_of(f) <= saved]
    kept = set(counted[-keep_last:]) | {f for f in counted if keep_every and step_of(f) % keep_every == 0}
    if keep_best and (best := best_of(counted)):
        kept.add(best[0])
    for folder in counted:
        if folder not in kept:
            _remove(folder)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint to a name that does not count, and return its new path. A link itself is renamed."""
    names = (path.with_name(f"{path.name}.set_aside{n}") for n in ("", *(f"_{i}" for i in range(2, 10**6))))
    target = next(name for name in names if not os.path.lexists(name))
    path.rename(target)
    sync(path.parent)
    logger.warning("%s: renamed to %s, which no run reads or removes.", path, target.name)
    return target


def was_saved(folder: Path) -> bool:
    """Whether a damaged folder was a complete checkpoint before, and not an unfinished or unknown one."""
    return has_manifest(folder) or (RunRecord.read(folder) is not None and not (folder / UNFINISHED).exists())


def _is_unfinished(folder: Path) -> bool:
    return not has_manifest(folder) and (folder / UNFINISHED).exists()


def _remove(folder: Path) -> None:
    """Remove a checkpoint. If this is killed, the rest does not count and is known as this run's unfinished one."""
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    sync(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (RECORD, UNFINISHED):
            path.unlink()
    shutil.rmtree(folder)


def _checkpoints_of(run_dir: Path, run: str) -> list[Path]:
    records = {folder: RunRecord.read(folder) for folder in checkpoint_folders(run_dir) if not folder.is_symlink()}
    return [folder for folder, record in records.items() if record and record.run == run]
