"""Which checkpoints a run may remove: those that it wrote itself and no longer needs, never through a link.

Every checkpoint names its run in `run.json`; while it is being written or removed it also holds a mark. What is
damaged, or has the name of a new checkpoint and is not this run's leftover, is renamed and stays.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import sync
from nemo_tsdkd.checkpoints.manifest import (
    MANIFEST,
    UNFINISHED,
    folders,
    has_manifest,
    step_folder,
    step_of,
    write_manifest,
)
from nemo_tsdkd.checkpoints.run_record import RECORD, RunRecord

logger = logging.getLogger(__name__)


def begin_checkpoint(run_dir: Path, step: int, record: RunRecord) -> Path:
    """Make the folder of the checkpoint of `step`, and room for it. Call it on one rank, none being written."""
    for folder in _own(run_dir, record.run):
        if _is_leftover(folder):
            _remove(folder)
    if os.path.lexists(folder := step_folder(run_dir, step)):
        set_aside(folder)
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    record.write(folder)
    return folder


def finish_checkpoint(folder: Path, entries: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest, from when on the checkpoint counts. Call it on one rank, with the entries of all ranks."""
    write_manifest(folder, entries)
    (folder / UNFINISHED).unlink(missing_ok=True)


def rotate(run_dir: Path, saved: int, run: str, keep_last: int, keep_every: int = 0) -> None:
    """Remove this run's checkpoints but the `keep_last` newest up to the just `saved` step, and each `keep_every`-th
    step's."""
    counted = [f for f in _own(run_dir, run) if has_manifest(f) and step_of(f) <= saved]
    kept = set(counted[-keep_last:]) | {f for f in counted if keep_every and step_of(f) % keep_every == 0}
    for folder in counted:
        if folder not in kept:
            _remove(folder)


def set_aside(path: Path) -> Path:
    """Rename what has a checkpoint's name to one that does not count; return it. Of a link, the link is renamed."""
    names = (path.with_name(f"{path.name}.set_aside{n}") for n in ("", *(f"_{i}" for i in range(2, 10**6))))
    target = next(name for name in names if not os.path.lexists(name))
    path.rename(target)
    sync(path.parent)
    logger.warning("%s: renamed to %s, which no run reads or removes.", path, target.name)
    return target


def was_saved(folder: Path) -> bool:
    """Whether a folder that does not count did so once: it is no killed save's leftover, and no stranger's."""
    return has_manifest(folder) or (RunRecord.read(folder) is not None and not (folder / UNFINISHED).exists())


def _is_leftover(folder: Path) -> bool:
    return not has_manifest(folder) and (folder / UNFINISHED).exists()


def _remove(folder: Path) -> None:
    """Remove a checkpoint. Killed half-way, what is left does not count and is still known as this run's leftover."""
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    sync(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (RECORD, UNFINISHED):
            path.unlink()
    shutil.rmtree(folder)


def _own(run_dir: Path, run: str) -> list[Path]:
    records = {folder: RunRecord.read(folder) for folder in folders(run_dir) if not folder.is_symlink()}
    return [folder for folder, record in records.items() if record and record.run == run]
