"""Metrics of a run: metrics.jsonl, a progress bar, plots and a summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from nemo_tsdkd.checkpoints.atomic import write_json
from nemo_tsdkd.checkpoints.start_over import METRICS
from nemo_tsdkd.distributed.progress import ProgressDisplay
from nemo_tsdkd.objective import ALWAYS_REPORTED
from nemo_tsdkd.reporting.accuracy import ACCURACY
from nemo_tsdkd.reporting.loggers import RunLoggers
from nemo_tsdkd.reporting.rows import drop_steps, first_step, read_metrics
from nemo_tsdkd.reporting.run_files import SUMMARY, only_warned, record_start

matplotlib.use("Agg")  # compute nodes have no display
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

# figure -> (unit of its y axis, metrics drawn into it)
PLOTS = {
    "loss": ("nats", ("loss", "direct_weighted", "indirect_weighted", "entropy_weighted")),
    "entropy": ("nats per token", ("student_entropy", "teacher_entropy")),
    "selection": ("share", ("gate_mean", "opener_fraction", "rank_agreement")),
    "time": ("seconds per step", ("rollout_s", "teacher_s", "student_s")),
}
# What every step reports; a step may report more, such as the metrics of terms that have weight.
REQUIRED = (
    "loss",
    *ALWAYS_REPORTED,
    *("rollout_s", "teacher_s", "student_s"),
    *("grad_norm", "lr", "tokens_per_s"),
    "timestamp",  # seconds since 1970, at the step's end
    "epoch",  # passes over the data so far
    "save_s",  # seconds of the saves since the last reported step
    "memory_gib",  # see callbacks._peak_memory
)


class MetricsLogger:
    """Writes one run's metrics to metrics.jsonl, the terminal and the run's loggers; at the end, plots. On rank 0 only.

    `resume_step` is the last step that the loaded checkpoint holds (0 for a new run): metrics of later
    steps are dropped, at 0 all, so that the file of a resumed run equals that of an uninterrupted one. A step has one
    row; that of step 0 is a validation before training.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        progress: bool = True,
        resume_step: int = 0,
        loggers: RunLoggers | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / METRICS
        record_start(self.run_dir, resume_step)
        drop_steps(self.path, first_step(resume_step))
        self._file = self.path.open("a", encoding="utf-8")
        self._loggers = loggers
        self._display = ProgressDisplay("step", total_steps, resume_step) if progress else None
        self._said_last = ""  # of a validation, shown until the next one

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one step's metrics (plain numbers); they are on the disk when it returns.

        Raises:
            ValueError: a metric of REQUIRED is missing, or one is NaN or infinite (strict JSON has neither).
        """
        if missing := [key for key in REQUIRED if key not in values]:
            raise ValueError(f"step {step} reports no {', '.join(missing)}.")
        self._write(step, values)
        self._said_last = _accuracy(values) or self._said_last
        if self._display:
            said = f"loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tokens/s"
            self._display.show(step, said, self._said_last)

    def log_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a validation without a training step: the row of step 0.

        Raises:
            ValueError: one is NaN or infinite.
        """
        self._write(step, values)
        self._said_last = _accuracy(values) or self._said_last

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"step {step}: {key} = {value}: not finite. Lower optim.lr or look at the data.")
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._loggers:
            self._loggers.log(step, values)

    def close(self, summary: dict[str, Any]) -> None:
        """End the run: write summary.json and one PNG for each entry of PLOTS."""
        self._file.close()
        if self._loggers:
            self._loggers.close("finished" if summary.get("finished") else "stopped")
        if self._display:
            self._display.close()
        write_json(self.run_dir / SUMMARY, summary)
        draw_plots(self.run_dir)


def _accuracy(values: Mapping[str, float]) -> str | None:
    return f"accuracy {values[ACCURACY]:.1%}" if ACCURACY in values else None


def refresh_plots(run_dir: Path) -> None:
    """Draw the plots of a run that trains; a failure is a warning."""
    with only_warned("The plots"):
        draw_plots(run_dir)


def draw_plots(run_dir: Path) -> None:
    """Draw one PNG for each entry of PLOTS from the run's metrics.jsonl."""
    rows = read_metrics(run_dir / METRICS)
    for name, (unit, keys) in PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for key in (key for key in keys if any(key in row for row in rows)):
            axes.plot([row["step"] for row in rows], [row.get(key, math.nan) for row in rows], label=key)
        axes.set(xlabel="step", ylabel=unit, title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend()
        figure.savefig(run_dir / f"{name}.png", dpi=120)
        plt.close(figure)
