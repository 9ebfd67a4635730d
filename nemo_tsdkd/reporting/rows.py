"""The rows of metrics.jsonl, one object a step, and those of samples.jsonl. No torch on import."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from nemo_tsdkd.checkpoints.atomic import write_atomically

logger = logging.getLogger(__name__)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl in file order. Skips the incomplete last line of a killed process; skips
    garbage and NUL lines of a failing disk too, with a warning for each."""
    rows = []
    *lines, _ = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            logger.warning("%s: line %d does not hold a step's metrics and is skipped: %.60r.", path, number, line)
        else:
            rows.append(row)
    return rows


def parsed(line: bytes) -> Any:
    """What a line of JSON holds; None where it is torn."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None


def _row(line: bytes) -> dict[str, float] | None:
    row = parsed(line)
    if not isinstance(row, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in row.values()):
        return None
    return row if type(row.get("step")) is int else None


def first_step(resume_step: int) -> int:
    """The first step that an attempt writes which resumes after `resume_step`; a new run's first row is step 0's."""
    return resume_step + 1 if resume_step else 0


def drop_steps(path: Path, first: int) -> None:
    """Remove the metrics of the steps from `first` on, and lines that hold no metrics."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] < first]
        write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept).encode())


def read_samples(path: Path, begin: int = 0) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl in file order, from its byte `begin` on; lines that hold no sample are skipped, as a
    killed process leaves one."""
    samples = []
    with path.open("rb") as file:
        file.seek(begin)
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        sample = parsed(line)
        if isinstance(sample, dict) and isinstance(sample.get("step"), int) and isinstance(sample.get("tokens"), dict):
            samples.append(sample)
        elif line:
            logger.warning("%s: line %d holds no sample and is skipped: %.60r.", path, number, line)
    return samples
