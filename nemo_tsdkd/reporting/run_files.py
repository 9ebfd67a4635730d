"""What a run folder tells of its run: rows, restarts, samples, configuration, versions. No torch on import."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.start_over import METRICS, SAMPLES
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.reporting.rows import parsed, read_metrics, read_samples

logger = logging.getLogger(__name__)
REPORT = "report.html"
SUMMARY = "summary.json"  # the last step, and whether that was the run's end
STARTS = "starts.jsonl"  # in a run folder, one line for each attempt: the step that its checkpoint holds


@dataclass(frozen=True)
class RunFiles:
    """One run as its folder holds it.

    Attributes:
        name: of the run among those of one report.
        rows: of metrics.jsonl, by step, one for each step.
        restarts: steps after which an attempt went on from a checkpoint, ascending.
        samples: of samples.jsonl, in its order.
        config: text of config.yaml, "" where there is none.
        versions, summary: of versions.json and summary.json, empty where there are none.
    """

    name: str
    rows: list[dict[str, float]]
    restarts: list[int]
    samples: list[dict[str, Any]]
    config: str
    versions: dict[str, Any]
    summary: dict[str, Any]


def read_runs(folders: Sequence[str | Path]) -> list[RunFiles]:
    """Raises UserError where a folder holds no metrics.jsonl."""
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if not (path / METRICS).is_file():
            raise UserError(f"report: {str(path)!r}: holds no {METRICS}. Give the run_dir of a run that has begun.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # two runs of one name in two places
        names = [str(path) for path in paths]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(folder: Path, name: str) -> RunFiles:
    # Of a step that was written twice the later row counts.
    by_step = {row["step"]: row for row in read_metrics(folder / METRICS)}
    last = max(by_step, default=0)
    config, samples = folder / "config.yaml", folder / SAMPLES
    return RunFiles(
        name=name,
        rows=[by_step[step] for step in sorted(by_step)],
        restarts=[step for step in restarts(folder / STARTS) if step < last],
        samples=read_samples(samples) if samples.is_file() else [],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        versions=_json(folder / "versions.json"),
        summary=_json(folder / SUMMARY),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except UserError as error:
        return {"not readable": str(error)}


@contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, which writes `what`, is a warning: a picture ends no training."""
    try:
        yield
    except Exception as error:
        logger.warning("%s could not be written (%s: %s). Training goes on.", what, type(error).__name__, error)


def record_start(run_dir: Path, resume_step: int) -> None:
    """Note that an attempt begins after `resume_step`; 0 begins a new run."""
    with (run_dir / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"resume_step": resume_step, "timestamp": time.time()}) + "\n")


def restarts(path: Path) -> list[int]:
    """The steps after which the run, whose starts `path` holds, was resumed. An attempt that begins at an earlier step
    than the one before it writes the steps between again: restarts there are no part of the run any more."""
    steps: list[int] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        start = parsed(line)
        step = start.get("resume_step") if isinstance(start, dict) else None  # of a torn line
        if type(step) is int:
            steps = [earlier for earlier in steps if earlier < step] + [step]
    return [step for step in steps if step > 0]
