"""What happens after each step: report, check, save, stop."""

from __future__ import annotations

import logging
import math
import signal
import time
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_tsdkd.checkpoints.manifest import step_folder
from nemo_tsdkd.checkpoints.run_lock import Claim
from nemo_tsdkd.config.schema import CheckpointConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed.groups import from_rank_zero
from nemo_tsdkd.distributed.signals import Stopped, handle_stop_signals
from nemo_tsdkd.megatron.checkpoints.save import (
    RunCheckpoints,
    mark_finished,
    restore_random_state,
    start_results_process,
)
from nemo_tsdkd.megatron.loggers import open_logger
from nemo_tsdkd.megatron.validation import Validate
from nemo_tsdkd.reporting.loggers import RunLoggers
from nemo_tsdkd.reporting.metrics import MetricsLogger, refresh_plots
from nemo_tsdkd.reporting.report import refresh_report

logger = logging.getLogger(__name__)


class RequireLock(pl.Callback):
    """Ends the run on every rank after a step in which another process took it over. Nothing more is written.

    Raises:
        UserError: who took it over.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        lost = False
        if trainer.is_global_zero:
            try:
                self.claim.require_held()
            except UserError:
                lost = True
        if any(_largest(lost)):
            from_rank_zero(self.claim.require_held)


class ReportMetrics(pl.Callback):
    """Writes the step's metrics on rank 0, after every rank has checked that they are finite.

    NeMo copies a callback's arguments, so the open files come with the first step, not with the constructor.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._metrics_logger: MetricsLogger | None = None  # both on rank 0 only
        self._loggers: RunLoggers | None = None
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, model: Any) -> None:
        step = trainer.global_step  # 0, or what the loaded checkpoint holds
        from_rank_zero(lambda: self._open_loggers(step))
        if trainer.is_global_zero:
            progress = self.config.progress_bar
            self._metrics_logger = MetricsLogger(self.run_dir, trainer.max_steps, progress, step, self._loggers)

    def _open_loggers(self, step: int) -> None:
        self._loggers = RunLoggers(self.run_dir, self.config.loggers, partial(open_logger, self.config, step))

    def on_exception(self, trainer: pl.Trainer, model: Any, exception: BaseException) -> None:
        if self._loggers:
            self._loggers.close("failed")

    def on_train_batch_start(self, trainer: pl.Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        validation = trainer.strategy.validation_metrics
        if self._metrics_logger and validation and trainer.global_step == 0:
            self._metrics_logger.log_validation(0, validation | {"timestamp": time.time()})
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        metrics = dict(trainer.strategy.step_metrics)
        metrics["grad_norm"] = float(trainer.callback_metrics["grad_norm"])
        validation = trainer.strategy.validation_metrics
        seconds = time.perf_counter() - self._started - validation.get("validation_s", 0)
        metrics["tokens_per_s"] = metrics["response_tokens"] / seconds
        metrics["memory_gib"] = _peak_memory() / 2**30
        metrics["epoch"] = trainer.datamodule.epoch(step)
        metrics["save_s"], trainer.strategy.save_s = trainer.strategy.save_s, 0.0
        metrics["timestamp"] = time.time()
        metrics |= validation
        # Every rank holds the same reduced figures, so that every rank stops here, before anything is saved.
        bad = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, trainer.strategy.not_finite)
            where = next((f"rank {rank}: {what}" for rank, what in enumerate(found) if what), "every loss is finite")
            raise FloatingPointError(f"step {step}: {', '.join(bad)} ({where}). Nothing was saved of this step.")
        if self._metrics_logger:
            self._metrics_logger.log(step, metrics)

    def on_train_end(self, trainer: pl.Trainer, model: Any) -> None:
        if self._metrics_logger:
            finished = trainer.global_step >= trainer.max_steps or trainer.strategy.ended_early
            self._metrics_logger.close({"steps": trainer.global_step, "finished": finished})
            refresh_report(self.run_dir)


class SaveAndStop(pl.Callback):
    """Saves every n steps, every so many minutes and at the last step; with `checkpoint.keep_best` at each validation
    that is the best so far. On a stop signal it saves and stops; after `patience` validations without a better one it
    saves and ends the run.

    Args:
        source: the imported student.
        reuse: `rollout.reuse`.
        validate: whose scores are saved; None without validation.
        patience: `validation.patience`.
    """

    stopped: Stopped | None = None

    def __init__(
        self, checkpoints: RunCheckpoints, source: Path, reuse: int, validate: Validate | None, patience: int
    ) -> None:
        self.checkpoints = checkpoints
        self.source = source
        self.reuse = reuse
        self.validate = validate
        self.patience = patience
        self._stop_signal = 0
        self._saved_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, model: Any) -> None:
        if trainer.ckpt_path:
            restore_random_state(Path(trainer.ckpt_path))
        # After Lightning's own handlers, which would raise in the middle of a step on one rank alone.
        handle_stop_signals(self._note_signal)
        start_results_process()
        self._saved_at = time.monotonic()

    def _note_signal(self, signum: int, frame: FrameType | None) -> None:
        again = " Ctrl-C once more ends it at once." if signum == signal.SIGINT else ""
        logger.warning("%s: saving after this step, then stopping.%s", signal.Signals(signum).name, again)
        self._stop_signal = signum

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        scores = self.validate.scores if self.validate else None
        best = scores is not None and self.checkpoints.settings.keep_best and scores.best_step() == step
        early = scores is not None and scores.ends_run(step, self.patience)
        last = step == trainer.max_steps or early
        if step % self.reuse:
            return  # a set of rollouts is not part of a checkpoint: save only before a step that generates a new set
        settings: CheckpointConfig = self.checkpoints.settings
        minutes = (time.monotonic() - self._saved_at) / 60
        stop, due = _largest(self._stop_signal, minutes >= settings.every_minutes)
        if stop or due or last or best or step % settings.every_n_steps == 0:
            begin = time.monotonic()
            self.checkpoints.save(trainer, self.source, wait=bool(stop) or last, scores=scores)
            self._saved_at = time.monotonic()
            trainer.strategy.save_s += self._saved_at - begin  # reported with the next step
            if trainer.is_global_zero and not (stop or last):  # at its end ReportMetrics writes it
                refresh_report(self.checkpoints.run_dir)
                refresh_plots(self.checkpoints.run_dir)
        if last and trainer.is_global_zero:
            mark_finished(self.checkpoints.run_dir)
        if early:
            logger.info("step %d: no better validation in %d: the run ends (validation.patience).", step, self.patience)
            trainer.strategy.ended_early = trainer.should_stop = True
        elif stop and not last:
            self.stopped = Stopped(stop, step, step_folder(self.checkpoints.run_dir, step))
            trainer.should_stop = True


def _peak_memory() -> float:
    """Bytes on the fullest rank: of a GPU, what tensors held at most in this step; of a CPU's process, what it ever
    held."""
    own = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    most = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def _largest(*values: int) -> list[int]:
    """The largest of each value over all ranks. Signals reach the ranks at different moments, and their clocks differ:
    all must do the same after the same step."""
    largest = torch.tensor(values, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()
