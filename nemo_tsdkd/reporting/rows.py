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


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(row, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in row.values()):
        return None
    return row if type(row.get("step")) is int else None


def drop_steps(path: Path, first: int) -> None:
    """Remove the metrics of the steps from `first` on, and lines that hold no metrics."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] < first]
        write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept).encode())


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl in file order; lines that hold no sample are skipped, as a killed process leaves
    one."""
    samples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            sample = json.loads(line) if line else None
        except (ValueError, RecursionError):
            sample = None
        if isinstance(sample, dict) and isinstance(sample.get("step"), int) and isinstance(sample.get("tokens"), dict):
            samples.append(sample)
        elif line:
            logger.warning("%s: line %d holds no sample and is skipped: %.60r.", path, number, line)
    return samples
