"""A run with saved checkpoints begins again at step 1 only if the user allows it: its checkpoints may be damaged, or on
a disk that is not mounted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from nemo_tsdkd.checkpoints.manifest import CHECKPOINTS
from nemo_tsdkd.checkpoints.retention import set_aside, was_saved
from nemo_tsdkd.config.validation import UserError

LAST_STEP = "last_step"  # of a run: the step of its newest checkpoint
FINISHED = "FINISHED"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOGGED_RUNS = "loggers.json"  # which runs of W&B and MLflow this run is
logger = logging.getLogger(__name__)


def begin_at_step_1(run_dir: Path, damaged: Mapping[Path, str], allowed: bool) -> None:
    """Prepare a run without a complete checkpoint to begin at step 1. Call it on one rank, which holds the run's lock.

    Files of earlier attempts are renamed, not removed.

    Args:
        damaged: checkpoints that do not count, with what is wrong with each.
        allowed: `checkpoint.start_over`.

    Raises:
        UserError: the run has saved before, and it is not allowed to start over.
    """
    saved = {folder: damage for folder, damage in damaged.items() if was_saved(folder)}
    marks = [run_dir / name for name in (LAST_STEP, FINISHED) if (run_dir / name).exists()]
    if not saved and not marks:
        return  # an attempt that was killed before its first save has left no checkpoint
    if not allowed:
        raise UserError(
            f"run_dir = {str(run_dir)!r}: {_trace(run_dir, marks)}, but no checkpoint is complete: "
            f"{_state(run_dir, saved)}. Mount the disk or put the checkpoints back; "
            "checkpoint.start_over=true begins again at step 1 and keeps what is here under other names."
        )
    logger.warning("%s: starts over at step 1 (checkpoint.start_over).", run_dir)
    for path in [
        *saved,
        run_dir / METRICS,
        run_dir / SAMPLES,
        run_dir / LOGGED_RUNS,
        *reversed(marks),
    ]:  # last_step comes last: if this is killed before, the next attempt checks again
        if path.exists():
            set_aside(path)


def _trace(run_dir: Path, marks: list[Path]) -> str:
    if run_dir / LAST_STEP in marks:
        return f"step {(run_dir / LAST_STEP).read_text(errors='replace').strip()[:20]!r} was saved ({LAST_STEP})"
    return f"{FINISHED} exists" if marks else "checkpoints were saved"


def _state(run_dir: Path, saved: Mapping[Path, str]) -> str:
    if saved:
        return "; ".join(f"{folder.name}: {damage}" for folder, damage in saved.items())
    return f"{CHECKPOINTS}/ {'holds none' if (run_dir / CHECKPOINTS).is_dir() else 'is absent'}"
