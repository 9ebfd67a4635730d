"""What a run hands to TensorBoard, Weights & Biases and MLflow, and that it is one run there however often it restarts.

The loggers themselves are Lightning's (`megatron/loggers.py`). No torch on import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checkpoints.start_over import LOGGED_RUNS, METRICS, SAMPLES
from nemo_tsdkd.config.validation import HostError
from nemo_tsdkd.reporting.rows import read_metrics, read_samples

logger = logging.getLogger(__name__)

# Of a sample's table; verdicts are spread over the last three.
SAMPLE_COLUMNS = ("step", "kind", "index", "prompt", "response", "truncated", "correct", "answer", "expected")


class OpenLogger(Protocol):
    """A logger that has been opened for this run."""

    run_id: str | None  # of the run there, to go on with after a restart; None where the run folder says which it is
    purges: bool  # whether it drops by itself the steps that a resumed run does again

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Take a step's metrics and its samples, by SAMPLE_COLUMNS."""

    def close(self, status: str) -> None:
        """Everything is written when it returns. `status`: "finished", "stopped" or "failed"."""


class RunLoggers:
    """The loggers of one run. On rank 0 only; make it before `MetricsLogger`, which cuts metrics.jsonl.

    `loggers.json` keeps, for each logger, the id of its run and the last step that it may have. Weights & Biases takes
    no step back and cannot be asked while offline: what a resumed run does again is not logged again, and it is the
    same by all that a checkpoint holds. Steps that its process had not written when the job was killed (by SIGKILL; a
    stop signal waits for it) are missing there.

    Args:
        open_logger: opens one by its name; it gets the id of the run to go on with, None for a new one.

    Raises:
        HostError: one cannot be opened.
    """

    def __init__(
        self, run_dir: Path, names: Sequence[str], open_logger: Callable[[str, str | None], OpenLogger]
    ) -> None:
        self.run_dir = run_dir
        path = run_dir / LOGGED_RUNS
        before = read_json(path) if path.exists() else {}
        rows = read_metrics(run_dir / METRICS) if (run_dir / METRICS).exists() else []
        recorded = max((int(row["step"]) for row in rows), default=-1)
        self._samples_read = 0  # bytes of samples.jsonl
        self._open: dict[str, OpenLogger] = {}
        self._last: dict[str, int] = {}
        for name in names:
            known = before.get(name, {})
            try:
                self._open[name] = opened = open_logger(name, known.get("run_id"))
            except Exception as error:
                self.close("failed")
                raise HostError(
                    f"loggers: {name} cannot be opened ({error}). Mend it, or take it from the list."
                ) from error
            self._last[name] = max(known.get("last_step", -1), recorded) if known and not opened.purges else -1
            before[name] = {"run_id": opened.run_id, "last_step": self._last[name]}
        if names:
            write_json(path, before)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a step's metrics, and its samples in samples.jsonl, to each logger that has not had the step yet."""
        samples: list[dict[str, Any]] | None = None
        for name in [name for name in self._open if step > self._last[name]]:
            if samples is None:
                samples = self._samples(step)
            self._try(name, methodcaller("log", step, values, samples))

    def close(self, status: str) -> None:
        """End each logger's run as "finished", "stopped" (to be resumed) or "failed"."""
        for name in list(self._open):
            self._try(name, methodcaller("close", status))
        self._open.clear()

    def _try(self, name: str, use: Callable[[OpenLogger], None]) -> None:
        """A logger that fails is left out until the next start: metrics.jsonl has all of it, and training goes on."""
        try:
            use(self._open[name])
        except Exception as error:
            logger.warning(
                "loggers: %s failed and is left out from here on (%s: %s).", name, type(error).__name__, error
            )
            del self._open[name]

    def _samples(self, step: int) -> list[dict[str, Any]]:
        path = self.run_dir / SAMPLES
        size = path.stat().st_size if path.exists() else 0
        if size == self._samples_read:
            return []
        begin, self._samples_read = self._samples_read, size
        return [_table_row(sample) for sample in read_samples(path, begin) if sample["step"] == step]


def _table_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    row = {**sample, **(sample.get("verdict") or {})}
    return {name: row.get(name) for name in SAMPLE_COLUMNS}
